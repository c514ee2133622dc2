"""Takes out blocks whose gates are constant: a constant gate is a scale of the layer in front of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from composer_se.errors import did_you_mean
from composer_se.functional import check_optimizers, take_out_blocks
from composer_se.modules import SqueezeExciteConv2d
from composer_se.selection import check_not_wrapped

__all__ = ["fold_constant_gates"]


def fold_constant_gates(
    model: nn.Module, gates: Mapping[str, Tensor], optimizers: Optimizer | Sequence[Optimizer] | None = None
) -> dict[str, nn.Module]:
    """Multiplies constant gates into the weights of their layers and removes those blocks, in place.

    The gates are what scales the maps: for a block with ``init="identity"`` they lie between 0 and 2. The other blocks
    stay. A gate that depends on the image can be folded too, at its mean for instance; then the outputs change.

    Args:
        model: The model, not wrapped in DDP or FSDP.
        gates: By the qualified name of a layer with a block, its gates, (C,) for C output channels.
        optimizers: The optimizers of the model's parameters. The parameters of the removed blocks leave them. Default:
            none.

    Returns:
        The bare layers, by the names in ``gates``.

    Raises:
        TypeError: If the model is wrapped in DDP or FSDP.
        ValueError: If a name is not that of a layer with a block, two names are of the same layer, gates have another
            shape or are not finite, a layer has no weight of its own that could take the gates, or an optimizer holds
            none of the model's parameters. The model and the optimizers are as before.

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
    wrappers = {name: module for name, module in modules if isinstance(module, SqueezeExciteConv2d)}
    users = Counter(parameter for module in model.modules() for parameter in module._parameters.values())
    chosen: dict[str, SqueezeExciteConv2d] = {}
    scales: list[tuple[Tensor, Tensor]] = []
    for name, given in gates.items():
        if name not in wrappers:
            raise ValueError(f"gates: no layer {name!r} with Squeeze-and-Excitation{did_you_mean(name, wrappers)}")
        if not name:
            raise ValueError("gates: the model is itself a layer with a block, which can't be replaced in place")
        twin = next((other for other, wrapper in chosen.items() if wrapper is wrappers[name]), None)
        if twin is not None:
            raise ValueError(f"gates: {twin} and {name} are the same layer; name it once")
        chosen[name] = wrappers[name]
        scales += _scaled(name, wrappers[name], torch.as_tensor(given), users)
    bare = take_out_blocks(model, chosen, optimizers)
    with torch.no_grad():
        for parameter, scale in scales:
            parameter.mul_(scale)
    return bare


def _scaled(
    name: str, wrapper: SqueezeExciteConv2d, gates: Tensor, users: Counter[nn.Parameter | None]
) -> list[tuple[Tensor, Tensor]]:
    """The parameters of the layer inside a wrapper that take its gates, each with its factor."""
    layer = wrapper.conv
    if not isinstance(layer, nn.Conv2d) or layer._parameters.get("weight") is None:
        raise ValueError(f"gates: {name} is a {type(layer).__name__} without a plain weight to multiply its gates into")
    if gates.shape != (layer.out_channels,):
        raise ValueError(f"gates: {name} has {layer.out_channels} channels, but gates of shape {tuple(gates.shape)}")
    if not gates.isfinite().all():
        raise ValueError(f"gates: those of {name} are not all finite numbers")
    parameters = [
        parameter for parameter in (layer._parameters["weight"], layer._parameters["bias"]) if parameter is not None
    ]
    if any(users[parameter] > 1 for parameter in parameters):
        raise ValueError(f"gates: {name} shares its weights with another layer, which its gates must not scale")
    gates = gates.detach()
    return [(parameter, gates.to(parameter).view(-1, *[1] * (parameter.ndim - 1))) for parameter in parameters]
