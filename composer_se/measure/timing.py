"""Times many instances of many variants in random order, so that drift favours none of them."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median

import torch

__all__ = ["steps_per_visit", "synchronize", "time_in_turns", "time_step"]

VISIT_SECONDS = 1.0
LEAST_STEPS, MOST_STEPS = 3, 100


def synchronize(device: torch.device) -> None:
    """Waits until a GPU has finished its work, CUDA's or Apple's. Does nothing for other devices."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def steps_per_visit(seconds_per_step: float) -> tuple[int, int]:
    """The numbers of untimed and of timed steps of a visit.

    Returns:
        `(untimed, timed)`. The timed steps, 3 to 100, take about a second. The untimed steps before them are a quarter
        as many, at least 2: the first steps after another variant are slow, because memory must be allocated again.
    """
    timed = min(MOST_STEPS, max(LEAST_STEPS, round(VISIT_SECONDS / max(seconds_per_step, 1e-9))))
    return max(2, timed // 4), timed


def time_in_turns(
    steps: Mapping[str, Sequence[Callable[[], object]]],
    *,
    rounds: int,
    device: torch.device,
    seed: int,
    visit: tuple[int, int] | None = None,
    leave: Callable[[str, int], None] = lambda name, instance: None,
    visited: Callable[[], None],
) -> dict[str, list[list[float]]]:
    """Times one step of every instance of every variant, once a round, in random order.

    Args:
        steps: By variant and instance, a function that runs one step.
        rounds: The number of visits to every instance.
        device: The device of the steps. The clock waits for it before and after each timed step.
        seed: The seed of the order.
        visit: The numbers of untimed and timed steps of a visit. Default: `steps_per_visit`, from one timed step.
        leave: Called with variant and instance after each visit, to free gradients for instance.
        visited: Called after each visit.

    Returns:
        By variant and instance, the median time in seconds of the timed steps of each visit.
    """
    order = [(name, i) for name, instances in steps.items() for i in range(len(instances))]
    if visit is None:
        name, instance = order[0]
        steps[name][instance]()
        visit = steps_per_visit(time_step(steps[name][instance], device))
        leave(name, instance)
    untimed, timed = visit
    shuffle = random.Random(seed).shuffle
    seconds: dict[str, list[list[float]]] = {name: [[] for _ in instances] for name, instances in steps.items()}
    for _ in range(rounds):
        shuffle(order)
        for name, instance in order:
            step = steps[name][instance]
            for _ in range(untimed):
                step()
            seconds[name][instance].append(median(time_step(step, device) for _ in range(timed)))
            leave(name, instance)
            visited()
    return seconds


def time_step(step: Callable[[], object], device: torch.device) -> float:
    """The time of one step in seconds, with Python's garbage collection switched off."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        synchronize(device)
        start = time.perf_counter()
        step()
        synchronize(device)
        return time.perf_counter() - start
    finally:
        if enabled:
            gc.enable()
