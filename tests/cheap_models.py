"""Models as their libraries build them, made in a fraction of the time: random numbers are copied, not drawn."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

_RANDOM_INITIALISERS = (
    "kaiming_uniform_",
    "kaiming_normal_",
    "xavier_uniform_",
    "xavier_normal_",
    "trunc_normal_",
    "normal_",
    "uniform_",
)
_NOISE = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))


def _fill(tensor: Tensor, *_: Any, **__: Any) -> Tensor:
    """Fills a tensor with numbers of variance 1 / fan-in, which keep activations within range in any network."""
    fan_in = tensor[0].numel() if tensor.dim() > 1 else 1
    noise = _NOISE * fan_in**-0.5
    with torch.no_grad():
        for piece in tensor.view(-1).split(len(noise)):
            piece.copy_(noise[: len(piece)])
    return tensor


@contextlib.contextmanager
def _copied_random_numbers() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for name in _RANDOM_INITIALISERS:
            stack.enter_context(mock.patch.object(nn.init, name, _fill))
        yield


def build(constructor: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
    """Builds a model in which a gradient reaches every layer.

    Weights that start at zero (the last norm of residual branches, classifiers) and dropped branches keep it away.
    """
    with _copied_random_numbers():
        model = constructor(*args, **kwargs)
    for name, parameter in model.named_parameters():
        if not name.endswith("bias") and not nn.parameter.is_lazy(parameter) and not parameter.flatten()[:64].any():
            with torch.no_grad():
                _fill(parameter) if parameter.dim() > 1 else parameter.fill_(1)
    for module in model.modules():
        if type(module).__name__ == "StochasticDepth":
            module.p = 0.0  # pyright: ignore[reportArgumentType]
        elif type(module).__name__ == "DropPath":
            module.drop_prob = 0.0  # pyright: ignore[reportArgumentType]
        elif isinstance(module, nn.Dropout):
            module.p = 0.0
    return model
