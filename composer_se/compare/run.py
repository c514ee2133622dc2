"""Runs a comparison or continues it, and keeps the outcomes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from tempfile import TemporaryFile

from composer import Callback, State
from composer.core import Time, TimeUnit
from composer.loggers import Logger
from composer.utils import dist

from composer_se.compare.arms import Comparison, checking, lengthened, run_recipes
from composer_se.compare.kept_speeds import read_or_measure_speeds
from composer_se.compare.outcomes import Outcome, keep_outcome, kept_outcome, read_outcome
from composer_se.compare.speed import Speed
from composer_se.errors import UserError
from composer_se.measure.machine import Machine
from composer_se.recipe.distributed import from_rank_zero, join_processes
from composer_se.recipe.load import load_recipe
from composer_se.recipe.run import train
from composer_se.recipe.schema import Recipe
from composer_se.recipe.trainer import release_memory
from composer_se.recipe.validate import make_plan
from composer_se.show.terminal import Progress

__all__ = ["Findings", "check", "run_comparison", "run_pilot"]

# Training times that differ by a smaller share count as equal: no affordable number of seeds shows the effect.
NEGLIGIBLE = 0.01

# Added to the recipe's seed. A comparison adds 0, 1, ... instead.
PILOT_SEEDS = (1000, 1001)


@dataclass
class Findings:
    """The results of a comparison so far."""

    speeds: dict[str, Speed]  # by arm
    machine: Machine  # where the speeds were measured
    processes: int = 1  # at that measurement
    runs: dict[str, list[Outcome]] = field(default_factory=dict)  # by arm, of the recipe's length, one for each seed
    other_lengths: list[Outcome] = field(default_factory=list)  # of the reference, to compare at equal training time

    def accuracies(self, arm: str) -> list[float]:
        """The final accuracy of an arm per seed."""
        return [run.accuracy for run in self.runs[arm]]

    def training_seconds(self, arm: str) -> float:
        """The training time of an arm at its measured speed, without evaluations."""
        return self.runs[arm][0].batches * mean(self.speeds[arm].step)


def check(comparison: Comparison) -> None:
    """Checks every arm before anything is trained or written.

    Raises:
        UserError: If an arm's recipe is wrong.
    """
    make_plan(load_recipe(comparison.recipe, comparison.overrides))  # an error of the recipe itself must name no arm
    for name, recipe in run_recipes(comparison, 0).items():
        with checking(name):
            make_plan(recipe)
            if Time.from_input(recipe.eval_interval, TimeUnit.EPOCH).value <= 0:
                raise UserError(f"eval_interval: is {recipe.eval_interval!r}: there would be no accuracy to compare")
            for stopper in ("early_stopper", "threshold_stopper"):
                if (recipe.callbacks or {}).get(stopper) is not None:
                    raise UserError(
                        f"callbacks.{stopper}: would end runs at different lengths, where they are compared at equal "
                        f"ones; leave it out with callbacks.{stopper}=null"
                    )


def run_comparison(comparison: Comparison, progress: Progress) -> Iterator[Findings]:
    """Measures speeds, then trains every arm with every seed, one seed after the other.

    Each seed begins with the next arm. After the arms, the reference is trained again for as long as the slowest arm
    takes and for as long as the fastest takes, unless that is about its own time. Complete runs are only read.

    Yields:
        The findings after the speeds are measured, and after each seed. It is the same object each time.
    """
    reference = comparison.reference.name
    recipes = run_recipes(comparison, 0)
    join_processes(recipes[reference])
    from_rank_zero(lambda: _check_writable(comparison.folder))
    for index in range(comparison.num_seeds):  # raises errors about kept outcomes before hours of training
        for recipe in run_recipes(comparison, index).values():
            from_rank_zero(lambda recipe=recipe: kept_outcome(recipe, comparison.folder))
    speeds, machine, processes = read_or_measure_speeds(recipes, reference, comparison.folder, progress)
    findings = Findings(speeds, machine, processes)
    yield findings
    for index in range(comparison.num_seeds):
        recipes = run_recipes(comparison, index)
        seed = f"seed {index + 1} of {comparison.num_seeds}"
        start = index % len(comparison.arms)
        for arm in (*comparison.arms[start:], *comparison.arms[:start]):
            outcome = _train(f"{seed}: {arm.name}", recipes[arm.name], comparison.folder, progress)
            findings.runs.setdefault(arm.name, []).append(outcome)
        before = findings.runs[reference][-1].batches
        for batches in other_lengths(comparison, findings):
            recipe = lengthened(comparison, index, before, batches)
            what = f"{seed}: {reference} for {batches / before:.2f} of its time"
            findings.other_lengths.append(_train(what, recipe, comparison.folder, progress))
        yield findings


def run_pilot(comparison: Comparison, progress: Progress) -> dict[str, list[Outcome]]:
    """Trains every arm with two seeds that no comparison uses.

    The runs show how many seeds a comparison needs. Complete runs are only read.

    Returns:
        The outcomes by arm.
    """
    join_processes(run_recipes(comparison, 0)[comparison.reference.name])
    from_rank_zero(lambda: _check_writable(comparison.folder))
    runs: dict[str, list[Outcome]] = {arm.name: [] for arm in comparison.arms}
    for index in PILOT_SEEDS:
        for name, recipe in run_recipes(comparison, index).items():
            runs[name].append(_train(f"pilot seed {recipe.seed}: {name}", recipe, comparison.folder, progress))
    return runs


def _check_writable(folder: Path) -> None:
    """Raises an error before the training if the folder can't be written."""
    try:
        TemporaryFile(dir=next(path for path in (folder, *folder.parents) if path.exists())).close()
    except OSError as error:
        raise UserError(
            f"--out {folder}: can't be written ({error.strerror or error}); name another folder, or change that"
        ) from error


def other_lengths(comparison: Comparison, findings: Findings) -> list[int]:
    """The shortest and longest training time of the arms, in steps of the reference, if they differ from its own."""
    reference = comparison.reference.name
    own = findings.training_seconds(reference)
    times = [findings.training_seconds(arm.name) for arm in comparison.arms]
    wanted = [time for time in (min(times), max(times)) if abs(time / own - 1) > NEGLIGIBLE]
    batches = findings.runs[reference][0].batches
    lengths = {max(1, round(batches * time / own)) for time in wanted}
    return sorted(lengths - {batches})


def _train(what: str, recipe: Recipe, folder: Path, progress: Progress) -> Outcome:
    kept = from_rank_zero(lambda: kept_outcome(recipe, folder))
    if kept:
        return kept
    summary, _ = train(recipe, [_Watch(what, progress)])
    release_memory()
    outcome = from_rank_zero(lambda: read_outcome(summary, Path(recipe.run_folder), recipe.seed))
    if dist.get_global_rank() == 0:
        keep_outcome(outcome, recipe, folder)
    return outcome


class _Watch(Callback):
    """Reports the progress of a run."""

    def __init__(self, what: str, progress: Progress) -> None:
        self.what = what
        self.progress = progress

    def batch_end(self, state: State, logger: Logger) -> None:
        """Reports the share of the run that is done."""
        elapsed = state.get_elapsed_duration()
        assert elapsed is not None
        self.progress(self.what, round(1000 * elapsed.value), 1000)
