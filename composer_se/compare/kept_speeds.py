"""The speeds of the arms: measured once, and kept in FOLDER/speeds.json."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from composer.utils import dist

from composer_se.compare.outcomes import read_json
from composer_se.compare.speed import Speed, Turn, steps_per_turn, take_turn
from composer_se.errors import UserError
from composer_se.files import replace_file
from composer_se.measure.machine import Machine, describe_machine
from composer_se.recipe.distributed import from_rank_zero
from composer_se.recipe.schema import Recipe, keys
from composer_se.show.terminal import Progress
from composer_se.show.text import to_json

__all__ = ["read_or_measure_speeds"]

ROUNDS = 8


def read_or_measure_speeds(
    recipes: Mapping[str, Recipe], reference: str, folder: Path, progress: Progress
) -> tuple[dict[str, Speed], Machine, int]:
    """The speeds of all arms: those kept, of arms that are still the same, and the others measured.

    Every arm takes a turn in each round, in random order. The speeds are kept after each round, so that an interrupted
    measurement continues with the next one. An arm that came later is measured in rounds with the reference; the
    drift since the reference was measured first is taken out by the reference's own change.

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
    entries = {name: entry for name, entry in kept.items() if entry.get("recipe") == described.get(name)}
    taken = {name: len(entries[name]["speed"]["step"]) if name in entries else 0 for name in recipes}
    missing = {name: range(rounds, ROUNDS) for name, rounds in taken.items() if rounds < ROUNDS}
    if missing:
        if reference in entries:
            _check_same_machine(entries[reference], recipes[reference], path)
        machine = dataclasses.asdict(_this_machine(recipes[reference]))  # with the load before we put our own on it
        for name in missing.keys() - entries:
            speed = {"step": [], "latency": [], "batches_per_epoch": 0}
            processes = dist.get_world_size()
            entries[name] = {"recipe": described[name], "speed": speed, "machine": machine, "processes": processes}
        for done in _measure(recipes, reference, missing, entries, progress):
            if dist.get_global_rank() == 0:
                replace_file(path, to_json(kept | done))
    speeds = {name: Speed(**entries[name]["speed"]) for name in recipes}
    return speeds, Machine(**entries[reference]["machine"]), entries[reference]["processes"]


def _measure(
    recipes: Mapping[str, Recipe],
    reference: str,
    missing: Mapping[str, range],
    entries: dict[str, Any],
    progress: Progress,
) -> Iterator[dict[str, Any]]:
    """Adds the missing rounds to the entries, and yields them after each."""
    turns = [{name for name, rounds in missing.items() if turn in rounds} for turn in range(ROUNDS)]
    turns = [names | {reference} if names else names for names in turns]
    total, done = sum(map(len, turns)), 0
    steps = steps_per_turn(reference, recipes[reference])
    for turn, names in enumerate(turns):
        order = sorted(names)
        random.Random(turn).shuffle(order)
        taken: dict[str, Turn] = {}
        for name in order:
            done += 1
            progress(f"measuring speed, turn {done} of {total}: {name}", done - 1, total)
            taken[name] = take_turn(name, recipes[name], (turn + 0.5) / ROUNDS, steps)
        if names:
            _add(taken, reference, entries, turn)
            yield entries


def _add(taken: Mapping[str, Turn], reference: str, entries: dict[str, Any], turn: int) -> None:
    """Adds one round to the entries that lack it, as it would have been when the reference took this turn first."""
    now = taken[reference]
    before = entries[reference]["speed"]
    scale = {"step": 1.0, "latency": 1.0}
    if len(before["step"]) > turn:
        scale = {key: before[key][turn] / getattr(now, key) for key in scale}
    for name, own in taken.items():
        speed = entries[name]["speed"]
        if len(speed["step"]) == turn:
            speed["step"].append(own.step * scale["step"])
            speed["latency"].append(own.latency * scale["latency"])
            speed["batches_per_epoch"] = own.batches_per_epoch


def _check_same_machine(entry: dict[str, Any], recipe: Recipe, path: Path) -> None:
    """Speeds of a GPU and of a processor, or of different numbers of processes, have no common scale."""
    gpu, processes = _this_machine(recipe).gpu, dist.get_world_size()
    if (entry["machine"]["gpu"], entry["processes"]) != (gpu, processes):
        raise UserError(
            f"{path}: was measured on {entry['processes']} process(es), {entry['machine']['gpu'] or 'without a GPU'}; "
            f"an arm can't be added on {processes}, {gpu or 'without a GPU'}; delete it to measure all arms anew"
        )


def _what_speed_depends_on(recipe: Recipe) -> dict[str, Any]:
    content = {key: getattr(recipe, key) for key in keys("speed")}
    content["train_dataset"] = {key: value for key, value in recipe.train_dataset.items() if key != "root"}
    return json.loads(json.dumps(content, default=str))


def _this_machine(recipe: Recipe) -> Machine:
    on_gpu = torch.cuda.is_available() and recipe.device in (None, "gpu")
    return describe_machine(torch.device("cuda" if on_gpu else "cpu"))
