"""Statistics of the gates of Squeeze-and-Excitation blocks, from sums that add up over batches and processes."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from composer_se.modules import SqueezeExcite2d

__all__ = ["NEAR", "GateStatistics", "describe", "gate_sums", "gate_terms", "moments", "no_sums", "observe_logits"]
__all__ += ["observing", "se_blocks"]

NEAR = 0.05
"""A gate is near 0 below this, near 1 above its complement. Its slope is then less than a fifth of the largest."""

_WRAPPERS = re.compile(r"^((module|_orig_mod)\.)+|_(fsdp_wrapped|checkpoint_wrapped|orig)_mod(ule)?\.")


@dataclass(frozen=True)
class GateStatistics:
    """The gates of one layer over a set of samples."""

    mean: float  # over samples and channels
    # How far one channel's gate varies with the sample: root of the variance over samples, averaged over channels. 0
    # means that the block scales every channel by a fixed number.
    std_over_samples: float
    std_over_channels: float  # how far the mean gates of channels differ
    share_near_0: float  # of gates below `NEAR` times their limit
    share_near_1: float  # of gates above 1 - `NEAR` times their limit


def se_blocks(model: nn.Module) -> dict[str, SqueezeExcite2d]:
    """The Squeeze-and-Excitation blocks of a model in its order, by the qualified name of the conv that carries them.

    The names don't show the wrappers of Composer, DDP, FSDP and checkpointing.
    """
    blocks = ((name, module) for name, module in model.named_modules() if isinstance(module, SqueezeExcite2d))
    return {_WRAPPERS.sub("", name).removesuffix(".se"): block for name, block in blocks}


def observe_logits(block: SqueezeExcite2d, see: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
    """Calls ``see`` with the logits of the gate, (..., C), at every forward pass; what it returns replaces them.

    The hook sits on the last linear layer, where it does not force the plain formula, as one on the block would.
    """

    def hook(_module: nn.Module, _args: Any, logits: Tensor) -> Tensor | None:
        return see(logits)

    return block.pool_and_mlp["4"].register_forward_hook(hook)


@contextlib.contextmanager
def observing(blocks: Mapping[str, SqueezeExcite2d], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Calls ``see`` with a block's name and logits at every forward pass within."""
    with contextlib.ExitStack() as hooks:
        for name, block in blocks.items():
            hooks.enter_context(observe_logits(block, functools.partial(see, name)))
        yield


def no_sums(block: SqueezeExcite2d, device: torch.device) -> Tensor:
    """The `gate_sums` of no samples."""
    last: Any = block.pool_and_mlp["4"]
    return gate_sums(torch.empty(0, last.out_features, device=device), 1.0)


def gate_terms(logits: Tensor, limit: float) -> Tensor:
    """The terms that each sample adds to the sums behind `describe`, from logits and limit of its gates.

    Returns:
        Tensor of shape (N, 3 + 2 C) for N samples: 1, how many of the gates are near 0 and near 1, the gates, their
        squares. In float64, so that a variance is what is left of two large numbers; in float32 on MPS, which has no
        other.
    """
    dtype = torch.float32 if logits.device.type == "mps" else torch.float64
    shares = torch.sigmoid(logits.detach().reshape(-1, logits.shape[-1]).to(dtype))
    counts = [torch.ones_like(shares[:, :1]), *(near.sum(1, True) for near in (shares < NEAR, shares > 1 - NEAR))]
    gates = shares * limit
    return torch.cat([*counts, gates, gates.square()], dim=1)


def gate_sums(logits: Tensor, limit: float) -> Tensor:
    """`gate_terms` summed over samples, (3 + 2 C,). Such sums add up over batches and processes."""
    return gate_terms(logits, limit).sum(0)


def describe(sums: Tensor) -> Tensor:
    """The statistics of one layer in the order of `GateStatistics`, (5,), from (a sum of) `gate_sums`.

    They are NaN where there were no samples.
    """
    num_samples, near_0, near_1 = sums[:3]
    means, variances = moments(sums)
    num_gates = num_samples * len(means)
    return torch.stack(
        [means.mean(), variances.mean().sqrt(), means.std(correction=0), near_0 / num_gates, near_1 / num_gates]
    )


def moments(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance over samples of the gates of every channel, (..., C) each, from `gate_sums`, (..., 3 + 2 C)."""
    means, mean_squares = (sums[..., 3:] / sums[..., :1]).chunk(2, -1)
    return means, (mean_squares - means.square()).clamp(min=0)
