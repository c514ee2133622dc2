"""What a comparison makes of its runs: pairing, intervals, equal time, equal latency, and the words for them."""

from __future__ import annotations

import math
import re
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from composer_se.compare.arms import Arm, Comparison
from composer_se.compare.judgement import _is_shown, judge, judge_pilot, seeds_needed
from composer_se.compare.kept_speeds import _add
from composer_se.compare.outcomes import Outcome, accuracy_after
from composer_se.compare.picture import draw
from composer_se.compare.results import as_json, as_markdown, print_judgements
from composer_se.compare.run import Findings, other_lengths
from composer_se.compare.speed import Speed, Turn
from composer_se.measure.machine import Machine
from composer_se.measure.uncertainty import Interval, mean_difference, ratio_of_means

MACHINE = Machine("a processor", 2, 2, None, "2.7.0", "Linux", 0.0)


def outcome(seed: int, accuracy: float, batches: int = 100) -> Outcome:
    curve = ((batches // 2, accuracy - 0.1), (batches, accuracy))
    return Outcome(f"run-{batches}-seed{seed}", seed, batches, curve, 10.0, 1000, 0)


def findings_of(
    accuracies: dict[str, list[float]], steps: dict[str, float], latencies: dict[str, float] | None = None
) -> tuple[Comparison, Findings]:
    arms = tuple(Arm(name, ()) for name in accuracies)
    seeds = len(next(iter(accuracies.values())))
    findings = Findings(
        machine=MACHINE,
        speeds={
            name: Speed(
                tuple(step * wobble for wobble in (0.999, 1.0, 1.001)),
                tuple((latencies or steps)[name] * wobble for wobble in (1.001, 1.0, 0.999)),
                50,
            )
            for name, step in steps.items()
        },
        runs={name: [outcome(17 + i, value) for i, value in enumerate(values)] for name, values in accuracies.items()},
    )
    return Comparison("a_recipe", (), arms, seeds, Path("folder")), findings


def test_difference_is_paired_by_seed_with_students_interval() -> None:
    ours, theirs = [0.90, 0.92, 0.95, 0.91], [0.89, 0.90, 0.94, 0.91]
    expected = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    difference = mean_difference(ours, theirs)
    assert difference.value == pytest.approx(np.mean(ours) - np.mean(theirs))
    assert (difference.low, difference.high) == pytest.approx((expected.low, expected.high))


def test_ratio_of_times_takes_out_what_a_turn_has_in_common() -> None:
    drift = np.array([1.0, 1.5, 0.8, 2.0, 1.2])
    ratio = ratio_of_means(list(1.1 * drift), list(drift))
    assert ratio.value == pytest.approx(1.1)
    assert ratio.half_width == pytest.approx(0, abs=1e-12)


def test_interval_of_a_ratio_covers_the_truth_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        base = 0.08 * generator.normal(1.0, 0.05, 8)  # seconds
        ratio = ratio_of_means(list(base * generator.normal(1.2, 0.03, 8)), list(base))
        covered += ratio.low <= 1.2 <= ratio.high
    assert 0.90 <= covered / 400 <= 0.99


def test_one_seed_has_no_interval_and_decides_nothing() -> None:
    difference = mean_difference([0.9], [0.8])
    assert math.isnan(difference.low)
    assert not difference.excludes(0)
    comparison, findings = findings_of({"plain": [0.8], "se": [0.9]}, {"plain": 1.0, "se": 1.0})
    assert "one seed decides nothing" in judge(comparison, findings)[1].sentence


def test_seeds_that_agree_to_the_image_decide_nothing() -> None:
    ours, theirs = [356 / 360, 355 / 360], [355 / 360, 354 / 360]
    difference = mean_difference(ours, theirs)
    assert not _is_shown(difference)
    assert seeds_needed(difference, 2) == 3
    comparison, findings = findings_of({"plain": theirs, "se": ours}, {"plain": 1.0, "se": 1.0})
    assert "the evidence does not decide" in judge(comparison, findings)[1].sentence


def test_seeds_needed_is_the_number_whose_interval_is_as_wide_as_the_difference() -> None:
    ours, theirs = [0.90, 0.91, 0.92, 0.90, 0.91], [0.90, 0.90, 0.91, 0.91, 0.90]
    needed = seeds_needed(mean_difference(ours, theirs), 5)
    deviation = np.std(np.subtract(ours, theirs), ddof=1)
    assert needed is not None
    half = [stats.t.ppf(0.975, n - 1) * deviation / math.sqrt(n) for n in (needed - 1, needed)]
    assert half[1] <= np.mean(ours) - np.mean(theirs) < half[0]
    assert seeds_needed(Interval(0.0, -1.0, 1.0), 5) is None


def test_a_pilot_whose_seeds_scatter_too_much_says_that_no_number_is_affordable() -> None:
    runs = {"plain": [outcome(1017, 0.5), outcome(1018, 0.9)], "se": [outcome(1017, 0.9), outcome(1018, 0.5)]}
    said = judge_pilot(runs, "plain", 1e-5)
    assert "Over 10,000 seeds would give a 50 % chance" in said
    assert "over 10,000 an 80 % chance" in said
    assert "scatter by 56.57 points" in said


def test_the_table_of_arms_that_differ_widely_fits_80_columns_and_breaks_no_word(capsys) -> None:
    comparison, findings = findings_of(
        {"plain": [0.9, 0.7], "everything, SE": [0.5, 0.2]}, {"plain": 1.0, "everything, SE": 12.0}
    )
    print_judgements(comparison, judge(comparison, findings), Console(width=80))
    assert re.search(r"^ everything, +35\.00 +-45\.00 +-45\.00", capsys.readouterr().out, re.MULTILINE)


def test_accuracy_at_a_training_time_is_interpolated_between_the_ends_of_complete_runs() -> None:
    runs = [outcome(17, 0.90, batches=100), outcome(17, 0.92, batches=200)]
    assert accuracy_after(20.0 * 2**0.25, runs, seconds_per_step=0.2) == pytest.approx(0.905)
    assert accuracy_after(500.0, runs, seconds_per_step=0.2) == pytest.approx(0.92)


def test_reference_is_trained_for_the_time_of_the_slowest_and_the_fastest_arm() -> None:
    comparison, findings = findings_of(
        {"plain": [0.9], "slow": [0.9], "slower": [0.9], "fast": [0.9], "same": [0.9]},
        {"plain": 1.0, "slow": 1.2, "slower": 1.5, "fast": 0.8, "same": 1.003},
    )
    assert other_lengths(comparison, findings) == [80, 150]
    comparison, findings = findings_of({"plain": [0.9], "same": [0.9]}, {"plain": 1.0, "same": 1.003})
    assert other_lengths(comparison, findings) == []


def test_equal_time_compares_with_the_reference_trained_for_as_long() -> None:
    comparison, findings = findings_of(
        {"plain": [0.90, 0.91, 0.90], "se": [0.92, 0.93, 0.93]}, {"plain": 1.0, "se": 1.5}
    )
    findings.other_lengths = [outcome(17 + i, accuracy, 150) for i, accuracy in enumerate((0.93, 0.94, 0.92))]
    judged = judge(comparison, findings)[1]
    assert judged.equal_epochs is not None
    assert judged.equal_time is not None
    assert judged.equal_epochs.value == pytest.approx(0.07 / 3)
    assert judged.equal_time.value == pytest.approx(-0.01 / 3)
    assert judged.step_time.value == pytest.approx(1.5)
    assert judged.sentence.startswith("more accurate than plain at equal epochs; the evidence does not decide at equal")
    assert "seeds at equal training time would give a 50 % chance to detect a difference this small." in judged.sentence
    assert "seeds at equal epochs" not in judged.sentence


def test_an_arm_stands_beside_the_most_accurate_one_that_is_no_slower() -> None:
    comparison, findings = findings_of(
        {"plain": [0.90, 0.90], "deep": [0.94, 0.94], "se": [0.92, 0.92]},
        {"plain": 1.0, "deep": 1.0, "se": 1.0},
        {"plain": 1.0, "deep": 3.0, "se": 1.2},
    )
    plain, deep, se = judge(comparison, findings)
    assert plain.beside_best_no_slower is None
    assert deep.beside_best_no_slower is not None
    assert deep.beside_best_no_slower[0] == "se"
    assert se.beside_best_no_slower is not None
    assert se.beside_best_no_slower[0] == "plain"
    assert se.beside_best_no_slower[1].value == pytest.approx(0.02)


@pytest.mark.parametrize("seeds", [1, 3])
def test_report_picture_and_data_hold_every_arm(seeds: int, tmp_path: Path) -> None:
    import json

    comparison, findings = findings_of(
        {"plain": [0.9, 0.91, 0.9][:seeds], "with SE": [0.92, 0.91, 0.93][:seeds]}, {"plain": 1.0, "with SE": 1.2}
    )
    findings.other_lengths = [outcome(17 + i, 0.91, 120) for i in range(seeds)]
    judgements = judge(comparison, findings)
    report = as_markdown(comparison, findings, judgements)
    assert "| with SE |" in report
    assert "run-120-seed17" in report
    found = json.loads(as_json(comparison, findings, judgements))
    assert len(found["runs"]["with SE"]) == seeds
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        draw(comparison, findings, judgements, "costs $5 or $6", tmp_path / "picture.svg")
    picture = (tmp_path / "picture.svg").read_text()
    for text in ("plain", "with SE", "trained for the time of another arm", "costs $5 or $6", "Difference to plain"):
        assert text in picture


def test_speed_of_a_later_arm_is_as_of_the_time_when_the_reference_was_measured() -> None:
    entries = {
        "plain": {"speed": {"step": [1.0, 1.2], "latency": [0.1, 0.1], "batches_per_epoch": 50}},
        "later": {"speed": {"step": [], "latency": [], "batches_per_epoch": 0}},
    }
    _add({"plain": Turn(2.0, 0.2, 50), "later": Turn(2.4, 0.3, 50)}, "plain", entries, 0)
    _add({"plain": Turn(1.2, 0.1, 50), "later": Turn(1.44, 0.15, 50)}, "plain", entries, 1)
    assert entries["plain"]["speed"]["step"] == [1.0, 1.2]
    assert entries["later"]["speed"]["step"] == pytest.approx([1.2, 1.44])
    assert entries["later"]["speed"]["latency"] == pytest.approx([0.15, 0.15])
    assert entries["later"]["speed"]["batches_per_epoch"] == 50
