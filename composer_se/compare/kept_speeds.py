"""Measures the speeds of the arms once, and keeps them in FOLDER/speeds.json."""

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
    """Reads the kept speeds of arms that have not changed, and measures the others.

    Each round times each of the others once, in random order. The speeds are written after each round, so that an
    interrupted measurement continues with the next round. An arm that was added later is timed in rounds with the
    reference, and its times are divided by the change of the reference since the reference was first timed.

    Returns:
        The speeds by arm, the machine that the reference was measured on, and the number of processes there.

    Raises:
        UserError: If a recipe can't be built, or speeds.json is damaged or comes from another GPU or another number of
            processes.
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
        machine = dataclasses.asdict(_this_machine(recipes[reference]))  # before our measurement adds to the load
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
    """Measures the missing rounds, and yields the entries after each round."""
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
    """Adds one round to the entries that lack it, without the change of the reference since it was first timed."""
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
    """Refuses to add speeds that were measured on another GPU or on another number of processes."""
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
