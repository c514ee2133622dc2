"""Timing many instances of many variants so that position and drift favour none of them."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median

import torch

__all__ = ["steps_per_visit", "synchronize", "time_in_turns"]

VISIT_SECONDS = 1.0
LEAST_STEPS, MOST_STEPS = 3, 100


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was given; a no-op on the CPU, which never lags behind."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def steps_per_visit(seconds_per_step: float) -> tuple[int, int]:
    """The numbers of untimed and of timed steps of a visit.

    Args:
        seconds_per_step: About how long one step takes.

    Returns:
        `(untimed, timed)`: about a second of timed steps, three at least; a quarter of them before that untimed, two at
        least, since the first steps after another variant pay for memory that the allocator gave back to the system
        (a page-faulted pass costs ten times the arithmetic).
    """
    timed = min(MOST_STEPS, max(LEAST_STEPS, round(VISIT_SECONDS / max(seconds_per_step, 1e-9))))
    return max(2, timed // 4), timed


def time_in_turns(
    steps: Mapping[str, Sequence[Callable[[], object]]],
    *,
    rounds: int,
    device: torch.device,
    seed: int,
    leave: Callable[[str, int], None],
    visited: Callable[[], None],
) -> dict[str, list[list[float]]]:
    """Times one step of every instance of every variant, once a round, in an order drawn anew for each round.

    Args:
        steps: Per variant, per instance, a function that does one step.
        rounds: Visits to every instance.
        device: Where the steps run; it is waited for before and after each timed step.
        seed: Of the order.
        leave: Called with variant and instance after each visit, to drop what the visit left (gradients).
        visited: Called after each visit.

    Returns:
        Per variant, per instance, the median time in seconds of the timed steps of each visit.
    """
    order = [(name, i) for name, instances in steps.items() for i in range(len(instances))]
    shuffle = random.Random(seed).shuffle
    first_name, first_instance = order[0]
    untimed, timed = steps_per_visit(_calibrate(steps[first_name][first_instance], device))
    leave(first_name, first_instance)
    seconds: dict[str, list[list[float]]] = {name: [[] for _ in instances] for name, instances in steps.items()}
    for _ in range(rounds):
        shuffle(order)
        for name, instance in order:
            step = steps[name][instance]
            for _ in range(untimed):
                step()
            seconds[name][instance].append(median(_time(step, device) for _ in range(timed)))
            leave(name, instance)
            visited()
    return seconds


def _calibrate(step: Callable[[], object], device: torch.device) -> float:
    step()
    return _time(step, device)


def _time(step: Callable[[], object], device: torch.device) -> float:
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
