"""The picture of a comparison: accuracy against epochs, training time and latency, and what the seeds decide."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from textwrap import fill
from typing import Any

import numpy as np

from composer_se.compare.arms import Comparison
from composer_se.compare.judgement import Judgement
from composer_se.compare.run import Findings

__all__ = ["draw"]

# Okabe and Ito's palette, which colour-blind readers tell apart; the markers differ as well.
_COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = "osD^vPX"
_Style = dict[str, Any]


def draw(comparison: Comparison, findings: Findings, judgements: Sequence[Judgement], caption: str, path: Path) -> None:
    """Draws four panels.

    Args:
        comparison: What was compared.
        findings: With one seed at least.
        judgements: Of every arm, in the same order.
        caption: Below the panels: the conditions.
        path: The file to write; its ending names the format.
    """
    from matplotlib.figure import Figure

    styles: dict[str, _Style] = {
        arm.name: {"color": _COLOURS[i % len(_COLOURS)], "marker": _MARKERS[(i + i // len(_MARKERS)) % len(_MARKERS)]}
        for i, arm in enumerate(comparison.arms)
    }
    figure = Figure(figsize=(10, 8.4), facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.1)
    (epochs, time), (latency, differences) = figure.subplots(2, 2)
    _draw_curves(epochs, findings, styles, {name: 1 / s.batches_per_epoch for name, s in findings.speeds.items()})
    epochs.set(title="Accuracy against epochs (bands: range of seeds)", xlabel="epochs", ylabel="held-out accuracy, %")
    epochs.xaxis.get_major_locator().set_params(integer=True)
    reference = findings.speeds[comparison.reference.name]
    unit, length = _unit(max(run.batches for runs in findings.runs.values() for run in runs) * mean(reference.step))
    _draw_curves(time, findings, styles, {name: mean(s.step) / length for name, s in findings.speeds.items()})
    label = f"{comparison.reference.name}, trained for the time of another arm"
    _draw_other_lengths(time, findings, label, styles[comparison.reference.name], mean(reference.step) / length)
    time.set(title="Accuracy against training time", xlabel=f"training time, {unit}", ylabel="held-out accuracy, %")
    _draw_latency(latency, findings, judgements, styles)
    _draw_differences(differences, judgements, styles)
    for axis in figure.axes:
        axis.grid(color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = epochs.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        title=f"{_literal(comparison.recipe)}, seeds per arm: {len(judgements[0].accuracies)}",
        title_fontproperties={"weight": "bold"},
        loc="outside upper center",
        ncols=math.ceil(len(labels) / math.ceil(len(labels) / 5)),
        frameon=False,
    )
    figure.supxlabel(fill(_literal(caption), 125), fontsize="small")
    figure.savefig(path, dpi=120)


def _draw_curves(axis: Any, findings: Findings, styles: dict[str, _Style], scale: dict[str, float]) -> None:
    """Means over the seeds, with the range of the seeds as a band; in detail from where all arms have learnt most."""
    for name, runs in findings.runs.items():
        steps = sorted(set.intersection(*({step for step, _ in run.accuracies} for run in runs)))
        values = 100 * np.array([[dict(run.accuracies)[step] for step in steps] for run in runs])
        x = np.array(steps) * scale[name]
        axis.plot(x, values.mean(0), label=name, markersize=4, linewidth=1.4, **styles[name])
        axis.fill_between(x, values.min(0), values.max(0), color=styles[name]["color"], alpha=0.12, linewidth=0)
    finals = [100 * run.accuracy for runs in findings.runs.values() for run in runs]
    seen = [100 * a for runs in findings.runs.values() for run in runs for _, a in run.accuracies]
    # The last part of the curves is what is compared; the first epochs would flatten it to a line.
    bottom = max(min(seen) - 0.5, max(finals) - 4 * max(1.0, max(finals) - min(finals)))
    axis.set_ylim(bottom, max(seen) + 0.1 * (max(seen) - bottom) + 0.1)


def _draw_other_lengths(axis: Any, findings: Findings, label: str, style: _Style, scale: float) -> None:
    """The reference's ends when trained for the time of other arms."""
    lengths = sorted({run.batches for run in findings.other_lengths})
    for batches in lengths:
        values = [100 * run.accuracy for run in findings.other_lengths if run.batches == batches]
        spread = [[mean(values) - min(values)], [max(values) - mean(values)]]
        axis.errorbar([batches * scale], [mean(values)], yerr=spread, capsize=3, mfc="white", markersize=7, **style)
    if lengths:
        axis.legend([axis.containers[0]], [label], loc="upper left", frameon=False, fontsize="small")


def _draw_latency(axis: Any, findings: Findings, judgements: Sequence[Judgement], styles: dict[str, _Style]) -> None:
    for judged in judgements:
        latencies = [1e3 * seconds for seconds in findings.speeds[judged.arm].latency]
        accuracies = [100 * accuracy for accuracy in judged.accuracies]
        x, y = mean(latencies), mean(accuracies)
        axis.errorbar(
            [x],
            [y],
            xerr=[[x - min(latencies)], [max(latencies) - x]],
            yerr=[[y - min(accuracies)], [max(accuracies) - y]],
            capsize=3,
            markersize=7,
            **styles[judged.arm],
        )
    axis.set(
        title="Accuracy against latency (bars: range of turns and seeds)",
        xlabel="inference of one image, milliseconds",
        ylabel="held-out accuracy, %",
    )
    axis.margins(0.15)


def _draw_differences(axis: Any, judgements: Sequence[Judgement], styles: dict[str, _Style]) -> None:
    """The paired differences with their intervals; what crosses the line is not decided."""
    axis.axvline(0, color="#555555", linewidth=1)
    others = [judged for judged in judgements if judged.equal_epochs is not None]
    for y, judged in enumerate(others):
        # Seen from the arm's own line: above it at equal epochs, filled; below it at equal time, hollow.
        for shift, filled, difference in ((-0.16, True, judged.equal_epochs), (0.16, False, judged.equal_time)):
            assert difference is not None
            known = not math.isnan(difference.half_width)
            error = [[100 * (difference.value - difference.low)], [100 * (difference.high - difference.value)]]
            axis.errorbar(
                [100 * difference.value],
                [y + shift],
                xerr=error if known else None,
                capsize=4,
                markersize=7,
                markerfacecolor=None if filled else "white",
                **styles[judged.arm],
            )
    axis.set_yticks(range(len(others)), [judged.arm for judged in others], fontsize="small")
    axis.set_ylim(len(others) - 0.5, -0.5)
    reference = judgements[0].arm
    # The names of the arms take room on the left: there is some for long words there, and none on the right.
    axis.set_title(f"Difference to {reference} (95 % interval)\nfilled: equal epochs, hollow: equal time", loc="right")
    axis.set_xlabel(f"percentage points; right of the line: better than {reference}", loc="right")


def _unit(seconds: float) -> tuple[str, float]:
    if seconds < 180:
        return "seconds", 1.0
    return ("minutes", 60.0) if seconds < 3 * 3600 else ("hours", 3600.0)


def _literal(text: str) -> str:
    """Keeps matplotlib from reading mathematics between dollar signs."""
    return text.replace("$", r"\$")
