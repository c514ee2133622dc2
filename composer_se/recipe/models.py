"""Networks by name: torchvision's, timm's, the CIFAR ResNets, and functions or classes of the user's."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torchvision.models
from torch import nn

from composer_se.errors import UserError, did_you_mean, one_line
from composer_se.recipe.arguments import check_arguments, construct, type_hints
from composer_se.recipe.cifar_resnet import CIFAR_DEPTHS, CIFARResNet

__all__ = ["build_network", "network_builder", "network_names"]


def build_network(name: str, **kwargs: Any) -> nn.Module:
    """Builds a network by name, with fresh weights unless its own arguments ask for pretrained ones.

    Args:
        name: A classification model of torchvision (`resnet50`), of timm when installed
            (`timm/convnext_tiny`), `cifar_resnet8`, `20`, `32`, `44`, `56`, `110`, or a function or class that makes
            a network, as `package.module:name`; the current folder is looked in too.
        **kwargs: The network's own arguments, such as `num_classes`; for the CIFAR ResNets also `in_channels`.

    Raises:
        UserError: Unknown name, unknown argument, or a value the network rejects.
    """
    builder = network_builder(name)
    return construct(builder, "model", **check_arguments(builder, kwargs, "model"))


def network_names() -> list[str]:
    """The names `build_network` knows without timm's, which are `timm/` and a name of `timm.list_models()`."""
    return torchvision.models.list_models(module=torchvision.models) + list(_CIFAR)


def network_builder(name: str) -> Callable[..., nn.Module]:
    """The function that builds a network, with a signature that names the arguments it takes.

    Raises:
        UserError: Unknown name, a timm model where timm is not installed, or a module that can't be imported.
    """
    if ":" in name:
        return _users_builder(name)
    if name in _CIFAR:
        return _cifar_builder(name, _CIFAR[name])
    if name.startswith("timm/"):
        return _timm_builder(name)
    names = network_names()
    if name not in names:
        raise UserError(f"model.name: unknown network {name!r}{did_you_mean(name, names)}")
    return _torchvision_builder(name)


_CIFAR = {f"cifar_resnet{depth}": depth for depth in CIFAR_DEPTHS}


def _cifar_builder(name: str, depth: int) -> Callable[..., nn.Module]:
    def build(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
        return CIFARResNet(depth, num_classes, in_channels)

    build.__name__ = name
    return build


def _users_builder(name: str) -> Callable[..., nn.Module]:
    module_name, _, attribute = name.partition(":")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # a console script does not look in the current folder by itself
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module does when it is imported
        raise UserError(
            f"model.name: {name}: module {module_name!r} can't be imported ({type(error).__name__}: {one_line(error)})"
        ) from error
    factory: Any = getattr(module, attribute, None)
    if not (inspect.isfunction(factory) or inspect.isclass(factory)):
        raise UserError(f"model.name: {name}: module {module_name!r} has no function or class {attribute!r}")

    def build(**kwargs: Any) -> nn.Module:
        try:
            network = factory(**kwargs)
        except Exception as error:
            raise UserError(f"model: {name} fails ({type(error).__name__}: {one_line(error)})") from error
        if not isinstance(network, nn.Module):
            raise UserError(f"model.name: {name} returned a {type(network).__name__}, expected a torch.nn.Module")
        return network

    build.__name__ = name
    build.__signature__ = inspect.signature(factory)  # type: ignore[attr-defined]
    build.__annotations__ = type_hints(factory)
    return build


def _timm_builder(name: str) -> Callable[..., nn.Module]:
    if importlib.util.find_spec("timm") is None:
        raise UserError(f"model.name: {name!r} needs timm; install it with pip install 'composer-se[timm]'")
    import timm

    model = name.removeprefix("timm/")
    known = timm.list_models()
    if model.partition(".")[0] not in known:
        raise UserError(f"model.name: unknown timm network {model!r}{did_you_mean(model, known)}")

    def build(num_classes: int = 1000, **kwargs: Any) -> nn.Module:
        return timm.create_model(model, num_classes=num_classes, **kwargs)

    build.__name__ = name
    return build


def _torchvision_builder(name: str) -> Callable[..., nn.Module]:
    """Torchvision's builders pass `**kwargs` on to a class; here both signatures are joined into one."""
    builder = torchvision.models.get_model_builder(name)
    hints = typing.get_type_hints(builder)
    network = hints.pop("return")

    def build(**kwargs: Any) -> nn.Module:
        if kwargs.get("aux_logits", "aux_logits" in parameters):
            raise UserError(
                f"model.aux_logits: the auxiliary outputs of {name} have no loss here; set model.aux_logits=false"
            )
        return builder(**kwargs)

    keyword = inspect.Parameter.KEYWORD_ONLY
    joined = {**inspect.signature(network).parameters, **inspect.signature(builder).parameters}
    parameters = {
        key: parameter.replace(kind=keyword)
        for key, parameter in joined.items()
        if parameter.default is not parameter.empty  # what has no default is the builder's business
    }
    build.__name__ = name
    build.__signature__ = inspect.Signature(list(parameters.values()))  # type: ignore[attr-defined]
    # Pretrained weights by the names of their enumeration, which a builder takes as well as its members.
    weights = next(hint for hint in typing.get_args(hints["weights"]) if hint is not type(None))
    hints["weights"] = typing.Literal[tuple(weights.__members__)] | None  # type: ignore[misc]
    build.__annotations__ = {**typing.get_type_hints(network.__init__), **hints}
    return build
