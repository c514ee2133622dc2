"""The settings of a study."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from composer_se.options import SqueezeExciteOptions

__all__ = ["Settings"]


@dataclass(frozen=True)
class Settings:
    """Which variants a study measures, and how."""

    min_channels: tuple[int | str, ...]  # settings to compare
    squeeze_excite: SqueezeExciteOptions  # the other options, the same for all
    against_composer: bool  # measures Composer's built-in too, on the same convs
    batch_size: int  # of a training step and of the larger inference batch
    image_size: int  # height and width in pixels
    device: torch.device
    precision: str  # "fp32", "amp_bf16" or "amp_fp16"
    channels_last: bool
    compiled: bool  # through `torch.compile`
    instances: int  # copies of each variant; at least two
    rounds: int  # visits to each copy for each kind of step
    layers: bool  # measures each kind of SE layer alone, too; needs a single setting of `min_channels`

    def shared_options(self) -> dict[str, Any]:
        """The options that all variants with SE share, without those that are None."""
        options = asdict(self.squeeze_excite)
        del options["min_channels"]
        return {name: value for name, value in options.items() if value is not None}

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of a forward pass."""
        dtype = {"fp32": None, "amp_bf16": torch.bfloat16, "amp_fp16": torch.float16}[self.precision]
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)

    def placed(self, network: nn.Module) -> nn.Module:
        """Moves a network to the device, and into the memory format."""
        network = network.to(self.device)
        if self.channels_last:
            # The overload with a memory format alone is missing from torch's annotations.
            network = network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        return network

    def compile(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Compiles a network or function if `compiled` is set."""
        if not self.compiled:
            return forward
        # torch compiles the code once per instance and batch size. Past the limit it silently runs it uncompiled.
        torch._dynamo.config.cache_size_limit = 1 << 16
        torch._dynamo.config.accumulated_cache_size_limit = 1 << 16
        return torch.compile(forward, dynamic=False)
