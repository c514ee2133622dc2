"""Makes the variants of a network that a study compares, and finds their SE layers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from composer_se.errors import UserError, one_line
from composer_se.functional import apply_squeeze_excite
from composer_se.options import SqueezeExciteOptions
from composer_se.selection import ConvChoice, following_norms, select_convs

__all__ = ["PLAIN", "CalledLayer", "Variant", "called_layers", "composers_layers", "make_variants"]

PLAIN = "plain"


@dataclass(frozen=True)
class Variant:
    """One variant of the network under study."""

    name: str  # as printed in the table
    code: str  # whose SE it has: "plain" (none), "composer-se" or "composer"
    min_channels: str | None  # as printed ("128", "auto (512)"); None for the plain network
    layers: tuple[str, ...]  # qualified names of the convs or norms that have SE
    # Returns a new instance on the CPU. Variants with the same parameters get the same weights in all instances.
    build: Callable[[], nn.Module]


def make_variants(
    network: nn.Module,
    min_channels: Sequence[int | str],
    squeeze_excite: SqueezeExciteOptions,
    *,
    against_composer: bool,
) -> tuple[list[Variant], list[str]]:
    """Makes the plain network, ours for each setting of `min_channels`, and Composer's built-in on the same layers.

    Inserts Composer's layers itself, because Composer's algorithm puts no block after a norm. The network is copied,
    never changed.

    Returns:
        The variants, the plain network first, and a line for each setting that was left out because no conv
        is that wide.

    Raises:
        UserError: If an option is wrong, no setting fits a conv, or Composer is wanted but not installed.
    """
    variants = [Variant(PLAIN, "plain", None, (), lambda: copy.deepcopy(network))]
    notes: list[str] = []
    for setting in min_channels:
        try:
            options = replace(squeeze_excite, min_channels=setting)
            selection = select_convs(network, options)
        except (TypeError, ValueError) as error:
            raise UserError(one_line(error)) from error
        layers = _layers(network, selection.chosen, options.placement)
        label = f"{setting} ({selection.min_channels})" if setting == "auto" else str(setting)
        if not layers:
            notes.append(f"min_channels={label} fits no conv of this network: left out")
            continue
        build = _seeded(network, lambda copied, options=options: apply_squeeze_excite(copied, **asdict(options)))
        variants.append(Variant(f"ours {label}", "composer-se", label, tuple(layers), build))
        if against_composer:
            composers_layers()  # raises now, not when a variant is built
            build = _seeded(network, lambda copied, layers=layers: _apply_composers(copied, layers))
            variants.append(Variant(f"built-in {label}", "composer", label, tuple(layers), build))
    if len(variants) == 1:
        raise UserError(f"--min-channels: {'; '.join(notes)}; try 'auto' or a smaller number")
    return variants, notes


def _seeded(network: nn.Module, convert: Callable[[nn.Module], object]) -> Callable[[], nn.Module]:
    """Returns a function that copies and converts a network, always with the same random weights."""

    def build() -> nn.Module:
        copied = copy.deepcopy(network)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            convert(copied)
        return copied

    return build


def _layers(network: nn.Module, chosen: Iterable[ConvChoice], placement: str) -> dict[str, tuple[int, int]]:
    """The channels and hidden width of each block, by the name of the conv or norm that gets it."""
    names = {module: name for name, module in network.named_modules()}
    layers = {choice.conv if placement == "conv" else choice.norm: choice for choice in chosen}
    return {names[layer]: (choice.conv.out_channels, choice.latent_channels) for layer, choice in layers.items()}


def _apply_composers(network: nn.Module, layers: Mapping[str, tuple[int, int]]) -> None:
    composers = composers_layers()
    wrappers: dict[nn.Module, nn.Module] = {}
    for name, (channels, width) in layers.items():
        layer = network.get_submodule(name)
        wrappers[layer] = (
            composers.SqueezeExciteConv2d(conv=layer, latent_channels=width)
            if isinstance(layer, nn.Conv2d)
            else nn.Sequential(layer, composers.SqueezeExcite2d(channels, width))
        )
    # Several names may share a layer; they also share its wrapper.
    for name, module in list(network.named_modules(remove_duplicate=False)):
        if module in wrappers:
            network.set_submodule(name, wrappers[module])


def composers_layers() -> Any:
    """Composer's module with the layers of its built-in algorithm.

    Raises:
        UserError: If Composer is not installed.
    """
    try:
        from composer.algorithms.squeeze_excite import squeeze_excite
    except ImportError as error:
        raise UserError("--against composer: Composer is not installed; pip install 'composer-se[composer]'") from error
    return squeeze_excite


@dataclass(frozen=True)
class CalledLayer:
    """An SE layer that a network calls, the norm after its conv, and the inputs of both for one image.

    The layer is a conv with its block, or a norm with its block.
    """

    wrapper: nn.Module
    bare: nn.Module  # the conv or norm
    norm: nn.Module | None
    image: torch.Tensor  # the input of the layer
    map: torch.Tensor  # the input of the norm


def called_layers(
    network: nn.Module, names: Iterable[str], image: torch.Tensor, autocast: Callable[[], AbstractContextManager[Any]]
) -> list[CalledLayer]:
    """Runs the network on an image, and returns the named SE layers that it calls."""
    wrappers = {network.get_submodule(name): _bare(network.get_submodule(name)) for name in names}
    seen: dict[nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}

    def remember(bare: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        # A copy, since the block may overwrite the output.
        seen.setdefault(bare, (args[0], output.clone() if isinstance(bare, nn.Conv2d) else args[0]))

    handles = [bare.register_forward_hook(remember) for bare in wrappers.values()]
    was_training = network.training
    with torch.no_grad(), autocast():
        network.eval()(image)
    network.train(was_training)
    for handle in handles:
        handle.remove()
    norms = following_norms(network)
    called = ((wrapper, bare) for wrapper, bare in wrappers.items() if bare in seen)
    return [
        CalledLayer(wrapper, bare, norms.get(wrapper) if isinstance(bare, nn.Conv2d) else bare, *seen[bare])
        for wrapper, bare in called
    ]


def _bare(wrapper: nn.Module) -> nn.Module:
    """The conv or norm of a layer with SE, ours or Composer's."""
    children = dict(wrapper.named_children())
    return next(children[name] for name in ("conv", "norm", "0") if name in children)
