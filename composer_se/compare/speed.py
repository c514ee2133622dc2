"""How fast each arm trains and infers, measured in turns so that the drift of the machine favours none.

The runs themselves are too far apart in time for that: on a shared machine one hour's steps are 10 % slower than the
next hour's, where the arms differ by less. A turn trains some steps of the real recipe, data loading and algorithms
included, at several points of its duration, since algorithms may work in a part of it only. What an algorithm does at
the ends of epochs and what it keeps from one to the next, such as frozen layers, is not in it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import mean, median
from time import perf_counter

import torch
from composer import Callback, State, Trainer
from composer.core import Time, Timestamp, TimeUnit, get_precision_context
from composer.loggers import Logger
from torch import nn

from composer_se.cost.steps import inference_step
from composer_se.cost.timing import steps_per_visit, synchronize
from composer_se.errors import UserError
from composer_se.recipe.distributed import from_rank_zero
from composer_se.recipe.schema import Recipe, keys
from composer_se.recipe.trainer import Parts, build_parts, end_trainer, make_trainer, release_memory
from composer_se.recipe.validate import make_plan

__all__ = ["ROUNDS", "Speed", "measure_speeds"]

ROUNDS = 8
TURN_SECONDS = 3.0
LEAST_STEPS, MOST_STEPS = 8, 400

# Of the Trainer's options those that a step's time depends on, and what a turn needs beside them.
_OPTIONS = (*keys("trainer", "speed"), "seed", "dist_timeout")


@dataclass(frozen=True)
class Speed:
    """How fast an arm is, turn by turn.

    Attributes:
        step: Seconds per training step, loading the batch included; the mean of each turn.
        latency: Seconds per image, one at a time, in inference; the median of each turn.
        batches_per_epoch: Training steps of an epoch.
    """

    step: tuple[float, ...]
    latency: tuple[float, ...]
    batches_per_epoch: int


def measure_speeds(recipes: Mapping[str, Recipe], rounds: int, advance: Callable[[str], None]) -> dict[str, Speed]:
    """Measures the arms in turns, in an order drawn anew for each round.

    Args:
        recipes: Arm name to recipe.
        rounds: Turns of every arm.
        advance: Called with the arm's name before each turn.

    Returns:
        Arm name to speed; under the launcher those of rank zero, on all ranks.

    Raises:
        UserError: A recipe can't be built.
    """
    order = list(recipes)
    calibration = _take_turn(order[0], recipes[order[0]], 0.0, LEAST_STEPS)
    steps = from_rank_zero(lambda: _steps_per_turn(calibration.step))
    turns: dict[str, list[_Turn]] = {name: [] for name in recipes}
    shuffle = random.Random(0).shuffle
    for turn in range(rounds):
        shuffle(order)
        for name in order:
            advance(name)
            turns[name].append(_take_turn(name, recipes[name], (turn + 0.5) / rounds, steps))
            release_memory()
    speeds = {
        name: Speed(tuple(t.step for t in taken), tuple(t.latency for t in taken), taken[0].batches_per_epoch)
        for name, taken in turns.items()
    }
    return from_rank_zero(lambda: speeds)


@dataclass(frozen=True)
class _Turn:
    step: float
    latency: float
    batches_per_epoch: int


class _Stopwatch(Callback):
    """Times training steps from the fetching of the batch on, and stops training after some of them."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.seconds: list[float] = []
        self._started = 0.0

    def before_dataloader(self, state: State, logger: Logger) -> None:
        self._started = perf_counter()

    def batch_end(self, state: State, logger: Logger) -> None:
        synchronize(_device(state))
        self.seconds.append(perf_counter() - self._started)
        if len(self.seconds) == self.steps:
            state.stop_training()


def _take_turn(name: str, recipe: Recipe, share: float, steps: int) -> _Turn:
    """Infers, then trains some steps from a point of the run's duration on."""
    stopwatch = _Stopwatch(steps)
    try:
        trainer, parts = _build(recipe, stopwatch)
    except UserError as error:
        raise UserError(f"--arm {name}: {error}") from error
    state, loader = trainer.state, parts.train_loader
    assert loader is not None
    batches_per_epoch = int(state.dataloader_len or len(loader))
    # Before training: its data workers would still be fetching beside the inference, which took up to twice as long.
    latency = _latency(parts.network, torch.as_tensor(loader.dataset[0][0])[None], state)
    state.timestamp = _at(share, state, batches_per_epoch, recipe.train_batch_size)
    trainer.fit()
    untimed = len(stopwatch.seconds) // 4  # the first steps allocate, and wait for the data workers
    end_trainer(trainer)
    return _Turn(mean(stopwatch.seconds[untimed:]), latency, batches_per_epoch)


def _build(recipe: Recipe, stopwatch: _Stopwatch) -> tuple[Trainer, Parts]:
    parts = build_parts(recipe, make_plan(recipe))
    trainer = make_trainer(
        parts,
        callbacks=[stopwatch],
        progress_bar=False,
        spin_dataloaders=False,  # would load a batch of every epoch that the turn skips
        **{key: getattr(recipe, key) for key in _OPTIONS},
    )
    return trainer, parts


def _at(share: float, state: State, batches_per_epoch: int, batch_size: int) -> Timestamp:
    """The point of time at a share of the run's duration; at the beginning of an epoch if it is counted in epochs.

    Whatever the point, the turn trains on the images that the epoch begins with.
    """
    assert state.max_duration is not None
    total: Time[int] = state.max_duration
    if total.unit == TimeUnit.EPOCH:
        batch = int(share * total.value) * batches_per_epoch
    else:
        batch = int(share * total.value) // {TimeUnit.BATCH: 1, TimeUnit.SAMPLE: batch_size}[total.unit]
    return Timestamp(epoch=batch // batches_per_epoch, batch=batch, sample=batch * batch_size)


def _latency(network: nn.Module, image: torch.Tensor, state: State) -> float:
    device = _device(state)
    image = image.to(device)
    network.eval()

    def seconds() -> float:
        synchronize(device)
        started = perf_counter()
        inference_step(network, image, lambda: get_precision_context(state.precision, state.precision_config))
        synchronize(device)
        return perf_counter() - started

    seconds()
    once = seconds()
    untimed, timed = from_rank_zero(lambda: steps_per_visit(once))  # sharded weights are gathered by all ranks at once
    times = [seconds() for _ in range(untimed + timed)]
    network.train()
    return median(times[untimed:])


def _device(state: State) -> torch.device:
    return torch.device(state.device.name if state.device.name != "gpu" else "cuda")


def _steps_per_turn(seconds_per_step: float) -> int:
    return min(MOST_STEPS, max(LEAST_STEPS, round(TURN_SECONDS / seconds_per_step)))
