"""Draws a study: the cost of each `min_channels`."""

from __future__ import annotations

from pathlib import Path

from composer_se.cost.study import Study
from composer_se.cost.tables import conditions
from composer_se.cost.variants import PLAIN, Variant
from composer_se.measure.uncertainty import Interval
from composer_se.show.pictures import COLOURS, GREY, caption_below, legend_above, new_figure, style

__all__ = ["draw"]

_STYLES = {
    "composer-se": {"label": "composer-se", "color": COLOURS[0], "marker": "o"},
    "composer": {"label": "Composer's built-in", "color": COLOURS[1], "marker": "s"},
}


_EXPLANATION = (
    "Across: min_channels, and below it the number of SE layers. Bars: what the run resolves, 95 %; bytes are exact. "
    "Measured with"
)


def draw(study: Study, path: Path) -> None:
    """Draws one panel for each kind of step and one for the bytes saved for backward, all on one scale."""
    variants = {code: study.of_code(code) for code in _STYLES if study.of_code(code)}
    panels = {
        f"{kind}, time": {code: [levels.ratio(v.name, PLAIN) for v in same] for code, same in variants.items()}
        for kind, levels in study.levels.items()
    }
    panels["saved for backward, bytes"] = {code: [_saved(study, v) for v in same] for code, same in variants.items()}
    settings = variants["composer-se"]
    rows = (len(panels) + 1) // 2
    figure = new_figure(8, 2 + 2.5 * rows)
    axes = figure.subplots(rows, 2, squeeze=False, sharey=True)
    for axis, (title, series) in zip(axes.flat, panels.items(), strict=False):
        axis.axhline(1, color=GREY, linewidth=1, label="plain network")
        for place, (code, ratios) in enumerate(series.items()):
            axis.errorbar(
                [x + 0.16 * (place - (len(series) - 1) / 2) for x in range(len(ratios))],
                [ratio.value for ratio in ratios],
                yerr=[[ratio.value - ratio.low for ratio in ratios], [ratio.high - ratio.value for ratio in ratios]],
                capsize=4,
                linewidth=1.4,
                linestyle="none",
                **_STYLES[code],
            )
        axis.set_title(title, fontsize="medium")
        axis.set_xticks(range(len(settings)), [f"{v.min_channels}\n({len(v.layers)} SE)" for v in settings])
        axis.set_xlim(-0.5, len(settings) - 0.5)
        style(axis, grid="y")
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis in axes[:, 0]:
        axis.set_ylabel("ratio to plain")
    legend_above(figure, axes.flat[0], f"What Squeeze-and-Excitation costs on {study.network}")
    caption_below(figure, f"{_EXPLANATION} {conditions(study)}; {study.machine}.", 125)
    figure.savefig(path, dpi=120)


def _saved(study: Study, variant: Variant) -> Interval:
    ratio = study.counts[variant.name].saved_bytes / study.counts[PLAIN].saved_bytes
    return Interval(ratio, ratio, ratio)
