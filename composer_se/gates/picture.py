"""An analysis as one picture."""

from __future__ import annotations

import math
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np

from composer_se.recipe.trained import Trained

if TYPE_CHECKING:
    from composer_se.gates.analysis import Analysis, LayerGates

__all__ = ["draw", "pictured_classes"]

CAPTION = (
    "What to look for. Above: each panel is one layer, from shallow to deep, its channels sorted by their mean gate. "
    "Lines that lie together: the gates do the same whatever the class. Lines that part: they choose channels by "
    "class. A thin band with all lines on it: a fixed scale, which needs no block. Below left: the share of the gates' "
    "variance over images that the class explains; it usually grows with depth. Below right: the accuracy when the "
    "gates of one layer are fixed at their means, with two standard errors. A layer whose error bar reaches 0 or ends "
    "above it may do without its block: the mean gates can be multiplied into the conv."
)

# Five of Okabe and Ito's colours, which colour-blind readers tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
_MOST_PANELS = 20


def pictured_classes(analysis: Analysis) -> list[int]:
    """At most five classes with images, evenly spread over their numbers."""
    present = [k for k, gates in enumerate(analysis.layers[0].by_class) if gates is not None]
    return [present[i] for i in np.unique(np.linspace(0, len(present) - 1, len(_COLOURS)).round().astype(int))]


def draw(trained: Trained, analysis: Analysis, path: Path) -> None:
    """Draws the gates by class and layer, and the two summaries by depth.

    Args:
        trained: What was analysed.
        analysis: The analysis; of many layers, 20 evenly spread ones get a panel.
        path: The file; its ending names the format.
    """
    from matplotlib.figure import Figure

    chosen = np.unique(np.linspace(0, len(analysis.layers) - 1, _MOST_PANELS).round().astype(int))
    shown = [analysis.layers[i] for i in chosen]
    columns = math.ceil(math.sqrt(len(shown)))
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(9, 3.9 + 1.55 * rows), facecolor="white")
    figure.set_layout_engine("constrained")
    top, bottom = np.asarray(figure.subfigures(2, 1, height_ratios=(1.55 * rows + 0.7, 3.2)))
    classes = pictured_classes(analysis)
    axes = top.subplots(rows, columns, sharey=True, squeeze=False)
    for axis, layer in zip(axes.flat, shown, strict=False):
        _draw_layer(axis, layer, classes)
    for axis in axes.flat[len(shown) :]:
        axis.remove()
    names = [trained.classes[k] if trained.classes else f"class {k}" for k in classes]
    handles, _ = axes[0, 0].get_legend_handles_labels()
    top.legend(handles, [*names, "all images, mean ± std"], loc="outside lower center", ncols=6, frameon=False)
    top.supylabel("gate", fontsize="medium")
    some = f" ({len(shown)} of {len(analysis.layers)} layers)" if len(shown) < len(analysis.layers) else ""
    top.suptitle(
        f"Gates of {trained.name} on {analysis.num_images:,} images of {trained.data}{some}", fontweight="bold"
    )
    _draw_depth(bottom, analysis)
    figure.savefig(path, dpi=120)


def _draw_layer(axis: Any, layer: LayerGates, classes: list[int]) -> None:
    order = layer.channel_means.argsort()
    channels = np.arange(1, len(order) + 1)
    mean, std = layer.channel_means[order].numpy(), layer.channel_stds[order].numpy()
    for k, colour in zip(classes, _COLOURS, strict=False):
        axis.plot(channels, layer.class_channel_means[k][order].numpy(), color=colour, linewidth=1, label=str(k))
    axis.fill_between(channels, mean - std, mean + std, color="#999999", alpha=0.35, linewidth=0, label="all")
    axis.set_title(layer.name, fontsize="small")
    axis.set_ylim(0, 1)
    axis.set_xlim(1, len(order))
    axis.set_xticks([1, len(order)])
    axis.tick_params(labelsize="x-small")
    axis.grid(axis="y", color="#dddddd", linewidth=0.6)
    axis.set_xlabel("channel, by mean gate", fontsize="x-small", labelpad=-6)


def _draw_depth(figure: Any, analysis: Analysis) -> None:
    left, right = figure.subplots(1, 2)
    depth = range(1, len(analysis.layers) + 1)
    left.plot(
        depth, [100 * layer.class_share for layer in analysis.layers], color=_COLOURS[0], marker="o", markersize=4
    )
    left.set_title("Gate variance that the class explains", fontsize="medium")
    left.set_ylabel("share (%)")
    left.set_ylim(0, 100)
    right.bar(
        depth,
        [100 * layer.ablation.change for layer in analysis.layers],
        yerr=[200 * layer.ablation.standard_error for layer in analysis.layers],
        color=_COLOURS[1],
        ecolor="#333333",
        capsize=2,
    )
    right.axhline(0, color="#333333", linewidth=0.8)
    right.set_title(f"Accuracy with one layer's gates fixed, against {analysis.accuracy:.2%}", fontsize="medium")
    right.set_ylabel("change (percentage points)")
    for axis in (left, right):
        axis.set_xlabel("SE layer, shallow to deep")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(axis="y", color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(fill(CAPTION, 140), fontsize="small", ha="left", x=0.02, linespacing=1.4)
