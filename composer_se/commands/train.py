"""Trains a recipe in this process. For several processes: composer -n N -m composer_se.train RECIPE."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from composer_se import launch
from composer_se.commands.options import add_recipe_arguments

if TYPE_CHECKING:
    from composer_se.recipe.schema import Recipe

__all__ = ["add_arguments", "run", "run_recipe", "write_run_report"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    add_recipe_arguments(parser, "a key of the recipe, such as optimizer.lr=0.1 or algorithms.squeeze_excite=null")


def run(args: argparse.Namespace) -> int:
    """Trains the recipe; see `run_recipe`."""
    return run_recipe(args.recipe, args.overrides)


def run_recipe(recipe: str, overrides: Sequence[str] = ()) -> int:
    """Trains a recipe, prints its summary and writes its report. Under the launcher, every process calls it.

    A run that was killed continues from its last checkpoint. A complete run is not trained again; its summary is
    printed again.

    Args:
        recipe: The path of a YAML file, or the name of a shipped recipe.
        overrides: `dotted.key=value` strings.

    Returns:
        The exit code: 0 when the run is complete (now or already before), 130 or 143 when it was interrupted.

    Raises:
        UserError: If the recipe is wrong, the run folder belongs to another recipe, its latest checkpoint is damaged,
            or a file can't be written. The next call continues the run.
    """
    from composer_se.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides)
    launch.share_cores()  # before torch is imported
    launch.keep_freed_memory()

    from composer_se.recipe.run import exit_code_of

    with launch.log_on_terminal():
        code = exit_code_of(lambda: _train_and_show(loaded), Path(loaded.run_folder))
    if code:
        launch.leave_interrupted(
            f"\ncomposer-se: {loaded.run_name}: stopped; the same command continues from the last checkpoint"
        )
    return code


def _train_and_show(recipe: Recipe) -> None:
    from composer_se.recipe.run import train

    summary, was_finished = train(recipe)
    if launch.is_local_rank_zero() and (was_finished or os.environ.get("RANK", "0") == "0"):
        _print_summary(summary)
    if was_finished:
        launch.say(
            f"{recipe.run_folder} is complete: nothing to train. Train longer with max_duration=..., "
            "or start anew under another name with run_name=..."
        )
        return
    if os.environ.get("RANK", "0") == "0":
        write_run_report(Path(recipe.run_folder))
    kept = recipe.save_num_checkpoints_to_keep
    if kept >= 0:
        launch.say(
            f"{recipe.save_folder} holds the last {kept} checkpoints at most; save_num_checkpoints_to_keep=-1 keeps all"
        )


def write_run_report(run_folder: Path) -> None:
    """Writes a complete run's report. An error only logs a warning, so that the run does not look failed."""
    from composer_se.report.write import write_report

    try:
        write_report(run_folder)
    except Exception:
        logging.getLogger(__name__).warning("%s: report.html could not be written", run_folder, exc_info=True)


def _print_summary(summary: dict[str, Any]) -> None:
    """Prints the summary of a complete run as a table that fits 80 columns."""
    from rich.console import Console
    from rich.table import Table

    from composer_se.report.contents import outcome

    table = Table(title=summary["run_name"], show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(justify="right", overflow="fold")
    for row in (outcome(summary) | {"folder": summary["run_folder"]}).items():
        table.add_row(*row)
    Console().print(table)
