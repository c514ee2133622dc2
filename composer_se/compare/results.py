"""A comparison as a table for the terminal, as Markdown and as JSON."""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Sequence
from statistics import mean, stdev

from rich.console import Console

from composer_se.compare.arms import Comparison
from composer_se.compare.judgement import Judgement
from composer_se.compare.run import Findings
from composer_se.measure.uncertainty import Interval, ratio_of_means
from composer_se.show.terminal import new_table
from composer_se.show.text import markdown_table, plural, to_json

__all__ = ["as_json", "as_markdown", "command", "conditions", "print_judgements", "print_speeds"]

_HEADS = ("arm", "accuracy, %", "at equal epochs", "at equal time", "step time", "latency")
_EXPLANATION = (
    "Accuracy on the held-out images after the last step: mean ± standard deviation over seeds. Differences to the "
    "first arm: percentage points, paired by seed, with 95 % confidence intervals. At equal time, the first arm is "
    "trained once more for as long as the slowest arm takes, and for as short as the fastest; between these its "
    "accuracy is interpolated. Times are ratios to the first arm, measured in turns; ± is half the 95 % interval."
)
_SMALL_PRINT = (
    "Intervals at equal time leave out the uncertainty of the times. Each interval is for one comparison; one "
    "in twenty misses the truth by chance."
)


def print_judgements(comparison: Comparison, judgements: Sequence[Judgement], console: Console) -> None:
    """Prints the table, which fits 80 columns, and a sentence on each arm."""
    seeds = len(judgements[0].accuracies)
    title = f"{comparison.recipe}: {plural(seeds, 'seed')} per arm"
    heads = [head.replace(" ", "\n", 1) for head in _HEADS[1:]]
    table = new_table(title, _EXPLANATION, _HEADS[0], heads, side=0)
    for judged in judgements:
        table.add_row(*_cells(judged, "\n"))
    console.print(table)
    for line in _sentences(judgements):
        console.print(line, highlight=False)


def print_speeds(comparison: Comparison, findings: Findings, console: Console) -> None:
    """Prints how fast the arms train and infer, for a comparison of 0 seeds."""
    caption = f"Ratios to the first arm, measured in turns, with their 95 % interval. {_where(findings)}."
    heads = ("ms per step", "ratio", "ms per image", "ratio")
    table = new_table(f"{comparison.recipe}: speed", caption, "arm", heads)
    reference = findings.speeds[comparison.reference.name]
    for arm in comparison.arms:
        speed = findings.speeds[arm.name]
        cells = []
        for ours, theirs in ((speed.step, reference.step), (speed.latency, reference.latency)):
            ratio = "1" if speed is reference else ratio_of_means(ours, theirs).with_spread()
            cells += [f"{1e3 * mean(ours):.4g}", ratio]
        table.add_row(arm.name, *cells)
    console.print(table)


def as_markdown(comparison: Comparison, findings: Findings, judgements: Sequence[Judgement]) -> str:
    """The report: table, sentences, picture, conditions, command, and the final accuracy of every run."""
    lines = [f"# {comparison.recipe}: {' / '.join(arm.name for arm in comparison.arms)}", ""]
    rows = [[*_cells(j, " "), str(j.se_layers or "–"), f"{j.parameters:,}"] for j in judgements]
    lines += markdown_table([*_HEADS, "SE layers", "parameters"], rows)
    lines += ["", f"{_EXPLANATION} {_SMALL_PRINT}", ""]
    lines += [f"- {line}" for line in _sentences(judgements)]
    lines += ["", "![Accuracy against epochs, training time and latency, and paired differences](comparison.png)", ""]
    lines += [conditions(comparison, findings), "", "```", command(comparison, findings.processes), "```", ""]
    runs = [run for arm in comparison.arms for run in findings.runs[arm.name]] + findings.other_lengths
    rows = [(r.run, str(r.batches), f"{100 * r.accuracy:.2f}", f"{r.wall_seconds:.0f}") for r in runs]
    lines += ["## Every run", "", *markdown_table(("run", "steps", "final accuracy, %", "wall time, s"), rows)]
    return "\n".join(lines) + "\n"


def as_json(comparison: Comparison, findings: Findings, judgements: Sequence[Judgement]) -> str:
    """The comparison, its raw findings and its judgements."""
    question, found = dataclasses.asdict(comparison), dataclasses.asdict(findings)
    return to_json(
        {key: question[key] for key in ("recipe", "overrides", "arms")}
        | {"command": command(comparison, findings.processes)}
        | {key: found[key] for key in ("processes", "machine", "speeds", "runs", "other_lengths")}
        | {"judgements": [dataclasses.asdict(judged) for judged in judgements]}
    )


def command(comparison: Comparison, processes: int) -> str:
    """The command that repeats the comparison."""
    words = ["composer", "-n", str(processes), "-m", "composer_se.cli"] if processes > 1 else ["composer-se"]
    words += ["compare", comparison.recipe, *comparison.overrides, "--seeds", str(comparison.num_seeds)]
    words += ["--out", str(comparison.folder)]
    for arm in comparison.arms:
        words += ["--arm", arm.name, *arm.overrides]
    return shlex.join(words)


def conditions(comparison: Comparison, findings: Findings) -> str:
    """Names the recipe, the seeds, the machine and the reference's speed."""
    reference = comparison.reference.name
    run, speed = findings.runs[reference][0], findings.speeds[reference]
    seeds = ", ".join(str(run.seed) for run in findings.runs[reference])
    overrides = f" with {', '.join(comparison.overrides)}" if comparison.overrides else ""
    epochs = run.batches / speed.batches_per_epoch
    return (
        f"Recipe {comparison.recipe}{overrides}; {epochs:g} {'epoch' if epochs == 1 else 'epochs'}, seeds {seeds}. "
        f"Speeds measured in {len(speed.step)} turns: {reference} takes "
        f"{1e3 * mean(speed.step):.3g} ms per step and {1e3 * mean(speed.latency):.3g} ms per image. "
        f"{_where(findings)}."
    )


def _where(findings: Findings) -> str:
    return f"{findings.processes} processes, {findings.machine}" if findings.processes > 1 else str(findings.machine)


def _cells(judged: Judgement, separator: str) -> list[str]:
    accuracies = [100 * accuracy for accuracy in judged.accuracies]
    spread = f"{separator}±{stdev(accuracies):.2f}" if len(accuracies) > 1 else ""
    return [
        judged.arm,
        f"{mean(accuracies):.2f}{spread}",
        _difference(judged.equal_epochs, separator),
        _difference(judged.equal_time, separator),
        judged.step_time.with_spread(separator) if judged.equal_epochs else "1",
        judged.latency.with_spread(separator) if judged.equal_epochs else "1",
    ]


def _sentences(judgements: Sequence[Judgement]) -> list[str]:
    lines = []
    for judged in judgements:
        if judged.equal_epochs is None:
            continue
        lines.append(f"{judged.arm}: {judged.sentence}")
        if judged.beside_best_no_slower is not None:
            rival, difference = judged.beside_best_no_slower
            lines.append(
                f"{judged.arm} beside {rival}, the most accurate of the arms not shown to be slower in inference: "
                f"{_difference(difference, ' ')} points."
            )
    return lines


def _difference(difference: Interval | None, separator: str) -> str:
    if difference is None:
        return "–"
    value = f"{100 * difference.value:+.2f}"
    if math.isnan(difference.half_width):
        return value
    return f"{value}{separator}[{100 * difference.low:+.2f}, {100 * difference.high:+.2f}]"
