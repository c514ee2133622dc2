"""One study: counts and timings of all variants of one network."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from composer_se.cost.counts import Counts, count
from composer_se.cost.layers import LayerTimes, measure_layers
from composer_se.cost.levels import Levels, find_levels, overhead_ratio, time_ratio, typical_seconds
from composer_se.cost.variants import PLAIN, Variant, make_variants
from composer_se.errors import UserError
from composer_se.measure.machine import Machine, describe_machine
from composer_se.measure.steps import autocast_context, image_batch, inference_step, training_step
from composer_se.measure.timing import time_in_turns
from composer_se.measure.uncertainty import Interval
from composer_se.options import SqueezeExciteOptions

__all__ = ["Settings", "Study", "measure"]

# Load average per CPU from which on the machine is called busy.
BUSY = 0.5
# A visit to a layer takes a fraction of one to a network.
ROUNDS_OF_LAYERS = 5


@dataclass(frozen=True)
class Settings:
    """The settings of a study.

    Attributes:
        min_channels: Settings to compare.
        squeeze_excite: The other options, the same for all.
        against_composer: True measures Composer's built-in too, on the same convs.
        batch_size: Images in a training step and in the larger inference batch.
        image_size: Height and width in pixels.
        device: Of networks and images.
        precision: "fp32", "amp_bf16" or "amp_fp16".
        channels_last: Memory format of network and images.
        compiled: True runs networks through `torch.compile`.
        instances: Copies of each variant; two at least.
        rounds: Visits to each copy for each kind of step.
        layers: Whether each different SE layer is also measured alone, for the one setting that there then is.
    """

    min_channels: tuple[int | str, ...]
    squeeze_excite: SqueezeExciteOptions
    against_composer: bool
    batch_size: int
    image_size: int
    device: torch.device
    precision: str
    channels_last: bool
    compiled: bool
    instances: int
    rounds: int
    layers: bool = False

    def shared_options(self) -> dict[str, Any]:
        """The options that all variants with SE share, without those that are None."""
        options = asdict(self.squeeze_excite)
        del options["min_channels"]
        return {name: value for name, value in options.items() if value is not None}


@dataclass(frozen=True)
class Study:
    """The results of a study.

    Attributes:
        network: Name of the network.
        settings: Its settings.
        machine: The machine that it was measured on.
        variants: The plain network first.
        notes: A line for each setting that was left out, and one if the machine was busy.
        counts: Per variant.
        seconds: Per kind of step ("training step", "inference, batch 1", …), per variant, per instance, one time for
            each round.
        layers: What SE adds to single layers, or None where that was not asked for.
        levels: The times of the steps, judged.
    """

    network: str
    settings: Settings
    machine: Machine
    variants: list[Variant]
    notes: list[str]
    counts: dict[str, Counts]
    seconds: dict[str, dict[str, list[list[float]]]]
    layers: LayerTimes | None
    levels: dict[str, Levels] = field(init=False)

    def __post_init__(self) -> None:
        judged = {kind: find_levels(times) for kind, times in self.seconds.items()}
        object.__setattr__(self, "levels", judged)

    def milliseconds(self, kind: str, variant: str) -> float:
        """The typical time of a variant's step."""
        return 1e3 * typical_seconds(self.levels[kind], variant)

    def ratio(self, kind: str, variant: str) -> Interval:
        """The time of a variant's step over that of the plain network."""
        return time_ratio(self.levels[kind], variant, PLAIN)

    def against(self, kind: str, setting: str) -> tuple[Interval, Interval]:
        """Our time over that of Composer's built-in on the same convs, and our overhead over its overhead."""
        names = {v.code: v.name for v in self.variants if v.min_channels == setting}
        ours, theirs = names["composer-se"], names["composer"]
        return (
            time_ratio(self.levels[kind], ours, theirs),
            overhead_ratio(self.levels[kind], ours, theirs, PLAIN),
        )


