"""Runs a comparison, or what is left of it, and keeps what it found."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from composer import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from composer_se.compare.arms import Comparison, lengthened, run_recipes
from composer_se.compare.outcomes import Outcome, keep_outcome, kept_outcome, read_outcome
from composer_se.compare.speed import ROUNDS, Speed, measure_speeds
from composer_se.errors import UserError
from composer_se.recipe.agreement import from_rank_zero, join_processes
from composer_se.recipe.failed_writes import replace_file
from composer_se.recipe.run import train
from composer_se.recipe.run_plan import make_plan
from composer_se.recipe.schema import Recipe

__all__ = ["Findings", "check", "pursue"]

# Of the training time: what no number of seeds that anybody trains could tell from nothing.
NEGLIGIBLE = 0.01


@dataclass
class Findings:
    """What is known so far.

    Attributes:
        speeds: Arm name to how fast it is.
        runs: Arm name to its complete runs of the recipe's length, in the order of the seeds.
        other_lengths: The reference's runs of other lengths, made to compare at equal training time.
    """

    speeds: dict[str, Speed] = field(default_factory=dict)
    runs: dict[str, list[Outcome]] = field(default_factory=dict)
    other_lengths: list[Outcome] = field(default_factory=list)


Progress = Callable[[str, int, int], None]
"""Called as (what is going on, steps done, steps in all)."""


def check(comparison: Comparison) -> None:
    """Checks every arm before anything is trained or written.

    Raises:
        UserError: An arm's recipe is wrong.
    """
    for name, recipe in run_recipes(comparison, 0).items():
        try:
            make_plan(recipe)
        except UserError as error:
            raise UserError(f"--arm {name}: {error}") from error


def pursue(comparison: Comparison, progress: Progress) -> Iterator[Findings]:
    """Measures speeds, then trains every arm with every seed, one seed after the other.

    The arms of a seed take turns in an order that moves on from seed to seed. After them the reference is trained
    once more for as long as the slowest arm takes, and for as short as the fastest, where they differ from it. What
    was complete before is only read.

    Args:
        comparison: What is compared, checked.
        progress: Told of every training step.

    Yields:
        The findings after the measuring and after each seed: the same object, grown.
    """
    findings = Findings()
    join_processes(run_recipes(comparison, 0)[comparison.reference.name])
    _read_or_measure_speeds(comparison, findings, progress)
    yield findings
    for index in range(comparison.num_seeds):
        recipes = run_recipes(comparison, index)
        start = index % len(comparison.arms)
        for arm in (*comparison.arms[start:], *comparison.arms[:start]):
            outcome = _train(
                f"{arm.name}, seed {recipes[arm.name].seed}", recipes[arm.name], comparison.folder, progress
            )
            findings.runs.setdefault(arm.name, []).append(outcome)
        reference = recipes[comparison.reference.name]
        before = findings.runs[comparison.reference.name][-1].batches
        for batches in other_lengths(comparison, findings):
            recipe = lengthened(comparison, reference, before, batches)
            what = f"{comparison.reference.name} for {batches / before:.2f} of its time, seed {recipe.seed}"
            findings.other_lengths.append(_train(what, recipe, comparison.folder, progress))
        yield findings


def other_lengths(comparison: Comparison, findings: Findings) -> list[int]:
    """In steps of the reference, the longest and the shortest training time among the arms where it is not its own."""
    reference = comparison.reference.name
    own = training_seconds(reference, findings)
    times = [training_seconds(arm.name, findings) for arm in comparison.arms]
    wanted = [time for time in (min(times), max(times)) if abs(time / own - 1) > NEGLIGIBLE]
    return [max(1, round(findings.runs[reference][0].batches * time / own)) for time in wanted]


def training_seconds(arm: str, findings: Findings) -> float:
    """What an arm's training takes at the speed measured, evaluations left out."""
    steps = findings.speeds[arm].step
    return findings.runs[arm][0].batches * sum(steps) / len(steps)


def _read_or_measure_speeds(comparison: Comparison, findings: Findings, progress: Progress) -> None:
    """Fills in the speeds; those measured before, of arms that are still the same, are kept.

    An arm that came later is measured in turn with the reference; the drift since then is taken out by the reference's
    own change.
    """
    recipes = run_recipes(comparison, 0)
    path = comparison.folder / "speeds.json"
    stored = from_rank_zero(lambda: json.loads(path.read_text()) if path.is_file() else {})
    described = {name: _what_speed_depends_on(recipe) for name, recipe in recipes.items()}
    for name, entry in stored.items():
        if described.get(name) == entry["recipe"]:
            speed = entry["speed"]
            findings.speeds[name] = Speed(tuple(speed["step"]), tuple(speed["latency"]), speed["batches_per_epoch"])
    reference = comparison.reference.name
    if reference not in findings.speeds:
        findings.speeds.clear()
    missing = {name: recipe for name, recipe in recipes.items() if name not in findings.speeds}
    if not missing:
        return
    turns = ROUNDS * len(missing | {reference: recipes[reference]})
    done = 0

    def advance(arm: str) -> None:
        nonlocal done
        progress(f"measuring the speed of {arm}", done, turns)
        done += 1

    measured = measure_speeds(missing | {reference: recipes[reference]}, ROUNDS, advance)
    before = findings.speeds.get(reference)
    for name in missing:
        findings.speeds[name] = _rescaled(measured[name], measured[reference], before) if before else measured[name]
    if dist.get_global_rank() == 0:
        entries = {
            name: {"recipe": described[name], "speed": dataclasses.asdict(speed)}
            for name, speed in findings.speeds.items()
        }
        replace_file(path, json.dumps(entries, indent=1) + "\n")


def _rescaled(speed: Speed, reference_now: Speed, reference_before: Speed) -> Speed:
    """The speed as it would have been in the turns when the reference was measured first."""
    step = zip(speed.step, reference_now.step, reference_before.step, strict=True)
    latency = zip(speed.latency, reference_now.latency, reference_before.latency, strict=True)
    return Speed(
        tuple(own / now * before for own, now, before in step),
        tuple(own / now * before for own, now, before in latency),
        speed.batches_per_epoch,
    )


def _what_speed_depends_on(recipe: Recipe) -> dict[str, Any]:
    elsewhere = ("run_name", "run_folder", "save_folder", "seed", "callbacks", "loggers")
    content = dataclasses.asdict(recipe) | {"world_size": dist.get_world_size()}
    return json.loads(json.dumps({key: value for key, value in content.items() if key not in elsewhere}, default=str))


def _train(what: str, recipe: Recipe, folder: Path, progress: Progress) -> Outcome:
    kept = from_rank_zero(lambda: kept_outcome(recipe, folder))
    if kept:
        return kept
    summary, _ = train(recipe, [_Watch(what, progress)])
    outcome = from_rank_zero(lambda: read_outcome(summary, Path(recipe.run_folder), recipe.seed))
    if dist.get_global_rank() == 0:
        keep_outcome(outcome, recipe, folder)
    return outcome


class _Watch(Callback):
    """Tells how far a run is."""

    def __init__(self, what: str, progress: Progress) -> None:
        self.what = what
        self.progress = progress

    def batch_end(self, state: State, logger: Logger) -> None:
        """After each training step."""
        elapsed = state.get_elapsed_duration()
        assert elapsed is not None
        self.progress(self.what, round(1000 * elapsed.value), 1000)
