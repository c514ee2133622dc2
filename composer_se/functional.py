"""Squeeze-and-Excitation for any PyTorch model, without Composer."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence

from torch import nn
from torch.optim import Optimizer

from composer_se import surgery
from composer_se.modules import SqueezeExciteConv2d
from composer_se.norm_module import SqueezeExciteNorm2d
from composer_se.options import RECOMMENDED_LATENT_CHANNELS, SqueezeExciteOptions
from composer_se.selection import (
    HAS_SE,
    Selection,
    check_not_wrapped,
    following_norms,
    select_convs,
)
from composer_se.trainable import train_only
from composer_se.wrapper import SqueezeExcited, mark_as_squeeze_excited

__all__ = ["apply_squeeze_excite", "remove_squeeze_excite", "train_only"]

log = logging.getLogger(__name__)


def apply_squeeze_excite(
    model: nn.Module,
    latent_channels: float = SqueezeExciteOptions.latent_channels,
    min_channels: int | str = SqueezeExciteOptions.min_channels,
    optimizers: Optimizer | Sequence[Optimizer] | None = None,
    *,
    min_channels_of: str = SqueezeExciteOptions.min_channels_of,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    init: str = SqueezeExciteOptions.init,
    placement: str = SqueezeExciteOptions.placement,
    inplace: object = None,
) -> dict[str, SqueezeExcited]:
    """Adds a Squeeze-and-Excitation block (Hu et al., https://arxiv.org/abs/1709.01507) to convs of a model, in place.

    Skips convs that have a block or are part of one, so a second call changes nothing. The new parameters take the
    conv's device and dtype.

    Args:
        model: The model, not wrapped in DDP or FSDP yet.
        latent_channels: As in `composer_se.SqueezeExciteOptions`, like all options below. Default: ``64``.
        min_channels: The least number of channels of a conv that gets a block, or ``"auto"``. Default: ``128``.
        optimizers: The optimizers of the model's parameters, if they exist already: each new parameter joins the
            parameter group that holds its conv's weight. Default: none.
        min_channels_of: ``"output"`` or ``"both"``. Default: ``"output"``.
        include: Glob pattern, or several, of convs that get a block. Default: all.
        exclude: Glob pattern, or several, of convs to skip. Default: none.
        init: ``"default"``, or ``"identity"`` for networks that are trained already. Default: ``"default"``.
        placement: ``"conv"``, or ``"norm"`` for blocks after the norm that follows. Default: ``"conv"``.
        inplace: An option of earlier versions without effect.

    Returns:
        The new `SqueezeExciteConv2d` or `SqueezeExciteNorm2d`, by the qualified name of the conv or norm that each
        replaced, in model order.

    Raises:
        TypeError: If an argument has the wrong type, or the model is wrapped in DDP or FSDP.
        ValueError: If an argument is out of range, a pattern matches no conv, the model is itself a conv, ``placement``
            is "norm" and no norm follows a chosen conv, or an optimizer holds none of the model's parameters. The model
            and the optimizers are as before.

    Example:
        >>> from torchvision.models import resnet50
        >>> model = resnet50()
        >>> len(apply_squeeze_excite(model, latent_channels=64, min_channels=512))
        22
    """
    options = SqueezeExciteOptions(
        latent_channels=latent_channels,
        min_channels=min_channels,
        min_channels_of=min_channels_of,
        include=include,
        exclude=exclude,
        init=init,
        placement=placement,
        inplace=inplace,
    )
    selection = select_convs(model, options)
    surgery.check_optimizers(model, optimizers)
    if not selection.chosen:
        _warn_of_no_conv(model, selection)
        return {}
    _note_narrow_blocks(selection)
    wrappers: dict[nn.Module, SqueezeExcited] = {}
    for choice in selection.chosen:
        conv, width, norm = choice.conv, choice.latent_channels, choice.norm
        if options.placement == "conv":
            wrappers[conv] = SqueezeExciteConv2d(
                conv=conv, latent_channels=width, followed_by_norm=norm is not None, init=options.init
            )
        elif norm is not None and norm not in wrappers:
            factory = {"device": conv.weight.device, "dtype": conv.weight.dtype}
            wrappers[norm] = SqueezeExciteNorm2d(norm, conv.out_channels, width, init=options.init, **factory)
            if optimizers is not None:  # the conv's group, since weight decay is often another for norms
                own = list(conv.parameters())
                surgery.update_params_in_optimizer(own, [*own, *wrappers[norm].se.parameters()], optimizers)
        mark_as_squeeze_excited(conv)
    names = {module: name for name, module in model.named_modules()}
    surgery.replace_module_classes(model, {nn.Module: lambda module, _: wrappers.get(module)}, optimizers)
    return {names[layer]: wrappers[layer] for layer in names if layer in wrappers}


def remove_squeeze_excite(
    model: nn.Module, optimizers: Optimizer | Sequence[Optimizer] | None = None
) -> dict[str, nn.Module]:
    """Replaces every conv or norm that has a Squeeze-and-Excitation block by the bare one, in place.

    Args:
        model: The model, not wrapped in DDP or FSDP.
        optimizers: The optimizers of the model's parameters. They drop the parameters of the blocks. Default: none.

    Returns:
        The bare layers, by qualified name, in model order.

    Raises:
        TypeError: If the model is wrapped in DDP or FSDP.
        ValueError: If the model is itself a layer with a block, which can't be replaced in place.
    """
    check_not_wrapped(model)
    if isinstance(model, SqueezeExcited):
        raise ValueError(
            f"The model is itself a {type(model).__name__}, which can't be replaced in place. Take model.{model.inner}."
        )
    wrappers = {name: module for name, module in model.named_modules() if isinstance(module, SqueezeExcited)}
    return take_out_blocks(model, wrappers, optimizers)


def take_out_blocks(
    model: nn.Module, wrappers: Mapping[str, SqueezeExcited], optimizers: Optimizer | Sequence[Optimizer] | None
) -> dict[str, nn.Module]:
    """Replaces these wrappers, given by qualified name, by the layers inside. Returns the layers by the same names."""
    bare: dict[nn.Module, nn.Module] = {wrapper: wrapper.layer for wrapper in wrappers.values()}
    marked = [*bare.values(), *(module for module, norm in following_norms(model).items() if norm in bare)]
    surgery.replace_module_classes(model, {SqueezeExcited: lambda wrapper, _: bare.get(wrapper)}, optimizers)
    # Another algorithm may have put the conv into a wrapper of its own since.
    for module in (part for layer in marked for part in layer.modules()):
        mark_as_squeeze_excited(module, False)
    return {name: bare[wrapper] for name, wrapper in wrappers.items()}


def _warn_of_no_conv(model: nn.Module, selection: Selection) -> None:
    network = type(model).__name__
    reasons = Counter(choice.reason for choice in selection.choices if not choice.too_narrow)
    if HAS_SE in reasons:
        log.info("Every fitting conv of %s has Squeeze-and-Excitation already.", network)
        return
    too_narrow = [choice for choice in selection.choices if choice.too_narrow]
    if too_narrow:
        log.warning(
            "No conv of %s gets Squeeze-and-Excitation: of the %d convs in question the widest has %d output channels, "
            "and min_channels is %d. Lower min_channels, or let it be chosen with min_channels='auto'.",
            network,
            len(too_narrow),
            max(choice.conv.out_channels for choice in too_narrow),
            selection.min_channels,
        )
    elif reasons:
        why = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        log.warning("No conv of %s gets Squeeze-and-Excitation. Its convs: %s.", network, why)
    else:
        log.warning("%s has no Conv2d, so nothing gets Squeeze-and-Excitation.", network)


def _note_narrow_blocks(selection: Selection) -> None:
    widths = [choice.latent_channels for choice in selection.chosen]
    if (narrowest := min(widths)) < RECOMMENDED_LATENT_CHANNELS:
        log.info(
            "The narrowest Squeeze-and-Excitation block has %d latent channels; at least %d are recommended.",
            narrowest,
            RECOMMENDED_LATENT_CHANNELS,
        )
