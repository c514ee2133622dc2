"""Counts the exact costs of a variant, and measures its peak memory on a GPU."""

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
    # Bytes that the forward pass and the loss of one batch save for backward. They include the images, which the first
    # conv saves, but no parameters or buffers.
    saved_bytes: int
    # Full-size passes that each SE layer adds to a training step of its conv and norm, in model order.
    passes: tuple[int, ...]
    peak_bytes: int | None  # of a training step, weights and gradients included; None on the CPU


def count(variant: Variant, settings: Settings, images: torch.Tensor, targets: torch.Tensor) -> Counts:
    """Counts the costs of one variant on a batch of images (N, C, H, W) and targets (N,).

    If `settings.compiled` is set, saved bytes and peak memory are those of the compiled network. Passes are not counted
    then, because compiled kernels hide them.
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
        for _ in range(2):  # the first step allocates the libraries' workspaces
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

    A hook sees every tensor that autograd saves, and counts each storage once, in full. A tensor that two operations
    save, or a view of a saved tensor, adds nothing. Give parameters and buffers as `exclude`: they take memory without
    a backward pass too.

    Args:
        forward: Runs the forward pass and the loss, with gradients enabled. Its result is kept alive until the count
            is done.
        exclude: Tensors whose storages are not counted.
    """
    excluded = {tensor.untyped_storage().data_ptr() for tensor in exclude}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        # While `storages` holds the storage, no other tensor can get its address.
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
    """Counts the passes of each SE layer, run alone with its norm on copies of its input in the network."""
    passes = []
    for layer in called_layers(network, names, image, settings.autocast):
        norm = [] if layer.norm in (None, layer.bare) else [copy.deepcopy(layer.norm)]
        with_se, plain = (nn.Sequential(part, *norm) for part in (layer.wrapper, layer.bare))
        images = torch.cat([layer.image] * _batch_size_apart(with_se, settings.batch_size))
        passes.append(full_size_passes(with_se, plain, images, settings.autocast))
    return tuple(passes)


def _batch_size_apart(layer: nn.Module, least: int) -> int:
    """The first batch size from `least` on at which no parameter has as many elements as the layer's output map."""
    return next(
        n for n in itertools.count(max(2, least)) if all(parameter.numel() % n for parameter in layer.parameters())
    )
