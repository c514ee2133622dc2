"""The table at the end of a run."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

__all__ = ["print_summary"]

_WORDS = {
    "metrics/eval/MulticlassAccuracy": "held-out accuracy",
    "metrics/eval/CrossEntropy": "held-out cross entropy",
    "loss/train/total": "last training loss",
    "throughput/samples_per_sec": "images per second",
}


def print_summary(summary: dict[str, Any], console: Console | None = None) -> None:
    """Prints the summary of a complete run as a table that fits 80 columns.

    Args:
        summary: As `summary.json` holds it.
        console: Where to. Default: stdout.
    """
    length = f"{_count(summary['epoch'], 'epoch', 'epochs')}, {_count(summary['batch'], 'batch', 'batches')}"
    table = Table(title=f"{summary['run_name']}: {length}")
    table.add_column("", style="bold", no_wrap=True)
    table.add_column("", justify="right", overflow="fold")
    table.show_header = False
    for name, value in summary["metrics"].items():
        if name in _WORDS:
            table.add_row(_WORDS[name], _format(name, value))
    total, added = summary["parameters"], summary["squeeze_excite_parameters"]
    table.add_row("SE layers", str(summary["squeeze_excite_layers"]))
    table.add_row("parameters", f"{total:,}")
    share = f" (+{added / (total - added):.2%})" if added else ""
    table.add_row("of these added by SE", f"{added:,}{share}")
    table.add_row("wall time", _duration(summary["wall_seconds"]))
    table.add_row("folder", summary["run_folder"])
    (console or Console()).print(table)


def _count(number: int, singular: str, plural: str) -> str:
    return f"{number:,} {singular if number == 1 else plural}"


def _format(name: str, value: float | None) -> str:
    if value is None:
        return "not finite"
    if name.endswith("Accuracy"):
        return f"{value:.2%}"
    return f"{value:.1f}" if name.startswith("throughput") else f"{value:.4f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(int(minutes), 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest:.0f} s" if minutes else f"{rest:.1f} s"
