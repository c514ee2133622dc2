"""Runs a study: counts the costs of all variants of one network, and times them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import nn

from composer_se.cost.counts import Counts, count
from composer_se.cost.layers import LayerTimes, measure_layers
from composer_se.cost.levels import Levels, find_levels
from composer_se.cost.settings import Settings
from composer_se.cost.variants import Variant, make_variants
from composer_se.errors import UserError
from composer_se.measure.machine import Machine, describe_machine
from composer_se.measure.steps import image_batch, inference_step, training_step
from composer_se.measure.timing import time_in_turns
from composer_se.show.terminal import Progress, counted

__all__ = ["Study", "measure"]

# Load average per CPU above which a note says that the machine was busy.
BUSY = 0.5


@dataclass(frozen=True)
class Study:
    """The results of a study."""

    network: str  # its name
    settings: Settings
    machine: Machine
    variants: list[Variant]  # the plain network first
    notes: list[str]  # one for each setting that was left out, and one if the machine was busy
    counts: dict[str, Counts]  # by variant
    seconds: dict[
        str, dict[str, list[list[float]]]
    ]  # by kind of step ("training step", …), variant, instance and round
    layers: LayerTimes | None  # the times of single layers; None if the settings don't ask for them

    @cached_property
    def levels(self) -> dict[str, Levels]:
        """The levels of all instances, by kind of step."""
        return {kind: find_levels(times) for kind, times in self.seconds.items()}

    def of_code(self, code: str) -> list[Variant]:
        """The variants with the SE of one code, in the order of the settings."""
        return [variant for variant in self.variants if variant.code == code]


def measure(name: str, network: nn.Module, settings: Settings, progress: Progress) -> Study:
    """Measures the cost of SE on one network and this machine.

    Counts first, with one variant in memory at a time. Then builds several instances of every variant in random order,
    and times them in turns: training steps, inference at batch 1, inference at the given batch. The optimizer is SGD
    with a learning rate of 0, so that all steps work on the same weights.

    Args:
        name: Name of the network.
        network: The plain network; it is copied, never changed.
        settings: The settings.
        progress: Called after each count and each visit.

    Raises:
        UserError: If a setting is wrong, or the network does not run on a batch of images.
    """
    machine = describe_machine(settings.device)
    variants, notes = make_variants(
        network, settings.min_channels, settings.squeeze_excite, against_composer=settings.against_composer
    )
    if machine.load is not None and machine.load > BUSY * machine.cpus:
        notes.append(
            f"the load average was {machine.load:.1f} on {machine.cpus} CPUs at the start: other programs were running "
            "and may have distorted the timings"
        )
    images, targets = image_batch(
        network, settings.batch_size, settings.image_size, settings.device, settings.channels_last
    )
    _try(variants[0], settings, images, targets)
    sizes = sorted({1, settings.batch_size})
    advance = counted(progress, len(variants) * (1 + (1 + len(sizes)) * settings.instances * settings.rounds))
    counts: dict[str, Counts] = {}
    for variant in variants:
        counts[variant.name] = count(variant, settings, images, targets)
        advance("counting")
    layers = (
        measure_layers(settings.placed(variants[1].build()), images, settings, progress) if settings.layers else None
    )
    instances = _instances(variants, settings)
    seconds: dict[str, dict[str, list[list[float]]]] = {}

    def take_turns(kind: str, seed: int, step: Callable[[_Instance], object]) -> None:
        seconds[kind] = time_in_turns(
            {name: [partial(step, instance) for instance in same] for name, same in instances.items()},
            rounds=settings.rounds,
            device=settings.device,
            seed=seed,
            leave=lambda name, i: instances[name][i].optimizer.zero_grad(set_to_none=True),
            visited=lambda: advance(kind),
        )

    take_turns("training step", 0, lambda i: training_step(i.called, i.optimizer, images, targets, settings.autocast))
    for same in instances.values():
        for instance in same:
            instance.network.eval()
    for size in sizes:
        batch = images[:size]
        take_turns(f"inference, batch {size}", size, lambda i, x=batch: inference_step(i.called, x, settings.autocast))
    return Study(name, settings, machine, variants, notes, counts, seconds, layers)


class _Instance:
    """One copy of a variant."""

    def __init__(self, variant: Variant, settings: Settings) -> None:
        self.network = settings.placed(variant.build()).train()
        self.called = settings.compile(self.network)
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=0.0)


def _instances(variants: list[Variant], settings: Settings) -> dict[str, list[_Instance]]:
    """Builds all instances in random order, because their places in memory depend on the order."""
    order = [variant for variant in variants for _ in range(settings.instances)]
    random.Random(0).shuffle(order)
    instances: dict[str, list[_Instance]] = {variant.name: [] for variant in variants}
    for variant in order:
        instances[variant.name].append(_Instance(variant, settings))
    return instances


def _try(plain: Variant, settings: Settings, images: torch.Tensor, targets: torch.Tensor) -> None:
    """Runs a training and an inference step of the plain network, and reports a failure in one line."""
    network = settings.placed(plain.build()).train()
    try:
        training_step(network, torch.optim.SGD(network.parameters(), lr=0.0), images, targets, settings.autocast)
        inference_step(network.eval(), images[:1], settings.autocast)
    except Exception as error:
        shape = " x ".join(str(size) for size in images.shape)
        reason = str(error).strip().splitlines()
        raise UserError(
            f"the network does not train on a batch of {shape} images in {settings.precision} on {settings.device}: "
            f"{type(error).__name__}: {reason[0] if reason else ''}"
        ) from error
