"""What the instrument concludes from timings, on timings that are made up."""

from __future__ import annotations

import math
import random

import pytest
import torch
from scipy import stats

from composer_se.cost.levels import find_levels
from composer_se.measure import timing
from composer_se.measure.timing import steps_per_visit, time_in_turns, time_step
from composer_se.measure.uncertainty import Interval, pairs_needed


def made_up(true: dict[str, float], seed: int, instances=4, rounds=5, between=0.02, within=0.01, drift=0.0):
    """Times with a lasting deviation of each instance, one of each visit, and a machine that slows down."""
    rng = random.Random(seed)
    return {
        name: [
            [level * placed * math.exp(rng.gauss(0, within) + drift * r) for r in range(rounds)]
            for placed in [math.exp(rng.gauss(0, between)) for _ in range(instances)]
        ]
        for name, level in true.items()
    }


def test_a_ratio_without_noise_is_exact_whatever_the_machine_does_meanwhile():
    found = find_levels(made_up({"plain": 2.0, "ours": 2.2}, 0, between=0, within=0, drift=0.3))
    ratio = found.ratio("ours", "plain")
    assert ratio.value == pytest.approx(1.1)
    assert ratio.half_width == pytest.approx(0, abs=1e-9)
    assert ratio.excludes(1)
    # The third of five rounds, in which the machine has slowed down by exp(0.6).
    assert found.seconds("ours") == pytest.approx(2.2 * math.exp(0.6))


@pytest.mark.parametrize(("device", "waits"), [("cuda", True), ("mps", True), ("cpu", False)])
def test_the_clock_waits_for_a_gpu_before_and_after_a_step(device: str, waits: bool, monkeypatch) -> None:
    calls: list[str] = []
    for library in (torch.cuda, torch.mps):
        monkeypatch.setattr(library, "synchronize", lambda *_: calls.append("wait"))
    time_step(lambda: calls.append("step"), torch.device(device))
    assert calls == (["wait", "step", "wait"] if waits else ["step"])


def test_one_disturbed_visit_changes_nothing():
    seconds = made_up({"plain": 1.0, "ours": 1.0}, 0, between=0, within=0)
    seconds["ours"][1][2] *= 10
    assert find_levels(seconds).ratio("ours", "plain").value == pytest.approx(1)


def test_the_resolution_is_students_interval_of_the_spread_between_instances():
    a = 0.01
    seconds = {name: [[math.exp(a)] * 3, [math.exp(-a)] * 3] for name in ("plain", "ours")}
    found = find_levels(seconds)
    assert found.degrees == 2
    assert found.deviation == pytest.approx(math.sqrt(4 * a**2 / 2))
    half = 4.302653 * found.deviation * math.sqrt(1 / 2 + 1 / 2)  # Student's t for two degrees of freedom
    ratio = found.ratio("ours", "plain")
    assert ratio.half_width == pytest.approx(math.expm1(half), rel=1e-4)
    assert ratio.low == pytest.approx(math.exp(-half), rel=1e-4)


def test_the_same_code_is_told_apart_in_about_one_run_of_twenty():
    true = {"plain": 1.0, "ours": 1.0, "built-in": 1.0}
    runs = 400
    wrong = sum(find_levels(made_up(true, seed)).ratio("ours", "plain").excludes(1) for seed in range(runs))
    assert 0.02 < wrong / runs < 0.09


def test_a_difference_well_beyond_the_resolution_is_told_apart():
    true = {"plain": 1.0, "ours": 1.2}
    assert all(find_levels(made_up(true, seed)).ratio("ours", "plain").excludes(1) for seed in range(50))


def test_an_overhead_as_a_share_of_another_has_an_interval_that_holds():
    true = {"plain": 1.0, "ours": 1.07, "built-in": 1.10}
    found = [find_levels(made_up(true, seed, between=0.005, within=0.001)) for seed in range(200)]
    ratios = [one.overhead("ours", "built-in", "plain") for one in found]
    held = sum(abs(ratio.value - 0.7) <= ratio.half_width for ratio in ratios)
    assert 0.90 < held / len(ratios) < 0.99
    assert sum(ratio.value for ratio in ratios) / len(ratios) == pytest.approx(0.7, abs=0.02)


@pytest.mark.parametrize("built_in", [1.0, 0.5])
def test_an_overhead_as_a_share_of_one_that_is_no_overhead_is_not_resolved(built_in):
    found = find_levels(made_up({"plain": 1.0, "ours": 1.07, "built-in": built_in}, 0))
    assert found.ratio("built-in", "plain").excludes(1) == (built_in == 0.5)
    ratio = found.overhead("ours", "built-in", "plain")
    assert not ratio.excludes(1)
    assert str(ratio) == "not resolved"


def test_a_ratio_within_the_resolution_is_printed_as_such():
    assert str(Interval(1.012, 0.982, 1.042)) == "1.01 (within ±0.03)"
    assert str(Interval(1.082, 1.052, 1.112)) == "1.08 ±0.03"
    assert str(Interval(1.0123, 1.0103, 1.0143)) == "1.012 ±0.002"


def test_one_instance_of_each_variant_gives_no_resolution():
    with pytest.raises(ValueError, match="at least two instances"):
        find_levels({"plain": [[1.0]], "ours": [[1.0]]})


def test_every_instance_is_visited_once_a_round_in_changing_order():
    steps_done: list[str] = []
    steps = {name: [lambda key=f"{name}{i}": steps_done.append(key) for i in range(3)] for name in "ab"}
    left: list[tuple[str, int]] = []
    seconds = time_in_turns(
        steps,
        rounds=4,
        device=torch.device("cpu"),
        seed=1,
        leave=lambda name, i: left.append((name, i)),
        visited=lambda: None,
    )
    assert {name: [len(row) for row in rows] for name, rows in seconds.items()} == {"a": [4, 4, 4], "b": [4, 4, 4]}
    visits = left[1:]  # the first one is the trial that finds out how long a step takes
    rounds = [tuple(visits[start : start + 6]) for start in range(0, 24, 6)]
    assert all(len(set(order)) == 6 for order in rounds)
    assert len(set(rounds)) > 1


def test_a_visit_always_begins_with_untimed_steps(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(timing, "VISIT_SECONDS", 1.0)
    assert steps_per_visit(10.0) == (2, 3)
    assert steps_per_visit(0.1) == (2, 10)
    assert steps_per_visit(1e-5) == (25, 100)


@pytest.mark.parametrize("chance", [0.5, 0.8])
@pytest.mark.parametrize("deviation", [0.1, 0.2, 0.6])
def test_so_many_pairs_as_needed_show_the_difference_with_the_chance_asked(deviation: float, chance: float):
    needed = pairs_needed(0.2, deviation, chance)
    assert needed is not None

    def power(pairs: int) -> float:  # of the t test, exactly
        limit, shift = stats.t.ppf(0.975, pairs - 1), 0.2 * math.sqrt(pairs) / deviation
        return 1 - float(stats.nct.cdf(limit, pairs - 1, shift))

    enough = min(pairs for pairs in range(2, 1000) if power(pairs) >= chance)
    assert enough == pytest.approx(needed, abs=1 + 0.1 * needed)


def test_no_affordable_number_of_pairs_shows_a_difference_that_drowns_in_scatter():
    assert pairs_needed(1e-4, 1.0, 0.8) is None
    assert pairs_needed(0.0, 1.0, 0.5) is None