def measure(name: str, network: nn.Module, settings: Settings, progress: Callable[[str, int, int], None]) -> Study:
    """Measures the cost of SE on one network and this machine.

    Counts come first, one variant in memory at a time. Then several instances of every variant are built in random
    order, and timed in turns: training steps, inference at batch 1, inference at the given batch. The
    optimizer is SGD with a learning rate of 0, so that the last step works on the same weights as the first.

    Args:
        name: Name of the network.
        network: The plain network; it is copied, never changed.
        settings: The settings.
        progress: Called as (a description, steps done, steps in all).

    Returns:
        The study.

    Raises:
        UserError: A setting is wrong, or the network does not run on a batch of images.
    """
    machine = describe_machine(settings.device)
    variants, notes = make_variants(
        network,
        settings.min_channels,
        settings.squeeze_excite,
        against_composer=settings.against_composer,
    )
    if machine.load is not None and machine.load > BUSY * machine.cpus:
        notes.append(
            f"the load average was {machine.load:.1f} on {machine.cpus} CPUs at the start: other programs were running "
            "and may have distorted the timings"
        )
    images, targets = image_batch(
        network, settings.batch_size, settings.image_size, settings.device, settings.channels_last
    )
    autocast = autocast_context(settings.precision, settings.device)
    _try(variants[0], settings, images, targets, autocast)
    sizes = sorted({1, settings.batch_size})
    total = len(variants) * (1 + (1 + len(sizes)) * settings.instances * settings.rounds)
    done = 0

    def advance(what: str) -> None:
        nonlocal done
        done += 1
        progress(what, done, total)

    compile_network = _compile if settings.compiled else None
    counts: dict[str, Counts] = {}
    progress("counting", 0, total)
    for variant in variants:
        counts[variant.name] = count(
            variant.build,
            lambda network: _prepare(network, settings),
            variant.layers,
            images,
            targets,
            autocast,
            compile_network,
        )
        advance("counting")

    layer_times = None
    if settings.layers:
        layer_times = measure_layers(
            _prepare(variants[1].build(), settings),
            images,
            precision=settings.precision,
            compiled=settings.compiled,
            against_composer=settings.against_composer,
            rounds=ROUNDS_OF_LAYERS * settings.rounds,
            progress=progress,
        )
    networks = _instances(variants, settings)
    called = {
        name: [network if compile_network is None else compile_network(network) for network in instances]
        for name, instances in networks.items()
    }
    optimizers = {
        name: [torch.optim.SGD(network.parameters(), lr=0.0) for network in instances]
        for name, instances in networks.items()
    }

    def drop_gradients(name: str, instance: int) -> None:
        optimizers[name][instance].zero_grad(set_to_none=True)

    def turns(kind: str, seed: int, step: Callable[[str, int], Callable[[], object]]) -> None:
        seconds[kind] = time_in_turns(
            {name: [step(name, i) for i in range(len(rows))] for name, rows in networks.items()},
            rounds=settings.rounds,
            device=settings.device,
            seed=seed,
            leave=drop_gradients,
            visited=lambda: advance(kind),
        )

    seconds: dict[str, dict[str, list[list[float]]]] = {}
    turns(
        "training step",
        0,
        lambda name, i: lambda: training_step(called[name][i], optimizers[name][i], images, targets, autocast),
    )
    for instances in networks.values():
        for instance in instances:
            instance.eval()
    for size in sizes:
        batch = images[:size]
        turns(
            f"inference, batch {size}",
            size,
            lambda name, i, batch=batch: lambda: inference_step(called[name][i], batch, autocast),
        )
    return Study(name, settings, machine, variants, notes, counts, seconds, layer_times)


def _prepare(network: nn.Module, settings: Settings) -> nn.Module:
    network = network.to(settings.device)
    if settings.channels_last:
        # The overload with a memory format alone is missing from torch's annotations.
        network = network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return network


def _compile(network: nn.Module) -> Callable[[torch.Tensor], Any]:
    # Every instance and batch size is a version of the same code; past the limit torch runs it uncompiled, silently.
    torch._dynamo.config.cache_size_limit = 1 << 16
    torch._dynamo.config.accumulated_cache_size_limit = 1 << 16
    return torch.compile(network, dynamic=False)


def _instances(variants: list[Variant], settings: Settings) -> dict[str, list[nn.Module]]:
    """Builds all instances in an order drawn by chance: where an instance lies in memory depends on it."""
    order = [variant for variant in variants for _ in range(settings.instances)]
    random.Random(0).shuffle(order)
    networks: dict[str, list[nn.Module]] = {variant.name: [] for variant in variants}
    for variant in order:
        networks[variant.name].append(_prepare(variant.build(), settings).train())
    return networks


def _try(
    plain: Variant, settings: Settings, images: torch.Tensor, targets: torch.Tensor, autocast: Callable[[], Any]
) -> None:
    """One step of the plain network, so that a network that takes no such images is reported in one line."""
    network = _prepare(plain.build(), settings).train()
    try:
        training_step(network, torch.optim.SGD(network.parameters(), lr=0.0), images, targets, autocast)
        inference_step(network.eval(), images[:1], autocast)
    except Exception as error:
        shape = " x ".join(str(size) for size in images.shape)
        reason = str(error).strip().splitlines()
        raise UserError(
            f"the network does not train on a batch of {shape} images in {settings.precision} on {settings.device}: "
            f"{type(error).__name__}: {reason[0] if reason else ''}"
        ) from error
