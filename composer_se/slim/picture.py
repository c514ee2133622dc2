"""Draws accuracy and latency against the number of blocks left."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import mean
from typing import IO, Any

from composer_se.show.pictures import BLACK, COLOURS, GREY, MARKERS, caption_below, new_figure, style

__all__ = ["draw"]

_CAPTION = (
    "From top to bottom, the gates of one block more are fixed at their means and multiplied into its layer, the least "
    "costly first. Left: the change of the accuracy, hollow on the images that decided, filled on those that decided "
    "nothing, with 95 % intervals. Right: the time of a forward pass over that with all blocks. The dashed line is the "
    "network that was written: as few blocks as possible while the deciding images lose at most the tolerance."
)


def draw(found: Mapping[str, Any], file: IO[bytes]) -> None:
    """Draws the two panels.

    Args:
        found: The content of `slim.json`.
        file: The file to write the PNG to.
    """
    points, chosen, blocks = found["points"], found["chosen"], found["blocks"]
    rows = range(len(points))
    figure = new_figure(9, 0.19 * len(points) + 2.8)
    left, right = figure.subplots(1, 2, sharey=True)
    _draw_accuracy(left, points, found)
    for batch_size, colour, marker in zip(found["latency"], COLOURS, MARKERS, strict=False):
        seconds = {int(count): mean(times) for count, times in found["latency"][batch_size].items()}
        right.plot(
            [seconds[count] / seconds[0] for count in seconds],
            [*seconds],
            color=colour,
            marker=marker,
            markersize=4,
            label=f"batch {batch_size}: {1e3 * seconds[0]:.1f} → {1e3 * seconds[chosen]:.1f} ms",
        )
    right.set_xlabel("time over that with all blocks")
    titles = (f"Accuracy, against {points[0]['reporting']['accuracy']:.2%}", "Latency")
    for axis, title in zip((left, right), titles, strict=True):
        style(axis, grid="x")
        axis.axhline(chosen, color=BLACK, linewidth=1, linestyle="--", zorder=0)
        axis.legend(title=title, loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False, fontsize="small", ncols=3)
    names = [f"{point['fixed'] or 'all blocks'}  {blocks - row:>2}" for row, point in enumerate(points)]
    left.set_yticks(rows, names, fontsize="x-small")
    left.set_ylim(len(points) - 0.5, -0.5)
    left.set_ylabel("block fixed, and blocks left")
    figure.suptitle(f"{found['name']} keeps {blocks - chosen} of {blocks} blocks", fontweight="bold")
    caption_below(figure, _CAPTION, 140)
    figure.savefig(file, dpi=120, format="png")


def _draw_accuracy(axis: Any, points: list[dict[str, Any]], found: Mapping[str, Any]) -> None:
    rows = range(1, len(points))
    axis.axvline(0, color=GREY, linewidth=1)
    axis.axvline(-found["tolerance"], color=GREY, linewidth=1, linestyle=":", label=f"tolerance {found['tolerance']:g}")
    deciding, reporting = ([point[half]["change"] for point in points[1:]] for half in ("deciding", "reporting"))
    axis.plot(
        [100 * change["value"] for change in deciding],
        rows,
        color=COLOURS[0],
        marker="o",
        markersize=4,
        markerfacecolor="white",
        linestyle="none",
        label="deciding",
    )
    axis.errorbar(
        [100 * change["value"] for change in reporting],
        rows,
        xerr=[100 * (change["high"] - change["value"]) for change in reporting],
        color=COLOURS[1],
        marker="o",
        markersize=4,
        linestyle="none",
        capsize=2,
        label="others",
    )
    axis.set_xlabel("change of the accuracy, percentage points")
