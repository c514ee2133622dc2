"""The plot of a study: cost against `min_channels`, the choice that the user has to make."""

from __future__ import annotations

from pathlib import Path
from textwrap import fill

from composer_se.cost.study import Study
from composer_se.cost.variants import PLAIN
from composer_se.measure.uncertainty import Interval

__all__ = ["draw", "picture_formats"]

# Blue and vermillion of Okabe and Ito's palette, which colour-blind readers tell apart; the markers differ as well.
_STYLES = {
    "composer-se": {"label": "composer-se", "color": "#0072B2", "marker": "o", "linestyle": "-"},
    "composer": {"label": "Composer's built-in", "color": "#D55E00", "marker": "s", "linestyle": "--"},
}


def picture_formats() -> set[str]:
    """The file name endings that a plot can be written with, without the dot."""
    from matplotlib.backend_bases import FigureCanvasBase

    return set(FigureCanvasBase.get_supported_filetypes())


def draw(study: Study, path: Path) -> None:
    """Draws one panel for each kind of step and one for the bytes saved for backward.

    Args:
        study: The study.
        path: The file to write; its ending names the format.
    """
    from matplotlib.figure import Figure

    panels: dict[str, dict[str, list[Interval]]] = {
        f"{kind}, time": {code: _times(study, kind, code) for code in _codes(study)} for kind in study.seconds
    }
    panels["saved for backward, bytes"] = {code: _saved(study, code) for code in _codes(study)}
    rows = (len(panels) + 1) // 2
    figure = Figure(figsize=(8, 1.6 + 2.5 * rows), facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.08)
    axes = figure.subplots(rows, 2, squeeze=False).flat
    settings = [v for v in study.variants if v.code == "composer-se"]
    for axis, (title, series) in zip(axes, panels.items(), strict=False):
        axis.axhline(1, color="#555555", linewidth=1)
        axis.annotate("plain", (1, 1), (-3, 2), ("axes fraction", "data"), "offset points", ha="right", va="bottom")
        for shift, (code, ratios) in zip((-0.06, 0.06), series.items(), strict=False):
            axis.errorbar(
                [x + (shift if len(series) > 1 else 0) for x in range(len(ratios))],
                [ratio.value for ratio in ratios],
                yerr=[[r.value - r.low for r in ratios], [r.high - r.value for r in ratios]],
                capsize=3,
                linewidth=1.2,
                markersize=5,
                **_STYLES[code],
            )
        axis.set_title(title, fontsize="medium")
        axis.set_ylabel("ratio to the plain network")
        axis.set_xticks(range(len(settings)), [f"{v.min_channels}\n({len(v.layers)} SE)" for v in settings])
        axis.set_xlim(-0.5, len(settings) - 0.5)
        axis.margins(y=0.15)
        axis.grid(axis="y", color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in list(figure.axes)[len(panels) :]:
        axis.remove()
    figure.suptitle(f"What Squeeze-and-Excitation costs on {study.network}", fontweight="bold")
    figure.supxlabel(_caption(study), fontsize="small")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.axes[-1].legend(handles, labels, frameon=False, loc="best")
    figure.savefig(path, dpi=150)


def _codes(study: Study) -> list[str]:
    return [code for code in _STYLES if any(v.code == code for v in study.variants)]


def _times(study: Study, kind: str, code: str) -> list[Interval]:
    return [study.ratio(kind, v.name) for v in study.variants if v.code == code]


def _saved(study: Study, code: str) -> list[Interval]:
    plain = study.counts[PLAIN].saved_bytes
    values = [study.counts[v.name].saved_bytes / plain for v in study.variants if v.code == code]
    return [Interval(value, value, value) for value in values]


def _caption(study: Study) -> str:
    settings = study.settings
    options = ", ".join(f"{key} {value}" for key, value in settings.squeeze_excite.items())
    where = study.machine.gpu or f"{study.machine.cpu}, {study.machine.threads} threads"
    text = (
        f"Batch {settings.batch_size} at {settings.image_size}² pixels, {settings.precision}, {where}, "
        f"torch {study.machine.torch}; {options}. Error bars: the run's resolution, 95 %; bytes are exact."
    )
    return "min_channels (number of SE layers)\n\n" + fill(text, 100)
