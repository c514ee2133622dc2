"""The arms of a comparison, and the recipes of their runs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from composer_se.errors import UserError
from composer_se.recipe.load import load_recipe
from composer_se.recipe.schema import Recipe, keys

__all__ = ["Arm", "Comparison", "checking", "default_arms", "lengthened", "run_recipes"]


@dataclass(frozen=True)
class Arm:
    """A variant of the recipe: its name, and its `dotted.key=value` strings besides those of all arms."""

    name: str
    overrides: tuple[str, ...]

    @property
    def slug(self) -> str:
        """The name in lower case, with hyphens for signs and spaces, for folder names."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


@dataclass(frozen=True)
class Comparison:
    """A recipe, its arms, and the number of runs of each arm."""

    recipe: str  # the path of a YAML file, or the name of a shipped recipe
    overrides: tuple[str, ...]  # for all arms
    arms: tuple[Arm, ...]  # two or more
    num_seeds: int  # runs of every arm, with seeds that count up from the recipe's
    folder: Path  # for all files

    @property
    def reference(self) -> Arm:
        """The first arm, which the others are compared with."""
        return self.arms[0]


def default_arms(recipe: str, overrides: Sequence[str]) -> tuple[Arm, Arm]:
    """The recipe without SE and as written. If it has no SE, the second arm adds the recommended setting."""
    has_se = (load_recipe(recipe, overrides).algorithms or {}).get("squeeze_excite") is not None
    recommended = "algorithms.squeeze_excite={latent_channels: 64, min_channels: auto}"
    return Arm("plain", ("algorithms.squeeze_excite=null",)), Arm("with SE", () if has_se else (recommended,))


@contextmanager
def checking(arm: str) -> Iterator[None]:
    """Adds the name of the arm to a `UserError`."""
    try:
        yield
    except UserError as error:
        raise UserError(f"--arm {arm}: {error}") from error


def run_recipes(comparison: Comparison, seed_index: int) -> dict[str, Recipe]:
    """The recipes of the runs with one seed, by the arm's name. Index 0 is the recipe's own seed.

    A run's folder is `FOLDER/runs/ARM-seedN`.

    Raises:
        UserError: If a recipe is wrong or has no `eval_dataset`, an override sets a key that the comparison sets
            itself, or an arm can't be compared with the reference at equal epochs.
    """
    reserved = keys("set")  # the comparison sets these keys itself, so that each run has its own
    _refuse(comparison.overrides, [key for key in reserved if key != "seed"])
    seed = _seed(comparison, seed_index)  # an error of the recipe itself must name no arm
    recipes: dict[str, Recipe] = {}
    for arm in comparison.arms:
        with checking(arm.name):
            _refuse(arm.overrides, reserved)
            recipe = recipes[arm.name] = _placed(comparison, arm, arm.slug, seed)
            if recipe.eval_dataset is None:
                raise UserError("eval_dataset is null: there would be no accuracy to compare")
            _check_comparable(recipe, recipes[comparison.reference.name], comparison.reference.name)
    return recipes


def _refuse(overrides: Sequence[str], reserved: Sequence[str]) -> None:
    for key in (override.partition("=")[0].strip() for override in overrides):
        if key in reserved:
            raise UserError(f"{key} is set by the comparison itself; leave it out")


def _check_comparable(recipe: Recipe, base: Recipe, reference: str) -> None:
    """Refuses an arm whose accuracy can't be compared with the reference's at equal epochs."""
    counts_batches = str(base.max_duration).endswith("ba") or base.train_subset_num_batches != -1
    for key in (*keys("same"), "train_batch_size") if counts_batches else keys("same"):
        ours, theirs = getattr(recipe, key), getattr(base, key)
        if ours != theirs:
            raise UserError(
                f"{key} is {ours!r}, but {theirs!r} in {reference}; "
                "all arms have to be trained on as many images and evaluated on the same ones"
            )


def lengthened(comparison: Comparison, seed_index: int, batches_before: int, batches: int) -> Recipe:
    """The recipe of a reference run with another number of steps, its schedule stretched to fit."""
    reference = comparison.reference
    name = f"{reference.slug}-{batches}ba"
    seed = _seed(comparison, seed_index)
    recipe = _placed(comparison, reference, name, seed)
    if recipe.scheduler is None:
        return _placed(comparison, reference, name, seed, f"max_duration={batches}ba")
    # Composer multiplies the duration by the ratio too, and rounds down.
    unscaled = round(batches_before / recipe.scale_schedule_ratio)
    stretched = (f"max_duration={unscaled}ba", f"scale_schedule_ratio={(batches + 0.5) / unscaled}")
    return _placed(comparison, reference, name, seed, *stretched)


def _seed(comparison: Comparison, seed_index: int) -> int:
    return load_recipe(comparison.recipe, comparison.overrides).seed + seed_index


def _placed(comparison: Comparison, arm: Arm, name: str, seed: int, *overrides: str) -> Recipe:
    """An arm's recipe with its own seed and folder. `${run_folder}` in the recipe refers to this folder."""
    overrides = (*comparison.overrides, *arm.overrides, *overrides)
    run_name = f"{name}-seed{seed}"
    run_folder = str(comparison.folder / "runs" / run_name)
    place = {
        "seed": seed,
        "run_name": run_name,
        "run_folder": run_folder,
        "save_folder": f"{run_folder}/checkpoints",
        "progress_bar": False,
    }
    return load_recipe(
        comparison.recipe,
        (*overrides, *(f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in place.items())),
    )
