"""Draws an analysis as one picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from composer_se.gates.analysis import Analysis, LayerGates
from composer_se.show.pictures import COLOURS, GREY, caption_below, new_figure, style

__all__ = ["draw", "pictured_classes"]

_CAPTION = (
    "Above: one panel per layer, from shallow to deep; its channels are sorted by their mean gate. Where the lines lie "
    "together, the gates do the same for every class. Where they part, the gates choose channels by class. A thin band "
    "is a fixed scale, which needs no block. Below left: the share of the gates' variance over images that the class "
    "explains; it usually grows with depth. Below right: the accuracy when the gates of one layer are fixed at their "
    "means, with 95 % intervals. Where the interval reaches 0, these images show no loss."
)
_MOST_CLASSES, _MOST_PANELS = 5, 20


def pictured_classes(analysis: Analysis) -> list[int]:
    """At most five classes with images, evenly spread over their numbers."""
    present = [k for k, gates in enumerate(analysis.layers[0].by_class) if gates is not None]
    return [present[i] for i in _spread(len(present), _MOST_CLASSES)]


def draw(title: str, analysis: Analysis, classes: Sequence[str], path: Path) -> None:
    """Draws the gates by class and layer, and two summaries by depth. At most 20 layers get a panel."""
    shown = [analysis.layers[i] for i in _spread(len(analysis.layers), _MOST_PANELS)]
    columns = math.ceil(math.sqrt(len(shown)))
    rows = math.ceil(len(shown) / columns)
    heights = (1.55 * rows + 1.2, 0.19 * len(analysis.layers) + 1.2)
    figure = new_figure(9, sum(heights) + 1)
    top, bottom = np.asarray(figure.subfigures(2, 1, height_ratios=heights))
    chosen = pictured_classes(analysis)
    axes = top.subplots(rows, columns, sharey=True, squeeze=False)
    for axis, layer in zip(axes.flat, shown, strict=False):
        _draw_layer(axis, layer, chosen)
    for axis in axes.flat[len(shown) :]:
        axis.remove()
    present = sum(gates is not None for gates in analysis.layers[0].by_class)
    which = f"{len(chosen)} of {present} classes, evenly spread over their numbers"
    handles, _ = axes[0, 0].get_legend_handles_labels()
    labels = [*(classes[k] for k in chosen), "all images, mean ± std"]
    top.legend(handles, labels, title=which, loc="outside lower center", ncols=6, frameon=False)
    top.supylabel("gate", fontsize="medium")
    some = f" ({len(shown)} of {len(analysis.layers)} layers)" if len(shown) < len(analysis.layers) else ""
    top.suptitle(title + some, fontweight="bold")
    _draw_depth(bottom, analysis)
    caption_below(bottom, _CAPTION, 140)
    figure.savefig(path, dpi=120)


def _spread(count: int, most: int) -> list[int]:
    """At most `most` numbers below `count`, evenly spread."""
    return np.unique(np.linspace(0, count - 1, most).round().astype(int)).tolist()


def _draw_layer(axis: Any, layer: LayerGates, classes: Sequence[int]) -> None:
    order = layer.channel_means.argsort()
    channels = np.arange(1, len(order) + 1)
    mean, std = layer.channel_means[order].numpy(), layer.channel_stds[order].numpy()
    for k, colour in zip(classes, COLOURS, strict=False):
        axis.plot(channels, layer.class_channel_means[k][order].numpy(), color=colour, linewidth=1, label=str(k))
    axis.fill_between(channels, mean - std, mean + std, color=GREY, alpha=0.25, linewidth=0, label="all")
    axis.set_title(layer.name, fontsize="small")
    axis.set_ylim(0, layer.limit)
    axis.set_xlim(1, len(order))
    axis.set_xticks([1, len(order)])
    axis.tick_params(labelsize="x-small")
    style(axis, grid="y")
    axis.set_xlabel("channel, by mean gate", fontsize="x-small", labelpad=-6)


def _draw_depth(figure: Any, analysis: Analysis) -> None:
    left, right = figure.subplots(1, 2, sharey=True)
    names = [layer.name for layer in analysis.layers]
    changes = [layer.ablation.change for layer in analysis.layers]
    rows = range(len(names))
    left.barh(rows, [100 * layer.class_share for layer in analysis.layers], color=COLOURS[0], height=0.7)
    left.set(xlabel="share of the gates' variance, %", xlim=(0, 100))
    left.set_title("How much the class explains", fontsize="medium")
    left.set_yticks(rows, names, fontsize="x-small")
    left.set_ylim(len(names) - 0.5, -0.5)
    values, bars = [100 * change.value for change in changes], [100 * change.half_width for change in changes]
    right.axvline(0, color=GREY, linewidth=1)
    right.errorbar(values, rows, xerr=bars, color=COLOURS[1], marker="o", markersize=4, linestyle="none", capsize=2)
    right.set_xlabel("change of the accuracy, percentage points")
    right.set_title(f"One layer's gates fixed, against {analysis.accuracy:.2%}", fontsize="medium")
    for axis in (left, right):
        style(axis, grid="x")
