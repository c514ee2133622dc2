"""Train a recipe in this process. For several processes: composer -n N -m composer_se.train RECIPE."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from composer_se import launch
from composer_se.commands.recipe import add_recipe_arguments, write_run_report

if TYPE_CHECKING:
    from composer_se.recipe.schema import Recipe

__all__ = ["add_arguments", "run", "run_recipe"]


_WORDS = {
    "metrics/eval/MulticlassAccuracy": "held-out accuracy",
    "metrics/eval/CrossEntropy": "held-out cross entropy",
    "loss/train/total": "last training loss",
    "throughput/samples_per_sec": "images per second",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    add_recipe_arguments(parser, "a key of the recipe, such as optimizer.lr=0.1 or algorithms.squeeze_excite=null")


def run(args: argparse.Namespace) -> int:
    """Trains the recipe; see `run_recipe`."""
    return run_recipe(args.recipe, args.overrides)


def run_recipe(recipe: str, overrides: Sequence[str] = ()) -> int:
    """Trains a recipe, in this process and its siblings under the launcher, prints its summary and writes its report.

    A run that was killed continues from its last checkpoint. A run that is complete is left alone: its summary is
    shown again.

    Args:
        recipe: The path of a YAML file, or the name of a shipped recipe.
        overrides: `dotted.key=value` strings.

    Returns:
        The exit code: 0 when the run is complete (now or already before), 130 or 143 when it was interrupted.

    Raises:
        UserError: The recipe is wrong, the run folder belongs to another recipe, or its latest checkpoint is
            damaged: nothing was written. Or the run could not write a file: it continues when there is room.
    """
    from composer_se.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides)
    launch.share_cores()  # before torch is imported

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
    if recipe.save_num_checkpoints_to_keep >= 0:
        launch.say(
            f"{recipe.save_folder} holds the last {recipe.save_num_checkpoints_to_keep} checkpoints; "
            "save_num_checkpoints_to_keep=-1 keeps all"
        )


def _print_summary(summary: dict[str, Any]) -> None:
    """Prints the summary of a complete run as a table that fits 80 columns."""
    from rich.console import Console
    from rich.table import Table

    from composer_se.show.text import duration

    length = f"{_count(summary['epoch'], 'epoch', 'epochs')}, {_count(summary['batch'], 'batch', 'batches')}"
    table = Table(title=f"{summary['run_name']}: {length}", show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(justify="right", overflow="fold")
    for name, value in summary["metrics"].items():
        if name in _WORDS:
            table.add_row(_WORDS[name], _format(name, value))
    total, added = summary["parameters"], summary["squeeze_excite_parameters"]
    table.add_row("SE layers", str(summary["squeeze_excite_layers"]))
    table.add_row("parameters", f"{total:,}")
    share = f" (+{added / (total - added):.2%})" if added else ""
    table.add_row("of these added by SE", f"{added:,}{share}")
    if (trained := summary.get("trained", total)) < total:  # summaries of earlier versions lack it
        table.add_row("of these trained", f"{trained:,} ({trained / total:.2%})")
    table.add_row("wall time", duration(summary["wall_seconds"]))
    table.add_row("folder", summary["run_folder"])
    Console().print(table)


def _count(number: int, singular: str, plural: str) -> str:
    return f"{number:,} {singular if number == 1 else plural}"


def _format(name: str, value: float | None) -> str:
    if value is None:
        return "not finite"
    if name.endswith("Accuracy"):
        return f"{value:.2%}"
    return f"{value:.1f}" if name.startswith("throughput") else f"{value:.4f}"
