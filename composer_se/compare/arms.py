"""The arms of a comparison, and the recipes of their runs."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from composer_se.errors import UserError
from composer_se.recipe.load import load_recipe
from composer_se.recipe.schema import Recipe, keys

__all__ = ["Arm", "Comparison", "default_arms", "lengthened", "run_recipes"]

# The comparison sets these keys itself, so that each run has its own.
_RESERVED = keys("set")

# What has to be the same in all arms for their accuracies to be comparable at equal epochs.
_SHARED = keys("same")

_WITHOUT_SE = "algorithms.squeeze_excite=null"
_RECOMMENDED_SE = "algorithms.squeeze_excite={latent_channels: 64, min_channels: auto}"


@dataclass(frozen=True)
class Arm:
    """One of the things compared.

    Attributes:
        name: As tables and pictures call it.
        overrides: `dotted.key=value` strings, on top of the recipe and of what all arms share.
    """

    name: str
    overrides: tuple[str, ...]

    @property
    def slug(self) -> str:
        """The name as part of a folder's."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


@dataclass(frozen=True)
class Comparison:
    """The question: a recipe, its arms, and how often each is trained.

    Attributes:
        recipe: The path of a YAML file, or the name of a shipped recipe.
        overrides: `dotted.key=value` strings for all arms.
        arms: Two or more; the first is the reference that the others are compared with.
        num_seeds: Runs of every arm: seeds count up from the recipe's.
        folder: Where everything goes.
    """

    recipe: str
    overrides: tuple[str, ...]
    arms: tuple[Arm, ...]
    num_seeds: int
    folder: Path

    @property
    def reference(self) -> Arm:
        """The arm that the others are compared with."""
        return self.arms[0]


def default_arms(recipe: str, overrides: Sequence[str]) -> tuple[Arm, Arm]:
    """The recipe without SE, and as written; a recipe without SE gets the recommended setting."""
    has_se = (load_recipe(recipe, overrides).algorithms or {}).get("squeeze_excite") is not None
    return Arm("plain", (_WITHOUT_SE,)), Arm("with SE", () if has_se else (_RECOMMENDED_SE,))


def run_recipes(comparison: Comparison, seed_index: int) -> dict[str, Recipe]:
    """The recipe of every arm's run with one of the seeds.

    Args:
        comparison: What is compared.
        seed_index: 0 for the recipe's own seed, 1 for the next.

    Returns:
        Arm name to recipe; the run's folder is `FOLDER/runs/ARM-seedN`.

    Raises:
        UserError: A recipe is wrong, or an arm sets a key of the comparison's own, or has nothing to be evaluated on.
    """
    for override in comparison.overrides:
        _refuse(override, [key for key in _RESERVED if key != "seed"], "")
    load_recipe(comparison.recipe, comparison.overrides)  # what is wrong in all arms is no arm's fault
    recipes = {}
    for arm in comparison.arms:
        for override in arm.overrides:
            _refuse(override, _RESERVED, f"--arm {arm.name}: ")
        try:
            recipe = _placed(comparison, arm, arm.slug, seed_index)
        except UserError as error:
            raise UserError(f"--arm {arm.name}: {error}") from error
        if recipe.eval_dataset is None:
            raise UserError(f"--arm {arm.name}: eval_dataset is null: there would be no accuracy to compare")
        recipes[arm.name] = recipe
    _check_comparable(recipes, comparison.reference.name)
    return recipes


def _refuse(override: str, reserved: Sequence[str], prefix: str) -> None:
    key = override.partition("=")[0].strip()
    if key in reserved:
        raise UserError(f"{prefix}{key} is set by the comparison itself; leave it out")


def _check_comparable(recipes: dict[str, Recipe], reference: str) -> None:
    base = recipes[reference]
    counts_batches = str(base.max_duration).endswith("ba") or base.train_subset_num_batches != -1
    for name, recipe in recipes.items():
        for key in (*_SHARED, "train_batch_size") if counts_batches else _SHARED:
            ours, theirs = getattr(recipe, key), getattr(recipes[reference], key)
            if ours != theirs:
                raise UserError(
                    f"--arm {name}: {key} is {ours!r}, but {theirs!r} in {reference}; "
                    "all arms have to be trained on as many images and evaluated on the same ones"
                )


def lengthened(comparison: Comparison, seed_index: int, batches_before: int, batches: int) -> Recipe:
    """A run of the reference that takes another number of steps, with its schedule stretched to fit.

    Args:
        comparison: What is compared.
        seed_index: As for `run_recipes`.
        batches_before: The number of its training steps.
        batches: The number of steps wanted.
    """
    reference = comparison.reference
    name = f"{reference.slug}-{batches}ba"
    recipe = _placed(comparison, reference, name, seed_index)
    if recipe.scheduler is None:
        return _placed(comparison, reference, name, seed_index, f"max_duration={batches}ba")
    # Composer multiplies the duration by the ratio too, and rounds down.
    unscaled = round(batches_before / recipe.scale_schedule_ratio)
    stretched = (f"max_duration={unscaled}ba", f"scale_schedule_ratio={(batches + 0.5) / unscaled}")
    return _placed(comparison, reference, name, seed_index, *stretched)


def _placed(comparison: Comparison, arm: Arm, name: str, seed_index: int, *overrides: str) -> Recipe:
    """An arm's recipe with a seed and a folder of its own, which `${run_folder}` and the like refer to."""
    overrides = (*comparison.overrides, *arm.overrides, *overrides)
    seed = load_recipe(comparison.recipe, overrides).seed + seed_index
    run_name = f"{name}-seed{seed}"
    run_folder = str(comparison.folder / "runs" / run_name)
    place = {
        "seed": seed,
        "run_name": run_name,
        "run_folder": run_folder,
        "save_folder": f"{run_folder}/checkpoints",
        "progress_bar": False,
    }
    return load_recipe(comparison.recipe, (*overrides, *(f"{key}={json.dumps(value)}" for key, value in place.items())))
