"""Counts the costs of a variant that are exact, and its peak memory on a GPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from composer_se.cost.passes import full_size_passes
from composer_se.cost.saved import saved_bytes
from composer_se.measure.steps import loss_of, training_step
from composer_se.selection import following_norms

__all__ = ["Counts", "count"]


@dataclass(frozen=True)
class Counts:
    """Exact costs of one variant.

    Attributes:
        parameters: Numbers to train.
        multiply_adds: Of one image's forward pass, in convolutions and matrix products.
        saved_bytes: Saved for backward by the forward pass and the loss of one batch. Parameters and buffers are not
            counted; the images, which the first conv saves, are, for the plain network as for the others.
        passes: Full-size passes that each SE layer adds to conv and norm in a training step, in model order.
        peak_bytes: Most GPU memory in use during a training step, weights and gradients included, or None on the CPU.
    """

    parameters: int
    multiply_adds: int
    saved_bytes: int
    passes: tuple[int, ...]
    peak_bytes: int | None


def count(
    build: Callable[[], nn.Module],
    prepare: Callable[[nn.Module], nn.Module],
    layers: tuple[str, ...],
    images: torch.Tensor,
    targets: torch.Tensor,
    autocast: Callable[[], AbstractContextManager[Any]],
    compile_network: Callable[[nn.Module], Callable[[torch.Tensor], Any]] | None,
) -> Counts:
    """Counts the costs of one variant.

    Args:
        build: Makes the variant on the CPU.
        prepare: Brings it to its device and memory format.
        layers: Qualified names of its SE-wrapped convs.
        images: The batch, (N, C, H, W).
        targets: Its targets, (N,).
        autocast: Makes the context of forward passes.
        compile_network: `torch.compile` as the timed network has it, or None. Saved bytes and peak memory are then the
            compiled network's; the passes are left out, since a compiled kernel shows none of its own.

    Returns:
        The counts.
    """
    device = images.device
    resident = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    network = prepare(build()).train()
    called = network if compile_network is None else compile_network(network)

    def forward() -> torch.Tensor:
        with autocast():
            return loss_of(called(images), targets)

    saved = saved_bytes(forward, (*network.parameters(), *network.buffers()))
    passes = _passes(network, layers, images[:1], autocast) if compile_network is None else ()
    peak = None
    if device.type == "cuda":
        peak = _peak_bytes(network, called, images, targets, autocast) - resident
    return Counts(
        parameters=sum(p.numel() for p in network.parameters()),
        multiply_adds=_multiply_adds(network, images[:1]),
        saved_bytes=saved,
        passes=passes,
        peak_bytes=peak,
    )


def _multiply_adds(network: nn.Module, image: torch.Tensor) -> int:
    network.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(image)
    network.train()
    return counter.get_total_flops() // 2


def _passes(
    network: nn.Module,
    layers: tuple[str, ...],
    image: torch.Tensor,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> tuple[int, ...]:
    """The passes of each SE layer, run alone with its norm on an input like the one that it has in the network."""
    wrappers = [network.get_submodule(name) for name in layers]
    inputs: dict[nn.Module, torch.Tensor] = {}

    def remember(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        inputs.setdefault(module, args[0])

    handles = [wrapper.register_forward_pre_hook(remember) for wrapper in wrappers]
    network.eval()
    with torch.no_grad(), autocast():
        network(image)
    network.train()
    for handle in handles:
        handle.remove()
    norms = following_norms(network)
    passes = []
    for wrapper in wrappers:
        if wrapper not in inputs:
            continue  # a layer that the network never calls passes over nothing
        norm = [copy.deepcopy(norms[wrapper])] if wrapper in norms else []
        with_se, plain = (nn.Sequential(conv, *norm) for conv in (wrapper, wrapper.get_submodule("conv")))
        images = torch.cat([inputs[wrapper]] * _batch_size_apart(with_se))
        passes.append(full_size_passes(with_se, plain, images, autocast))
    return tuple(passes)


def _batch_size_apart(layer: nn.Module) -> int:
    """A batch size at which no parameter, and so no gradient of one, has as many elements as the layer's output map."""
    primes = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31)
    return next(n for n in primes if all(parameter.numel() % n for parameter in layer.parameters()))


def _peak_bytes(
    network: nn.Module,
    called: Callable[[torch.Tensor], Any],
    images: torch.Tensor,
    targets: torch.Tensor,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> int:
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
    for step in range(2):  # the first one makes the libraries' workspaces
        if step == 1:
            torch.cuda.reset_peak_memory_stats(images.device)
        training_step(called, optimizer, images, targets, autocast)
    return torch.cuda.max_memory_allocated(images.device)
