"""Measures the speed of an arm in short turns, so that the drift of the machine favours no arm.

The times of the runs themselves are too noisy: on a shared machine, a step can take 10 % longer in one hour than in the
next, and arms differ by less. A turn trains some steps of the recipe, with its data loading and algorithms. The turns
are at several points of the run's duration, since an algorithm may work in a part of it only. A turn does not measure
the work of algorithms between epochs, nor the gain from layers that an algorithm has frozen by then.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import mean, median
from time import perf_counter

import torch
from composer import Callback, State
from composer.core import Time, Timestamp, TimeUnit, get_precision_context
from composer.loggers import Logger
from torch import nn

from composer_se.compare.arms import checking
from composer_se.measure.steps import inference_step
from composer_se.measure.timing import steps_per_visit, synchronize, time_step
from composer_se.recipe.distributed import from_rank_zero
from composer_se.recipe.schema import Recipe, keys
from composer_se.recipe.trainer import build_parts, end_trainer, make_trainer, release_memory
from composer_se.recipe.validate import make_plan

__all__ = ["Speed", "Turn", "steps_per_turn", "take_turn"]

TURN_SECONDS = 3.0
LEAST_STEPS, MOST_STEPS = 8, 400

# The options of the Trainer that a step's time depends on, and others that a turn needs.
_OPTIONS = (*keys("trainer", "speed"), "seed", "dist_timeout")


@dataclass(frozen=True)
class Speed:
    """The speed of an arm, turn by turn."""

    step: tuple[float, ...]  # seconds per training step, loading the batch included; the mean of each turn
    latency: tuple[float, ...]  # seconds per image, one at a time, in inference; the median of each turn
    batches_per_epoch: int


@dataclass(frozen=True)
class Turn:
    """One turn of one arm: the numbers of `Speed` for this turn."""

    step: float
    latency: float
    batches_per_epoch: int


def steps_per_turn(name: str, recipe: Recipe) -> int:
    """Times a short turn of one arm, and returns the number of steps of a full turn, the same on all ranks."""
    seconds = take_turn(name, recipe, 0.0, LEAST_STEPS).step
    return from_rank_zero(lambda: min(MOST_STEPS, max(LEAST_STEPS, round(TURN_SECONDS / seconds))))


class _Stopwatch(Callback):
    """Times training steps, loading the batch included, and stops training after `steps` of them."""

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


def take_turn(name: str, recipe: Recipe, share: float, steps: int) -> Turn:
    """Times inference, then some training steps, of which the first quarter is not counted.

    Args:
        name: The name of the arm.
        recipe: The arm's recipe.
        share: Where in the run's duration the steps are taken, from 0 to 1.
        steps: The number of training steps.

    Returns:
        The times of rank zero, on all ranks.

    Raises:
        UserError: If the recipe can't be built.
    """
    stopwatch = _Stopwatch(steps)
    with checking(name):
        parts = build_parts(recipe, make_plan(recipe))
        trainer = make_trainer(
            parts,
            callbacks=[stopwatch],
            progress_bar=False,
            spin_dataloaders=False,  # would load a batch of every epoch that the turn skips
            **{key: getattr(recipe, key) for key in _OPTIONS},
        )
    state, loader = trainer.state, parts.train_loader
    assert loader is not None
    batches_per_epoch = int(state.dataloader_len or len(loader))
    # Before training: the data workers of training would slow down inference, up to twofold.
    latency = _latency(parts.network, torch.as_tensor(loader.dataset[0][0])[None], state)
    state.timestamp = _at(share, state, batches_per_epoch, recipe.train_batch_size)
    trainer.fit()
    untimed = len(stopwatch.seconds) // 4  # the first steps allocate, and wait for the data workers
    end_trainer(trainer)
    release_memory()
    return from_rank_zero(lambda: Turn(mean(stopwatch.seconds[untimed:]), latency, batches_per_epoch))


def _at(share: float, state: State, batches_per_epoch: int, batch_size: int) -> Timestamp:
    """The timestamp at a share of the run's duration; the start of an epoch if the duration is in epochs.

    At every timestamp, the turn trains on the first images of the epoch.
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

    def step() -> None:
        inference_step(network, image, lambda: get_precision_context(state.precision, state.precision_config))

    step()
    once = time_step(step, device)
    untimed, timed = from_rank_zero(lambda: steps_per_visit(once))  # all ranks gather sharded weights together
    times = [time_step(step, device) for _ in range(untimed + timed)]
    network.train()
    return median(times[untimed:])


def _device(state: State) -> torch.device:
    return torch.device(state.device.name if state.device.name != "gpu" else "cuda")
