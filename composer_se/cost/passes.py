"""Counts full-size passes: reads and writes of memory as large as the output of an SE layer's conv."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

__all__ = ["FullSizePasses", "full_size_passes"]

# Operators that use only the shape and dtype of a tensor, or that overwrite it.
_NOT_READ = {
    *("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like"),
    *("new_empty", "new_empty_strided", "new_zeros", "new_ones", "new_full"),
    *("zero_", "zero", "fill_", "fill", "is_same_size", "resize_", "set_"),
}
# Operators that return memory without writing to it.
_NOT_WRITTEN = {"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided", "resize_"}


class FullSizePasses(TorchDispatchMode):
    """Counts, operator by operator, the reads and writes of tensors with a given number of elements.

    The convention, applied to every ATen operator that runs below autograd:

    - each distinct storage among its inputs is one read, and each distinct storage that it fills is one write, however
      often the kernel accesses it;
    - an in-place operator both reads and writes its tensor; `out=` arguments and the target of `copy_` are only
      written;
    - only elements in memory count, so a stride-0 `expand` of a small tensor is small;
    - views, and operators that only read a shape, count nothing.

    `reads` and `writes` hold the counts so far.
    """

    def __init__(self, numel: int):
        super().__init__()
        self.numel = numel
        self.reads = 0
        self.writes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        read, written = _operands(func, args, kwargs, result)
        self.reads += len({_address(t) for t in read if _elements(t) == self.numel})
        self.writes += len({_address(t) for t in written if _elements(t) == self.numel})
        return result


def full_size_passes(
    with_se: nn.Module, plain: nn.Module, inputs: torch.Tensor, autocast: Callable[[], AbstractContextManager[Any]]
) -> int:
    """Counts the full-size passes that SE adds to one layer in one training step, forward and backward.

    Runs the layer alone on `inputs`. The backward pass computes gradients of `inputs` and all parameters from a
    gradient of ones. Subtracts the passes of the layer without SE.

    Args:
        with_se: The conv or norm with its SE block, and the norm after a conv if there is one.
        plain: The same without SE.
        inputs: The layer's input in the network, (N, C, H, W).
        autocast: Returns the context of the forward pass.
    """
    with torch.no_grad(), autocast():
        numel = plain(inputs).numel()
    return _passes(with_se, inputs, numel, autocast) - _passes(plain, inputs, numel, autocast)


def _passes(
    layer: nn.Module, inputs: torch.Tensor, numel: int, autocast: Callable[[], AbstractContextManager[Any]]
) -> int:
    inputs = inputs.detach().clone().requires_grad_()
    counter = FullSizePasses(numel)
    with counter, autocast():
        output = layer(inputs)
    gradient = torch.ones_like(output)
    with counter:
        torch.autograd.grad(output, [inputs, *layer.parameters()], gradient)
    return counter.reads + counter.writes


def _operands(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The tensors that one operator read and those that it wrote."""
    name = func._schema.name.removeprefix("aten::")
    read, written, inputs = [], [], set()
    for argument, value in _bind(func._schema.arguments, args, kwargs):
        mutated = argument.alias_info is not None and argument.alias_info.is_write
        for tensor in _tensors(value):
            inputs.add(_address(tensor))
            if mutated and name not in _NOT_WRITTEN:
                written.append(tensor)
            overwritten = mutated and (argument.is_out or name == "copy_")
            if name not in _NOT_READ and not overwritten:
                read.append(tensor)
    outputs = list(_tensors(result))
    fresh = [tensor for tensor in outputs if _address(tensor) not in inputs]
    if outputs and not fresh and not written:
        return [], []  # a view
    return read, written if name in _NOT_WRITTEN else written + fresh


def _bind(arguments: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[Any, Any]]:
    """Pairs a schema's arguments with the values of one call, without those left out: their defaults are no tensors."""
    named = {argument.name: argument for argument in arguments}
    return [*zip(arguments, args, strict=False), *((named[name], value) for name, value in kwargs.items())]


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_iter(value) if isinstance(leaf, torch.Tensor))


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _elements(tensor: torch.Tensor) -> int:
    """The elements that a tensor has in memory: a dimension of stride 0 only repeats them."""
    return math.prod(size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or not size)
