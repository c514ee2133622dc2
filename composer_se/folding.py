"""Folds blocks with constant gates into the weights of their layers."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from composer_se.errors import did_you_mean
from composer_se.functional import take_out_blocks
from composer_se.selection import check_not_wrapped
from composer_se.surgery import check_optimizers
from composer_se.wrapper import SqueezeExcited

__all__ = ["fold_constant_gates"]


def fold_constant_gates(
    model: nn.Module, gates: Mapping[str, Tensor], optimizers: Optimizer | Sequence[Optimizer] | None = None
) -> dict[str, nn.Module]:
    """Folds blocks with constant gates into the weights of their layers, in place.

    ``gates`` holds the factors of the maps, between 0 and 2 for a block with ``init="identity"``. Blocks of other
    layers stay. You can also fold a gate that depends on the image, for instance at its mean; the outputs change then.

    Args:
        model: The model, not wrapped in DDP or FSDP.
        gates: The gates of each layer, (C,) for C output channels, by the layer's qualified name.
        optimizers: The optimizers of the model's parameters. The parameters of the removed blocks leave them. Default:
            none.

    Returns:
        The bare layers, by the names in ``gates``.

    Raises:
        TypeError: If the model is wrapped in DDP or FSDP.
        ValueError: If a name is not that of a layer with a block, two names are of the same layer, gates have another
            shape or are not finite, a layer has no weight that could take the gates (a norm without affine parameters),
            shares its weight or standardises it, or an optimizer holds none of the model's parameters. The model and
            the optimizers are as before.

    Example:
        >>> import torch
        >>> from torchvision.models import resnet18
        >>> model = resnet18()
        >>> len(apply_squeeze_excite(model, min_channels=512))
        5
        >>> folded = fold_constant_gates(model, {"layer4.1.conv2": torch.full((512,), 0.5)})
    """
    check_not_wrapped(model)
    check_optimizers(model, optimizers)
    modules = model.named_modules(remove_duplicate=False)
    wrappers = {name: module for name, module in modules if isinstance(module, SqueezeExcited)}
    users = Counter(parameter for module in model.modules() for parameter in module._parameters.values())
    chosen: dict[str, SqueezeExcited] = {}
    for name in gates:
        if name not in wrappers:
            raise ValueError(f"gates: no layer {name!r} with Squeeze-and-Excitation{did_you_mean(name, wrappers)}")
        if not name:
            raise ValueError("gates: the model is itself a layer with a block, which can't be replaced in place")
        twin = next((other for other, wrapper in chosen.items() if wrapper is wrappers[name]), None)
        if twin is not None:
            raise ValueError(f"gates: {twin} and {name} are the same layer; name it once")
        chosen[name] = wrappers[name]
    scales = {name: torch.as_tensor(given).detach() for name, given in gates.items()}
    for name, wrapper in chosen.items():
        _check(name, wrapper.layer, scales[name])
        if any(users[parameter] > 1 for parameter in _weight_and_bias(wrapper.layer)):
            raise ValueError(f"gates: {name} shares its weights with another layer, which its gates must not scale")
    bare = take_out_blocks(model, chosen, optimizers)
    for name, layer in bare.items():
        _scale(layer, scales[name])
    return bare


def _weight_and_bias(layer: nn.Module) -> list[nn.Parameter]:
    found = (layer._parameters.get(name) for name in ("weight", "bias"))
    return [parameter for parameter in found if parameter is not None]


@torch.no_grad()
def _scale(layer: nn.Module, gates: Tensor) -> None:
    for parameter in _weight_and_bias(layer):
        parameter.mul_(gates.to(parameter).view(-1, *[1] * (parameter.ndim - 1)))


def _check(name: str, layer: nn.Module, gates: Tensor) -> None:
    weight = layer._parameters.get("weight")
    if weight is None:
        raise ValueError(f"gates: {name} is a {type(layer).__name__} without a plain weight to multiply its gates into")
    if gates.shape != weight.shape[:1]:
        raise ValueError(f"gates: {name} has {len(weight)} channels, but gates of shape {tuple(gates.shape)}")
    if not gates.isfinite().all():
        raise ValueError(f"gates: those of {name} are not all finite numbers")
    if not _output_follows(layer, gates):
        raise ValueError(f"gates: {name} is a {type(layer).__name__}, whose output does not grow with its weight")


@torch.no_grad()
def _output_follows(layer: nn.Module, gates: Tensor) -> bool:
    """Checks on random maps that scaling the weight scales the output. A layer that standardises its weight fails."""
    layer = copy.deepcopy(layer).cpu().double().eval()
    kernels = zip(getattr(layer, "kernel_size", (1,)), getattr(layer, "dilation", (1,)), strict=True)
    size = max(2 + dilation * (kernel - 1) for kernel, dilation in kernels)
    shape = getattr(layer, "normalized_shape", (0, size, size))[1:]  # a layer norm takes maps of one size only
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(2, getattr(layer, "in_channels", len(gates)), *shape, generator=generator).double()
    expected = layer(maps) * gates.cpu().double().view(-1, 1, 1)
    _scale(layer, gates.cpu())
    return torch.allclose(layer(maps), expected)
