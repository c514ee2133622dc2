"""The speeds of the arms: measured once, and kept in FOLDER/speeds.json."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from composer.utils import dist

from composer_se.compare.outcomes import read_json
from composer_se.compare.speed import ROUNDS, Speed, measure_speeds
from composer_se.cost.machine import Machine, describe_machine
from composer_se.errors import UserError
from composer_se.files import replace_file
from composer_se.recipe.distributed import from_rank_zero
from composer_se.recipe.schema import Recipe, keys

__all__ = ["read_or_measure_speeds"]


def read_or_measure_speeds(
    recipes: Mapping[str, Recipe], reference: str, folder: Path, progress: Callable[[str, int, int], None]
) -> tuple[dict[str, Speed], Machine, int]:
    """The speeds of all arms: those kept, of arms that are still the same, and the others measured.

    An arm that came later is measured in turns with the reference; the drift since the reference was measured first is
    taken out by the reference's own change.

    Args:
        recipes: Arm name to recipe.
        reference: Name of the arm that the others are compared with.
        folder: The comparison's.
        progress: Called as (what is going on, turns done, turns in all).

    Returns:
        Arm name to speed, the machine that the reference was measured on, and its number of processes.

    Raises:
        UserError: What was kept is damaged, a recipe can't be built, or speeds of another kind of machine would have
            to be added to those kept.
    """
    path = folder / "speeds.json"
    kept: dict[str, Any] = from_rank_zero(lambda: read_json(path) if path.is_file() else {})
    described = {name: _what_speed_depends_on(recipe) for name, recipe in recipes.items()}
    if kept.get(reference, {}).get("recipe") != described[reference]:
        kept = {}
    missing = {name: recipe for name, recipe in recipes.items() if kept.get(name, {}).get("recipe") != described[name]}
    if missing:
        if kept:
            _check_same_machine(kept[reference], recipes[reference], path)
        machine = _this_machine(recipes[reference])  # with the load before we put our own on it
        measured = _measure(missing | {reference: recipes[reference]}, progress)
        before = _speed(kept[reference]) if reference in kept else measured[reference]
        for name in missing:
            speed = _rescaled(measured[name], measured[reference], before)
            kept[name] = {
                "recipe": described[name],
                "speed": dataclasses.asdict(speed),
                "machine": dataclasses.asdict(machine),
                "processes": dist.get_world_size(),
            }
        if dist.get_global_rank() == 0:
            replace_file(path, json.dumps(kept, indent=1) + "\n")
    entry = kept[reference]
    return {name: _speed(kept[name]) for name in recipes}, Machine(**entry["machine"]), entry["processes"]


def _check_same_machine(entry: dict[str, Any], recipe: Recipe, path: Path) -> None:
    """Speeds of a GPU and of a processor, or of different numbers of processes, have no common scale."""
    gpu, processes = _this_machine(recipe).gpu, dist.get_world_size()
    if (entry["machine"]["gpu"], entry["processes"]) != (gpu, processes):
        raise UserError(
            f"{path}: was measured on {entry['processes']} process(es), {entry['machine']['gpu'] or 'without a GPU'}; "
            f"an arm can't be added on {processes}, {gpu or 'without a GPU'}; delete it to measure all arms anew"
        )


def _measure(recipes: dict[str, Recipe], progress: Callable[[str, int, int], None]) -> dict[str, Speed]:
    turns = iter(range(ROUNDS * len(recipes)))
    return measure_speeds(
        recipes, ROUNDS, lambda arm: progress(f"measuring the speed of {arm}", next(turns), ROUNDS * len(recipes))
    )


def _speed(entry: dict[str, Any]) -> Speed:
    speed = entry["speed"]
    return Speed(tuple(speed["step"]), tuple(speed["latency"]), speed["batches_per_epoch"])


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
    content = {key: getattr(recipe, key) for key in keys("speed")}
    content["train_dataset"] = {key: value for key, value in recipe.train_dataset.items() if key != "root"}
    return json.loads(json.dumps(content, default=str))


def _this_machine(recipe: Recipe) -> Machine:
    on_gpu = torch.cuda.is_available() and recipe.device in (None, "gpu")
    return describe_machine(torch.device("cuda" if on_gpu else "cpu"))
