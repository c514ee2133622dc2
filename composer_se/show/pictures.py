"""The common style of all pictures."""

from __future__ import annotations

import math
from textwrap import fill
from typing import Any

from matplotlib.figure import Figure

__all__ = [
    "BLACK",
    "COLOURS",
    "GREY",
    "MARKERS",
    "caption_below",
    "legend_above",
    "new_figure",
    "style",
]

# Okabe and Ito's palette: colour-blind readers can distinguish its colours, on white and on dark pages.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
BLACK = "#000000"
GREY = "#555555"
MARKERS = "osD^vPX"


def new_figure(width: float, height: float) -> Figure:
    """An empty white figure, its size in inches. Its layout leaves space for the labels."""
    figure = Figure(figsize=(width, height), facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.1)
    return figure


def style(axis: Any, grid: str = "both") -> None:
    """Gives an axis a light grid behind its data, and no frame at the top and right."""
    axis.grid(axis=grid, color="#888888", alpha=0.28, linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def legend_above(figure: Any, axis: Any, title: str) -> None:
    """Puts a title above a figure, and below the title the legend of one axis."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        title=_literal(title),
        title_fontproperties={"weight": "bold", "size": "large"},
        loc="outside upper center",
        ncols=math.ceil(len(labels) / math.ceil(len(labels) / 5)),
        frameon=False,
    )


def caption_below(figure: Any, text: str, width: int) -> None:
    """Puts small print below a figure, in lines of at most `width` characters."""
    figure.supxlabel(fill(_literal(text), width), fontsize="small", ha="left", x=0.02, linespacing=1.4)


def _literal(text: str) -> str:
    """Escapes dollar signs, which start a formula in matplotlib."""
    return text.replace("$", r"\$")
