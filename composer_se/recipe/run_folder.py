"""The files of a run folder, and how a later run of the same name resumes from them.

RUN_FOLDER/recipe.yaml     the resolved recipe; can be run again
RUN_FOLDER/classes.json    the names of the classes in the order of their numbers, where they are known
RUN_FOLDER/metrics.jsonl   one JSON object per training step and per evaluation
RUN_FOLDER/summary.json    written when the run is complete
RUN_FOLDER/report.html     the report, which the command writes when the run is complete
SAVE_FOLDER/*.pt           checkpoints; by default SAVE_FOLDER is RUN_FOLDER/checkpoints
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from composer.core import Time, TimeUnit

from composer_se.errors import UserError
from composer_se.files import replace_file
from composer_se.recipe.load import as_yaml, load_recipe
from composer_se.recipe.schema import Recipe, free_to_change

__all__ = [
    "check_classes",
    "check_unchanged",
    "describe_changes",
    "is_under_way",
    "read_classes",
    "read_finished",
    "write_classes",
    "write_recipe",
    "write_summary",
]


def read_finished(recipe: Recipe) -> dict[str, Any] | None:
    """The summary of the run if it is complete for `max_duration` of this recipe; None otherwise."""
    path = Path(recipe.run_folder) / "summary.json"
    if not path.is_file():
        return None
    summary = json.loads(path.read_text())
    if str(summary["max_duration"]) == str(recipe.max_duration):  # also when a callback stopped the run early
        return summary
    wanted = Time.from_input(recipe.max_duration, TimeUnit.EPOCH)
    reached = {"ep": summary["epoch"], "ba": summary["batch"], "sp": summary["sample"]}
    steps = int(wanted.value * recipe.scale_schedule_ratio)  # as Composer scales the duration
    return summary if reached.get(wanted.unit.value, 0) >= steps else None


def is_under_way(recipe: Recipe) -> bool:
    """True when the run is complete or may have a checkpoint, in its folder or in this recipe's `save_folder`."""
    if "://" in recipe.save_folder or (Path(recipe.run_folder) / "summary.json").is_file():
        return True
    checkpoint = "latest-rank*.pt"
    return any(Path(recipe.run_folder).rglob(checkpoint)) or any(Path(recipe.save_folder).glob(checkpoint))


def check_unchanged(recipe: Recipe) -> None:
    """Refuses to continue a run if the recipe differs from the stored one in a key that changes the weights.

    Raises:
        UserError: If the run is complete or has a checkpoint, and the recipes differ in such a key.
    """
    path = Path(recipe.run_folder) / "recipe.yaml"
    if not path.is_file() or not is_under_way(recipe):
        return
    try:
        stored = load_recipe(str(path.absolute()))  # keys that an older version did not have get their defaults
    except UserError as error:
        raise UserError(
            f"run_name: {recipe.run_folder} holds a run whose recipe.yaml is not valid here ({error}); "
            "choose another name (run_name=...) or delete the folder"
        ) from error
    free = free_to_change(when_resumed=True)
    if recipe.load_path is None:  # the run has its own checkpoints by now
        free += ("load_path",)
    changed = describe_changes(dataclasses.asdict(stored), dataclasses.asdict(recipe), free)
    if changed:
        raise UserError(
            f"run_name: {recipe.run_folder} holds a run of another recipe, which can't be continued with this one: "
            f"{changed}; choose another name (run_name=...) or delete the folder"
        )


def read_classes(run_folder: Path) -> list[str] | None:
    """The names of the classes that a run was trained on; None where they are not known."""
    path = run_folder / "classes.json"
    return json.loads(path.read_text()) if path.is_file() else None


def check_classes(recipe: Recipe, classes: Sequence[str] | None) -> None:
    """Refuses to continue a run on data with other classes: a label would mean another class.

    Raises:
        UserError: If the run is complete or has a checkpoint, and was trained on other classes.
    """
    before = read_classes(Path(recipe.run_folder))
    if before and classes and before != [*classes] and is_under_way(recipe):
        odd = sorted({*before} ^ {*classes})
        how = f"{odd[0]!r} is in one of them only" if odd else "their order is another"
        raise UserError(
            f"train_dataset: its classes are not those that the run in {recipe.run_folder} began with ({how}); choose "
            "another name (run_name=...), or restore the data"
        )


def describe_changes(stored: dict[str, Any], recipe: dict[str, Any], free: Sequence[str]) -> str:
    """Lists the keys in which a recipe differs from a stored one.

    Args:
        stored: The recipe before, as nested mappings.
        recipe: The recipe now, as nested mappings.
        free: Dotted keys that may differ, with everything below them.

    Returns:
        The other keys that differ, as a list for an error message; empty if there are none.
    """
    before, now = _flatten(stored), _flatten(recipe)
    return ", ".join(
        f"{key} (was {_shown(before.get(key))}, now {_shown(now.get(key))})"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key) and not any(f"{key}.".startswith(f"{above}.") for above in free)
    )


def write_recipe(recipe: Recipe) -> None:
    """Writes the resolved recipe. Call it on rank zero only."""
    replace_file(Path(recipe.run_folder) / "recipe.yaml", as_yaml(recipe))


def write_classes(recipe: Recipe, classes: Sequence[str] | None) -> None:
    """Writes the names of the classes if they are known. Call it on rank zero only."""
    if classes is not None:
        replace_file(Path(recipe.run_folder) / "classes.json", json.dumps([*classes], indent=2) + "\n")


def write_summary(recipe: Recipe, summary: dict[str, Any]) -> None:
    """Writes summary.json, which marks the run as complete. Call it on rank zero only."""
    replace_file(Path(recipe.run_folder) / "summary.json", json.dumps(summary, indent=2) + "\n")


def _flatten(content: Any, path: str = "") -> dict[str, Any]:
    """The leaves of nested mappings by dotted path. An empty mapping is a leaf; a key that is null is left out."""
    if not isinstance(content, dict) or (path and not content):
        return {} if content is None else {path: content}
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat.update(_flatten(value, f"{path}.{key}" if path else str(key)))
    return flat


def _shown(value: Any) -> str:
    return "null" if value is None else repr(value)
