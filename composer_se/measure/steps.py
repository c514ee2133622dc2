"""One training step and one inference step, the same for every variant."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_iter

__all__ = ["image_batch", "inference_step", "loss_of", "training_step"]


def image_batch(
    network: nn.Module, batch_size: int, image_size: int, device: torch.device, channels_last: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of noise with as many channels as the network's first conv takes.

    Returns:
        Images (N, C, H, W) and targets (N,): whole numbers, which `loss_of` takes modulo the number of classes.
    """
    channels = next((m.in_channels for m in network.modules() if isinstance(m, nn.Conv2d)), 3)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch_size, channels, image_size, image_size, generator=generator).to(device)
    targets = torch.randint(2**31, (batch_size,), generator=generator).to(device)
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    return images, targets


def loss_of(outputs: Any, targets: torch.Tensor) -> torch.Tensor:
    """Adds the cross entropy of every (N, classes) tensor among the outputs, and the elements of every other tensor.

    The outputs are tensors in any nesting (auxiliary heads, dictionaries). Targets are whole numbers (N,), taken modulo
    the number of classes.

    Raises:
        TypeError: If there is no floating-point tensor among the outputs.
    """
    losses = [
        nn.functional.cross_entropy(out, targets % out.shape[1]) if out.ndim == 2 else out.float().sum()
        for out in tree_iter(outputs)
        if isinstance(out, torch.Tensor) and out.is_floating_point()
    ]
    if not losses:
        raise TypeError(f"the network returned no floating-point tensor but a {type(outputs).__name__}")
    return torch.stack(losses).sum()


def training_step(
    network: Callable[[torch.Tensor], Any],
    optimizer: torch.optim.Optimizer,
    images: torch.Tensor,
    targets: torch.Tensor,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> None:
    """Runs forward, loss, backward and optimizer step, without a gradient scaler: it costs every variant the same."""
    optimizer.zero_grad(set_to_none=True)
    with autocast():
        loss = loss_of(network(images), targets)
    loss.backward()
    optimizer.step()


def inference_step(
    network: Callable[[torch.Tensor], Any],
    images: torch.Tensor,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> None:
    """Runs a forward pass in inference mode. The network must be in evaluation mode."""
    with torch.inference_mode(), autocast():
        network(images)
