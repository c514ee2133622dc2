"""Counts the bytes that autograd keeps between the forward and the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

__all__ = ["saved_bytes"]


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
