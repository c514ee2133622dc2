"""Tables and progress on the terminal."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table

__all__ = ["Progress", "counted", "new_table", "progress_bar"]

Progress = Callable[[str, int, int], None]
"""Called with the task, the steps done, and their number (0 if unknown)."""


def new_table(title: str, caption: str, first: str, others: Sequence[str], side: int = 1) -> Table:
    """An empty table: a column of names, which breaks long names, and columns of numbers.

    The caption explains the columns; `side` is the number of spaces on the left of each column.
    """
    table = Table(
        title=escape(title),
        caption=escape(caption),
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
        padding=(0, 1, 0, side),
    )
    table.add_column(first, overflow="fold")
    for head in others:
        table.add_column(head, justify="right", no_wrap=True)
    return table


def counted(progress: Progress, total: int) -> Callable[[str], None]:
    """Returns a function that reports progress: call it with the task after each of `total` steps."""
    done = itertools.count(1)
    return lambda what: progress(what, next(done), total)


@contextmanager
def progress_bar(*, speaks: bool = True, in_lines: bool = False) -> Iterator[Progress]:
    """Shows a progress bar on stderr, if this process `speaks`.

    With `in_lines`, which is for work of hours, it prints a line for each new task if stderr is no terminal.
    """
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    with Bar(*columns, TimeElapsedColumn(), console=console, transient=True, disable=not speaks) as bar:
        task = bar.add_task("starting", total=None)
        current = ""

        def progress(what: str, done: int, total: int) -> None:
            nonlocal current
            if what != current:
                current = what
                bar.reset(task)
                if speaks and in_lines and not console.is_terminal:
                    print(what, file=console.file, flush=True)
            bar.update(task, description=escape(what), completed=done, total=total or None)

        yield progress
