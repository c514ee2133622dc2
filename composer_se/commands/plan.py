"""Shows the convs of a network that would get Squeeze-and-Excitation, and the added cost. Changes and trains nothing.

Equal convs whose names differ only in numbers share a row. The row shows the numbers of one conv.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from composer_se.commands.network import add_network_arguments, read_network
from composer_se.commands.options import (
    add_squeeze_excite_arguments,
    read_min_channels,
    read_squeeze_excite,
    writing,
)
from composer_se.errors import UserError, one_line

if TYPE_CHECKING:
    from rich.table import Table

    from composer_se.planning import Plan

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `composer-se plan`."""
    add_network_arguments(parser)
    choice = parser.add_argument_group("which convs (default: the recipe's, or those of apply_squeeze_excite)")
    choice.add_argument("--min-channels", metavar="N", help="least number of channels, or 'auto' (default: 128)")
    add_squeeze_excite_arguments(choice)
    parser.add_argument(
        "--image-size",
        type=_size,
        metavar="N",
        help="height and width in pixels (N, or HxW), for sizes of maps and multiply-adds (default: the recipe's)",
    )
    parser.add_argument("--json", metavar="FILE", help="write every conv and the totals to a file; - for stdout")


def run(args: argparse.Namespace) -> int:
    """Prints the plan as a table, writes it as JSON, or both."""
    from rich.console import Console

    from composer_se.planning import plan

    network = read_network(args)
    min_channels = None if args.min_channels is None else read_min_channels(args.min_channels)
    options = read_squeeze_excite(args, network.squeeze_excite, min_channels=min_channels)
    try:
        planned = plan(network.build(), image_size=args.image_size or network.image_size, **asdict(options))
    except (TypeError, ValueError) as error:
        raise UserError(one_line(error)) from error
    if args.json is not None:
        text = json.dumps(_as_dict(planned), indent=2)
        if args.json == "-":
            print(text)
            return 0
        with writing("--json", args.json):
            Path(args.json).write_text(text + "\n")
    console = Console()
    console.print(_table(network.name, planned))
    for line in planned.summary():
        console.print(line, highlight=False)
    for note in planned.notes:
        console.print(f"[yellow]Note:[/yellow] {note}", highlight=False)
    return 0


def _as_dict(planned: Plan) -> dict[str, Any]:
    """The options, the totals, the notes and one object per conv."""
    totals = (
        *("threshold", "image_size", "parameters", "added_parameters"),
        *("multiply_adds", "added_multiply_adds", "gated_share", "notes"),
    )
    return asdict(planned.options) | {name: getattr(planned, name) for name in totals} | {"convs": planned.to_dicts()}


def _size(text: str) -> tuple[int, int]:
    parts = text.lower().replace("×", "x").split("x")
    if len(parts) > 2 or not all(part.isdecimal() and int(part) >= 1 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of pixels nor HxW")
    return int(parts[0]), int(parts[-1])


def _table(name: str, planned: Plan) -> Table:
    from rich.text import Text

    from composer_se.show.terminal import new_table

    heads, *rows = planned.rows()
    table = new_table(f"Squeeze-and-Excitation on {name}", "", heads[0], heads[1:-1], side=0)
    table.add_column(heads[-1], min_width=len(heads[-1]))
    for conv, row in zip(planned.grouped(), rows, strict=True):
        table.add_row(*map(Text, row), style="green" if conv.chosen else "dim")  # as Text: brackets are no markup
    return table
