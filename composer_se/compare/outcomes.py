"""Reads the outcomes of a comparison's runs, and keeps them in files.

FOLDER/outcomes/RUN.json is all that a comparison needs of a complete run; the run's own folder may be deleted.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from composer_se.errors import UserError, one_line
from composer_se.files import replace_file
from composer_se.recipe.load import load_recipe
from composer_se.recipe.run_folder import describe_changes
from composer_se.recipe.schema import Recipe, free_to_change

__all__ = ["Outcome", "accuracy_after", "keep_outcome", "kept_outcome", "read_json", "read_outcome"]

_ACCURACY = "metrics/eval/MulticlassAccuracy"


@dataclass(frozen=True)
class Outcome:
    """One complete run."""

    run: str  # the name of the run and of its folder
    seed: int
    batches: int  # training steps
    accuracies: tuple[tuple[int, float], ...]  # (training steps, share of held-out images classified correctly)
    wall_seconds: float  # evaluations and start included; since the last resume, if any
    parameters: int  # of the trained network
    se_layers: int  # layers with our SE

    @property
    def accuracy(self) -> float:
        """The accuracy in the last evaluation, which need not be the best."""
        return self.accuracies[-1][1]


def read_outcome(summary: dict[str, Any], run_folder: Path, seed: int) -> Outcome:
    """Reads a complete run from its summary and its metrics.

    Raises:
        UserError: If the run was never evaluated, or its metrics are damaged.
    """
    accuracies: dict[int, float] = {}
    path = run_folder / "metrics.jsonl"
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            numbers = json.loads(line)
        except ValueError as error:
            raise UserError(
                f"{path}: line {number} is damaged ({one_line(error)}); delete {run_folder}, and the same command "
                "trains the run anew"
            ) from error
        if numbers.get(_ACCURACY) is not None:
            accuracies[numbers["batch"]] = numbers[_ACCURACY]
    if not accuracies:
        raise UserError(f"{path}: the run was never evaluated (eval_interval); there is no accuracy to compare")
    return Outcome(
        run=summary["run_name"],
        seed=seed,
        batches=summary["batch"],
        accuracies=tuple(accuracies.items()),
        wall_seconds=summary["wall_seconds"],
        parameters=summary["parameters"],
        se_layers=summary["squeeze_excite_layers"],
    )


def keep_outcome(outcome: Outcome, recipe: Recipe, folder: Path) -> None:
    """Writes an outcome and the recipe of its run."""
    content = {"recipe": _plain(recipe), "outcome": dataclasses.asdict(outcome)}
    replace_file(folder / "outcomes" / f"{outcome.run}.json", json.dumps(content) + "\n")


def kept_outcome(recipe: Recipe, folder: Path) -> Outcome | None:
    """Reads the kept outcome of a recipe's run. Returns None if there is none.

    Raises:
        UserError: If the outcome is damaged or belongs to another recipe, or if there is no outcome and the run's
            `recipe.yaml` is damaged or another.
    """
    path = folder / "outcomes" / f"{recipe.run_name}.json"
    under_way = Path(recipe.run_folder) / "recipe.yaml"
    if path.is_file():
        content = read_json(path)
        try:
            stored, found = content["recipe"], content["outcome"]
            outcome = Outcome(**found | {"accuracies": tuple((batch, share) for batch, share in found["accuracies"])})
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(path, error) from error
        # Keys that an older version did not have get their defaults.
        _check_same(dataclasses.asdict(Recipe()) | stored, recipe, path)
        return outcome
    if under_way.is_file():
        _check_same(_plain(load_recipe(str(under_way))), recipe, under_way.parent)
    return None


def read_json(path: Path) -> Any:
    """Reads a JSON file of a comparison.

    Raises:
        UserError: If the file is damaged.
    """
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: is damaged ({one_line(error)}); delete it, and the same command makes it anew")


def _check_same(stored: dict[str, Any], recipe: Recipe, kept: Path) -> None:
    changed = describe_changes(stored, _plain(recipe), free_to_change(when_resumed=False))
    if changed:
        raise UserError(
            f"{kept}: belongs to another recipe, which can't be continued with this one: {changed}; "
            "delete it, or give another --out or another name to the arm"
        )


def _plain(recipe: Recipe) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(recipe), default=str))


def accuracy_after(seconds: float, runs: Sequence[Outcome], seconds_per_step: float) -> float:
    """Estimates the final accuracy after a training time, from complete runs of one arm and seed.

    Interpolates between the final accuracies of the runs, over the logarithm of the time, since more training adds less
    and less. A time outside the range of the runs gets the accuracy of the nearest run.
    """
    ends = sorted((math.log(run.batches * seconds_per_step), run.accuracy) for run in runs)
    return float(np.interp(math.log(seconds), [end for end, _ in ends], [accuracy for _, accuracy in ends]))
