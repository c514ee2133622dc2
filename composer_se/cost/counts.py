"""Counts the costs of a variant that are exact, and its peak memory on a GPU."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from composer_se.cost.passes import full_size_passes
from composer_se.cost.settings import Settings
from composer_se.cost.variants import Variant, called_layers
from composer_se.measure.steps import loss_of, training_step

__all__ = ["Counts", "count", "saved_bytes"]


@dataclass(frozen=True)
class Counts:
    """Exact costs of one variant."""

    parameters: int
    multiply_adds: int  # of one image's forward pass, in convolutions and matrix products
    # What the forward pass and the loss of one batch save for backward: the images too, which the first conv saves,
    # but no parameters and buffers.
    saved_bytes: int
    passes: tuple[
        int, ...
    ]  # full-size ones that each SE layer adds to conv and norm in a training step, in model order
    peak_bytes: int | None  # of a training step, weights and gradients included; None on the CPU


def count(variant: Variant, settings: Settings, images: torch.Tensor, targets: torch.Tensor) -> Counts:
    """Counts the costs of one variant on a batch of images (N, C, H, W) and targets (N,).

    Where networks are compiled, saved bytes and peak memory are the compiled network's; the passes are left out, since
    a compiled kernel shows none of its own.
    """
    device = images.device
    resident = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    network = settings.placed(variant.build()).train()
    called = settings.compile(network)

    def forward() -> torch.Tensor:
        with settings.autocast():
            return loss_of(called(images), targets)

    saved = saved_bytes(forward, (*network.parameters(), *network.buffers()))
    passes = () if settings.compiled else _passes(network, variant.layers, images[:1], settings)
    peak = None
    if device.type == "cuda":
        optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
        for _ in range(2):  # the first one makes the libraries' workspaces
            torch.cuda.reset_peak_memory_stats(device)
            training_step(called, optimizer, images, targets, settings.autocast)
        peak = torch.cuda.max_memory_allocated(device) - resident
    return Counts(
        parameters=sum(p.numel() for p in network.parameters()),
        multiply_adds=_multiply_adds(network, images[:1]),
        saved_bytes=saved,
        passes=passes,
        peak_bytes=peak,
    )


def saved_bytes(forward: Callable[[], object], exclude: Iterable[torch.Tensor] = ()) -> int:
    """Counts the bytes that `forward` leaves saved for its backward pass.

    Every tensor that autograd saves passes through a hook. The hook counts the whole storage behind it once: a tensor
    saved by two operations, or a view of it, adds nothing. Give parameters and buffers as `exclude`; they exist with or
    without a backward pass.

    Args:
        forward: Runs the forward pass and the loss, with gradients enabled. Its result is kept alive until the count
            is done.
        exclude: Tensors whose storages are not counted.
    """
    excluded = {tensor.untyped_storage().data_ptr() for tensor in exclude}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        # Holding the storage keeps its address from being given to another tensor while the count runs.
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in excluded:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
        total = sum(storage.nbytes() for storage in storages.values())
    del result
    return total


def _multiply_adds(network: nn.Module, image: torch.Tensor) -> int:
    network.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(image)
    network.train()
    return counter.get_total_flops() // 2


def _passes(network: nn.Module, names: tuple[str, ...], image: torch.Tensor, settings: Settings) -> tuple[int, ...]:
    """Counts the passes of each SE layer. It runs alone with its norm, on its input in the network, repeated."""
    passes = []
    for layer in called_layers(network, names, image, settings.autocast):
        norm = [] if layer.norm in (None, layer.bare) else [copy.deepcopy(layer.norm)]
        with_se, plain = (nn.Sequential(part, *norm) for part in (layer.wrapper, layer.bare))
        images = torch.cat([layer.image] * _batch_size_apart(with_se))
        passes.append(full_size_passes(with_se, plain, images, settings.autocast))
    return tuple(passes)


def _batch_size_apart(layer: nn.Module) -> int:
    """A batch size at which no parameter, and so no gradient of one, has as many elements as the layer's output map."""
    return next(n for n in itertools.count(2) if all(parameter.numel() % n for parameter in layer.parameters()))
