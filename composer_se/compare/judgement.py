"""Compares each arm with the reference, in numbers and in a sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, variance

from composer_se.compare.arms import Comparison
from composer_se.compare.outcomes import Outcome, accuracy_after
from composer_se.compare.run import Findings
from composer_se.measure.uncertainty import Interval, mean_difference, pairs_needed, ratio_of_means, students_t

__all__ = ["Judgement", "judge", "judge_pilot", "seeds_needed"]


@dataclass(frozen=True)
class Judgement:
    """An arm compared with the reference. Accuracies and differences are shares; times are ratios to the reference."""

    arm: str
    accuracies: tuple[float, ...]  # at the end, per seed
    equal_epochs: Interval | None  # its accuracy minus the reference's; None for the reference
    equal_time: Interval | None  # the same, with the reference trained for as long as this arm
    # The most accurate of the other arms that are not shown to be slower in inference, and the difference from it.
    beside_best_no_slower: tuple[str, Interval] | None
    step_time: Interval
    latency: Interval
    parameters: int
    se_layers: int
    sentence: str  # what the seeds show, in words


def judge(comparison: Comparison, findings: Findings) -> list[Judgement]:
    """Judges every arm on the seeds that all arms have finished, the reference first."""
    return [_judge(arm.name, comparison, findings) for arm in comparison.arms]


def _judge(arm: str, comparison: Comparison, findings: Findings) -> Judgement:
    reference = comparison.reference.name
    speed, base = findings.speeds[arm], findings.speeds[reference]
    runs, ours = findings.runs[arm], findings.accuracies(arm)
    equal_epochs = equal_time = None
    sentence = "what the others are compared with."
    if arm != reference:
        equal_epochs = mean_difference(ours, findings.accuracies(reference))
        equal_time = mean_difference(ours, _reference_at_time_of(arm, reference, findings))
        sentence = _sentence(equal_epochs, equal_time, reference, len(runs))
    return Judgement(
        arm=arm,
        accuracies=tuple(ours),
        equal_epochs=equal_epochs,
        equal_time=equal_time,
        beside_best_no_slower=_beside_best_no_slower(arm, comparison, findings),
        step_time=ratio_of_means(speed.step, base.step),
        latency=ratio_of_means(speed.latency, base.latency),
        parameters=runs[0].parameters,
        se_layers=runs[0].se_layers,
        sentence=sentence,
    )


def _reference_at_time_of(arm: str, reference: str, findings: Findings) -> list[float]:
    """The reference's accuracy per seed if it is trained for as long as the arm."""
    seconds = findings.training_seconds(arm)
    seconds_per_step = mean(findings.speeds[reference].step)
    lengths = [
        [own, *(run for run in findings.other_lengths if run.seed == own.seed)] for own in findings.runs[reference]
    ]
    return [accuracy_after(seconds, runs, seconds_per_step) for runs in lengths]


def _beside_best_no_slower(arm: str, comparison: Comparison, findings: Findings) -> tuple[str, Interval] | None:
    def is_slower(other: str) -> bool:
        return ratio_of_means(findings.speeds[other].latency, findings.speeds[arm].latency).low > 1

    rivals = [other.name for other in comparison.arms if other.name != arm and not is_slower(other.name)]
    if not rivals:
        return None
    rival = max(rivals, key=lambda name: mean(findings.accuracies(name)))
    return rival, mean_difference(findings.accuracies(arm), findings.accuracies(rival))


def _sentence(equal_epochs: Interval, equal_time: Interval, reference: str, seeds: int) -> str:
    epochs, time = _verdict(equal_epochs, reference), _verdict(equal_time, reference)
    advice = _advice({"at equal epochs": equal_epochs, "at equal training time": equal_time}, seeds)
    if epochs == time:
        return f"{epochs}, at equal epochs as at equal training time.{advice}"
    return f"{epochs} at equal epochs; {time} at equal training time.{advice}"


def _verdict(difference: Interval, reference: str) -> str:
    if math.isnan(difference.half_width):
        return "one seed decides nothing"
    if _is_shown(difference):
        return f"{'more' if difference.value > 0 else 'less'} accurate than {reference}"
    return "the evidence does not decide"


def _is_shown(difference: Interval) -> bool:
    """True if the seeds show a difference.

    Equal differences in all seeds do not show one: accuracies count whole images, so that two seeds of two equal arms
    can differ by the same number of images by chance.
    """
    return difference.excludes(0) and not _is_tie(difference)


def _is_tie(difference: Interval) -> bool:
    """True if the difference is the same in all seeds, up to rounding."""
    return difference.half_width < 1e-9


def _advice(differences: Mapping[str, Interval], seeds: int) -> str:
    """Says how many seeds would give a 50 % chance to detect each difference that the seeds do not show."""
    needed = []
    for where, difference in differences.items():
        if not math.isnan(difference.half_width) and not _is_shown(difference):
            needed.append(f"{_about(seeds_needed(difference, seeds))} seeds {where}")
    if not needed:
        return ""
    seeds_wanted = " and ".join(needed)
    return f" {seeds_wanted[0].upper()}{seeds_wanted[1:]} would give a 50 % chance to detect a difference this small."


def _about(seeds: int | None) -> str:
    return "over 10,000" if seeds is None else f"about {seeds:,}"


def seeds_needed(difference: Interval, seeds: int) -> int | None:
    """Estimates how many seeds would give a 50 % chance to detect a difference as small as this one.

    Returns:
        The number of seeds at which half the interval is about as wide as the difference. `seeds + 1` if all seeds
        agree. None if the number is over 10,000, the spread is unknown or the difference is zero.
    """
    if math.isnan(difference.half_width) or difference.value == 0:
        return None
    if _is_tie(difference):
        return seeds + 1
    deviation = difference.half_width / students_t(seeds - 1) * math.sqrt(seeds)
    return pairs_needed(difference.value, deviation, chance=0.5)


def judge_pilot(runs: Mapping[str, Sequence[Outcome]], reference: str, difference: float) -> str:
    """Says how many seeds would show a difference, from a few runs of every arm.

    Averages the variances of all arms' differences from the reference, since so few seeds can't show that one arm
    scatters more than another.

    Args:
        runs: The runs of every arm, with the same two or more seeds.
        reference: The arm that the others are compared with.
        difference: The difference to detect, as a share of the images.
    """
    theirs = [run.accuracy for run in runs[reference]]
    variances = [
        variance([run.accuracy - other for run, other in zip(runs[arm], theirs, strict=True)])
        for arm in runs
        if arm != reference
    ]
    deviation = math.sqrt(mean(variances))
    even, likely = (pairs_needed(difference, deviation, chance) for chance in (0.5, 0.8))
    seeds = ", ".join(str(run.seed) for run in runs[reference])
    minutes = sum(mean(run.wall_seconds for run in of_arm) for of_arm in runs.values()) / 60
    return (
        f"Pilot seeds {seeds}: differences to {reference} scatter by {100 * deviation:.2f} points from seed to seed. "
        f"{_about(even).capitalize()} seeds would give a 50 % chance to detect a difference of "
        f"{100 * difference:g} points, {_about(likely)} an 80 % chance. Each takes {minutes:.0f} minutes, and the "
        "reference again at equal training time."
    )
