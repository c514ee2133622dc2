"""The picture of a comparison: accuracy against epochs, training time and latency, and what the seeds decide."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from composer_se.compare.arms import Comparison
from composer_se.compare.judgement import Judgement
from composer_se.compare.run import Findings
from composer_se.show.pictures import BLACK, COLOURS, GREY, MARKERS, caption_below, legend_above, new_figure, style

__all__ = ["draw"]

_Style = dict[str, Any]
_ACCURACY = "held-out accuracy, %"


def draw(comparison: Comparison, findings: Findings, judgements: Sequence[Judgement], caption: str, path: Path) -> None:
    """Draws four panels: accuracy against epochs, time and latency, and the differences. The caption is below."""
    colours = (BLACK, *COLOURS)
    styles: dict[str, _Style] = {
        arm.name: {"color": colours[i % len(colours)], "marker": MARKERS[(i + i // len(MARKERS)) % len(MARKERS)]}
        for i, arm in enumerate(comparison.arms)
    }
    figure = new_figure(10, 8.4)
    (epochs, time), (latency, differences) = figure.subplots(2, 2)
    curves = {name: _curves(runs) for name, runs in findings.runs.items()}
    first = _first_worth_showing([accuracies for _, accuracies in curves.values()])
    later = f", from evaluation {first + 1} on" if first else ""
    _draw_curves(epochs, curves, first, styles, {n: 1 / s.batches_per_epoch for n, s in findings.speeds.items()})
    epochs.set(title=f"Accuracy against epochs{later}\n(bands: range of seeds)", xlabel="epochs", ylabel=_ACCURACY)
    epochs.xaxis.get_major_locator().set_params(integer=True)
    reference = comparison.reference.name
    seconds = {name: mean(speed.step) for name, speed in findings.speeds.items()}
    unit, length = _unit(max(run.batches for runs in findings.runs.values() for run in runs) * seconds[reference])
    _draw_curves(time, curves, first, styles, {name: value / length for name, value in seconds.items()})
    _draw_other_lengths(time, findings, reference, styles[reference], seconds[reference] / length)
    time.set(title="Accuracy against training time", xlabel=f"training time, {unit}", ylabel=_ACCURACY)
    _draw_latency(latency, findings, judgements, styles)
    _draw_differences(differences, judgements, styles)
    for axis in figure.axes:
        style(axis)
    legend_above(figure, epochs, f"{comparison.recipe}, seeds per arm: {len(judgements[0].accuracies)}")
    caption_below(figure, caption, 150)
    figure.savefig(path, dpi=120)


def _curves(runs: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """The steps at which every run was evaluated, and the accuracies there in percent, (runs, steps)."""
    steps = sorted(set.intersection(*({step for step, _ in run.accuracies} for run in runs)))
    return np.array(steps), 100 * np.array([[dict(run.accuracies)[step] for step in steps] for run in runs])


def _first_worth_showing(accuracies: Sequence[np.ndarray]) -> int:
    """The first evaluation to draw. Low accuracies at the start would hide the differences at the end.

    The later half of the evaluations is always drawn, and at least two if there are two.
    """
    finals = np.concatenate([of_arm[:, -1] for of_arm in accuracies])
    bottom = finals.max() - 4 * max(1.0, np.ptp(finals))
    shortest = min(of_arm.shape[1] for of_arm in accuracies)
    low = [first for first in range(shortest) if min(of_arm[:, first].min() for of_arm in accuracies) < bottom]
    return min(max(low, default=-1) + 1, (shortest - 1) // 2)


def _draw_curves(
    axis: Any,
    curves: Mapping[str, tuple[np.ndarray, np.ndarray]],
    first: int,
    styles: Mapping[str, _Style],
    scale: Mapping[str, float],
) -> None:
    """Draws the means over the seeds, with the range of the seeds as a band."""
    for name, (steps, accuracies) in curves.items():
        x, values = steps[first:] * scale[name], accuracies[:, first:]
        axis.plot(x, values.mean(0), label=name, markersize=4, linewidth=1.4, **styles[name])
        axis.fill_between(x, values.min(0), values.max(0), color=styles[name]["color"], alpha=0.12, linewidth=0)


def _draw_other_lengths(axis: Any, findings: Findings, reference: str, look: _Style, scale: float) -> None:
    """Draws the final accuracies of the reference, trained for as long as other arms take."""
    for batches in sorted({run.batches for run in findings.other_lengths}):
        values = [100 * run.accuracy for run in findings.other_lengths if run.batches == batches]
        _draw_point(axis, [batches * scale], values, look, hollow=True)
    if findings.other_lengths:
        label = f"{reference}, trained for the time of another arm"
        axis.legend([axis.containers[0]], [label], loc="best", frameon=False, fontsize="small")


def _draw_latency(axis: Any, findings: Findings, judgements: Sequence[Judgement], styles: Mapping[str, _Style]) -> None:
    for judged in judgements:
        latencies = [1e3 * seconds for seconds in findings.speeds[judged.arm].latency]
        _draw_point(axis, latencies, [100 * accuracy for accuracy in judged.accuracies], styles[judged.arm])
    axis.set(
        title="Accuracy against latency\n(bars: range of turns and seeds)",
        xlabel="inference of one image, milliseconds",
        ylabel=_ACCURACY,
    )
    axis.margins(0.15)


def _draw_point(axis: Any, x: Sequence[float], y: Sequence[float], look: _Style, hollow: bool = False) -> None:
    """Draws the mean of each coordinate, with its range as a bar."""
    bars = {
        key: [[mean(values) - min(values)], [max(values) - mean(values)]] for key, values in (("xerr", x), ("yerr", y))
    }
    fill = {"markerfacecolor": "white"} if hollow else {}
    axis.errorbar([mean(x)], [mean(y)], capsize=3, markersize=7, **bars, **fill, **look)


def _draw_differences(axis: Any, judgements: Sequence[Judgement], styles: Mapping[str, _Style]) -> None:
    """Draws the paired differences with their intervals. An interval that crosses the line does not decide."""
    axis.axvline(0, color=GREY, linewidth=1)
    others = [judged for judged in judgements if judged.equal_epochs is not None]
    for y, judged in enumerate(others):
        # At equal epochs: filled, above the arm's line. At equal time: hollow, below it.
        for shift, filled, difference in ((-0.16, True, judged.equal_epochs), (0.16, False, judged.equal_time)):
            assert difference is not None
            known = not math.isnan(difference.half_width)
            axis.errorbar(
                [100 * difference.value],
                [y + shift],
                xerr=100 * difference.half_width if known else None,
                capsize=4,
                markersize=7,
                markerfacecolor=None if filled else "white",
                **styles[judged.arm],
            )
    axis.set_yticks(range(len(others)), [judged.arm for judged in others], fontsize="small")
    axis.set_ylim(len(others) - 0.5, -0.5)
    reference = judgements[0].arm
    # Aligned right: a long title has room on the left, above the names of the arms.
    axis.set_title(f"Difference to {reference} (95 % interval)\nfilled: equal epochs, hollow: equal time", loc="right")
    axis.set_xlabel(f"percentage points; right of the line: better than {reference}", loc="right")


def _unit(seconds: float) -> tuple[str, float]:
    if seconds < 180:
        return "seconds", 1.0
    return ("minutes", 60.0) if seconds < 3 * 3600 else ("hours", 3600.0)
