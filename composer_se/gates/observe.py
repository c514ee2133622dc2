"""Computes statistics of the gates of Squeeze-and-Excitation blocks, from sums over batches and processes."""

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
"""A gate is near 0 below this share of its limit, and near 1 above 1 minus this share.

The sigmoid's slope is then less than a fifth of its largest.
"""

_WRAPPERS = re.compile(r"^((module|_orig_mod)\.)+|_(fsdp_wrapped|checkpoint_wrapped|orig)_mod(ule)?\.")


@dataclass(frozen=True)
class GateStatistics:
    """The gates of one layer over a set of samples."""

    mean: float  # over samples and channels
    # Root of the gates' variance over samples, the variance averaged over channels. 0 means that the block scales every
    # channel by a fixed number.
    std_over_samples: float
    std_over_channels: float  # standard deviation of the channels' mean gates
    share_near_0: float  # of gates below `NEAR` times their limit
    share_near_1: float  # of gates above (1 - `NEAR`) times their limit


def se_blocks(model: nn.Module) -> dict[str, SqueezeExcite2d]:
    """The Squeeze-and-Excitation blocks of a model, in model order, by the qualified name of their conv or norm.

    The names are without the prefixes of Composer, DDP, FSDP, checkpointing and `torch.compile`.
    """
    blocks = ((name, module) for name, module in model.named_modules() if isinstance(module, SqueezeExcite2d))
    return {_WRAPPERS.sub("", name).removesuffix(".se"): block for name, block in blocks}


def observe_logits(block: SqueezeExcite2d, see: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
    """Calls ``see`` with the gates' logits, (..., C), at every forward pass. Its result, unless None, replaces them.

    The hook is on the last linear layer. A hook on the block would switch off the fast formulas.
    """

    def hook(_module: nn.Module, _args: Any, logits: Tensor) -> Tensor | None:
        return see(logits)

    return block.pool_and_mlp["4"].register_forward_hook(hook)


@contextlib.contextmanager
def observing(blocks: Mapping[str, SqueezeExcite2d], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Calls ``see`` with a block's name and logits at every forward pass inside the context."""
    with contextlib.ExitStack() as hooks:
        for name, block in blocks.items():
            hooks.enter_context(observe_logits(block, functools.partial(see, name)))
        yield


def no_sums(block: SqueezeExcite2d, device: torch.device) -> Tensor:
    """The `gate_sums` of no samples."""
    last: Any = block.pool_and_mlp["4"]
    return gate_sums(torch.empty(0, last.out_features, device=device), 1.0)


def gate_terms(logits: Tensor, limit: float) -> Tensor:
    """The terms that each sample adds to `gate_sums`, from the logits and the limit of its gates.

    Returns:
        Tensor of shape (N, 3 + 2 C) for N samples: 1, the numbers of gates near 0 and near 1, the gates, their squares.
        In float64, because a variance is a small difference of large sums; in float32 on MPS, which has no float64.
    """
    dtype = torch.float32 if logits.device.type == "mps" else torch.float64
    shares = torch.sigmoid(logits.detach().reshape(-1, logits.shape[-1]).to(dtype))
    counts = [torch.ones_like(shares[:, :1]), *(near.sum(1, True) for near in (shares < NEAR, shares > 1 - NEAR))]
    gates = shares * limit
    return torch.cat([*counts, gates, gates.square()], dim=1)


def gate_sums(logits: Tensor, limit: float) -> Tensor:
    """The sum of `gate_terms` over samples, (3 + 2 C,). The sums of batches and processes can be added."""
    return gate_terms(logits, limit).sum(0)


def describe(sums: Tensor) -> Tensor:
    """The statistics of one layer in the order of `GateStatistics`, (5,), from `gate_sums`.

    Without samples they are NaN.
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
