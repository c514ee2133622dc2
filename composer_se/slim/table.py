"""Reports the outcome of slimming in a table and in sentences, from the content of `slim.json`."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import mean
from typing import Any

from rich.console import Console

from composer_se.measure.uncertainty import Interval, ratio_of_means
from composer_se.show.terminal import new_table

__all__ = ["print_slimming", "sentences", "summary_rows"]


def summary_rows(found: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """The rows of the table: quantity, before, after, change.

    Args:
        found: The content of `slim.json`.
    """
    before, after = found["points"][0], found["points"][found["chosen"]]
    blocks, fewer = found["blocks"], found["chosen"]
    rows = [
        ("SE blocks", str(blocks), str(blocks - fewer), f"-{fewer}" if fewer else "none"),
        (
            "parameters",
            f"{before['parameters']:,}",
            f"{after['parameters']:,}",
            f"{after['parameters'] / before['parameters'] - 1:+.1%}" if fewer else "none",
        ),
    ]
    for batch_size, seconds in found["latency"].items():
        full, slim = seconds["0"], seconds[str(found["chosen"])]
        shown = (_milliseconds(full), _milliseconds(slim))
        ratio = f"× {ratio_of_means(slim, full).with_spread()}" if fewer else "none"
        rows.append((f"latency, batch {batch_size}", *shown, ratio))
    accuracies = (f"{before['reporting']['accuracy']:.2%}", f"{after['reporting']['accuracy']:.2%}")
    rows.append(("accuracy", *accuracies, f"{_points(after['reporting']['change'])} points"))
    return rows


def sentences(found: Mapping[str, Any]) -> list[str]:
    """Sentences on the images, the tolerance, the fixed blocks, and the blocks that can't be folded.

    Args:
        found: The content of `slim.json`.
    """
    deciding, reporting = found["num_images"]["deciding"], found["num_images"]["reporting"]
    chosen, points = found["chosen"], found["points"]
    said = [
        f"Accuracy: on {reporting:,} held-out images that decided nothing, with the 95 % interval of the change. The "
        f"other {deciding:,} gave the mean gates and decided which blocks go. On those the accuracy changed by "
        f"{_points(points[chosen]['deciding']['change'])} points; the tolerance is {found['tolerance']:g}.",
    ]
    if not chosen:
        said.append("No block could go: fixing the least costly one lost more than the tolerance.")
    else:
        fixed = ", ".join(point["fixed"] for point in points[1 : chosen + 1])
        said += [
            f"Fixed, the least costly first: {fixed}.",
            "Where a batch norm follows a conv without a block, the two can be folded into one conv again.",
        ]
    said += [f"Kept, for it can't be folded: {name} ({reason})." for name, reason in found["not_foldable"].items()]
    return said


def print_slimming(found: Mapping[str, Any], console: Console) -> None:
    """Prints the table and the sentences.

    Args:
        found: The content of `slim.json`.
        console: The console to print to.
    """
    kept = found["blocks"] - found["chosen"]
    table = new_table(
        f"{found['name']} keeps {kept} of {found['blocks']} blocks", "", "", ("before", "after", "change")
    )
    for row in summary_rows(found):
        table.add_row(*row)
    console.print(table)
    for sentence in sentences(found):
        console.print(sentence, highlight=False, markup=False)


def _milliseconds(seconds: list[float]) -> str:
    return f"{1e3 * mean(seconds):.2f} ms"


def _points(change: Mapping[str, float]) -> str:
    interval = Interval(**change)
    return f"{100 * interval.value:+.2f} ± {100 * interval.half_width:.2f}"
