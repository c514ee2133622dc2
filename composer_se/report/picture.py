"""Draws line plots as SVG. Text has the page's text colour, so that it is readable on light and dark pages."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.colors import LinearSegmentedColormap

from composer_se.show.pictures import COLOURS, new_figure, style

__all__ = ["Series", "line_plot"]

Series = tuple[Sequence[float], Sequence[float]]
"""The x and the y of the points of a line."""

_SHALLOW_TO_DEEP = LinearSegmentedColormap.from_list("depth", [COLOURS[0], COLOURS[3], COLOURS[1]])
_TEXT = "#010203"  # replaced by `currentColor`, the page's text colour
_MOST_POINTS = 300
_MOST_NAMES = 6


def line_plot(title: str, y_label: str, lines: Mapping[str, Series], *, by_depth: bool = False) -> str:
    """Draws lines over batches as an SVG element. Averages lines of more than 300 points down to 300.

    With `by_depth` the lines are layers, coloured from shallow to deep.
    """
    figure = new_figure(4.6, 2.9)
    axis = figure.subplots()
    for i, (label, (x, y)) in enumerate(lines.items()):
        colour = _SHALLOW_TO_DEEP(i / max(1, len(lines) - 1)) if by_depth else COLOURS[i % len(COLOURS)]
        marker = "o" if len(x) <= 30 and not by_depth else None
        axis.plot(*_thinned(x, y), label=label, color=colour, linewidth=1.4, marker=marker, markersize=3)
    axis.set_title(title, fontsize=11, color=_TEXT)
    axis.set_xlabel("batch", color=_TEXT)
    axis.set_ylabel(y_label, color=_TEXT)
    axis.tick_params(colors=_TEXT)
    style(axis)
    axis.spines[["left", "bottom"]].set_color(_TEXT)
    handles, labels = axis.get_legend_handles_labels()
    if len(labels) > _MOST_NAMES:
        # The first, the middle and the last name are enough to show the order of the colours.
        kept = sorted({0, len(labels) // 2, len(labels) - 1})
        handles, labels = [handles[i] for i in kept], [labels[i] for i in kept]
    if len(lines) > 1:
        # Below the plot, where it hides no line.
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, labelcolor=_TEXT, fontsize=8)
    buffer = io.StringIO()
    # A fixed salt makes ids reproducible: two plots share an id only for equal elements.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "composer-se", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :].replace(_TEXT, "currentColor")


def _thinned(x: Sequence[float], y: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    parts = [np.array_split(np.asarray(values, float), min(len(x), _MOST_POINTS)) for values in (x, y)]
    return np.array([part.mean() for part in parts[0]]), np.array([part.mean() for part in parts[1]])
