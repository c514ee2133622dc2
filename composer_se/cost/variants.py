"""Makes the variants of one network that are compared, and finds their SE layers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from composer_se.errors import UserError
from composer_se.functional import apply_squeeze_excite
from composer_se.options import SqueezeExciteOptions
from composer_se.selection import following_norms, select_convs

__all__ = ["PLAIN", "CalledLayer", "Variant", "called_layers", "composers_layers", "make_variants"]

PLAIN = "plain"


@dataclass(frozen=True)
class Variant:
    """One variant of the network under study."""

    name: str  # as printed in the table
    code: str  # whose SE it has: "plain" (none), "composer-se" or "composer"
    min_channels: str | None  # as printed ("128", "auto (512)"); None for the plain network
    layers: tuple[str, ...]  # qualified names of the convs that have SE
    # Makes an instance on the CPU. Where variants have the same parameters, all instances have the same weights.
    build: Callable[[], nn.Module]


def make_variants(
    network: nn.Module,
    min_channels: Sequence[int | str],
    squeeze_excite: SqueezeExciteOptions,
    *,
    against_composer: bool,
) -> tuple[list[Variant], list[str]]:
    """The plain network, ours for each setting of `min_channels`, and Composer's built-in on the same convs and widths.

    The network is copied, never changed.

    Returns:
        The variants, the plain network first, and a line for each setting that was left out because no conv
        is that wide.

    Raises:
        UserError: An option is wrong, no setting fits a conv, or Composer is wanted but not installed.
    """
    variants = [Variant(PLAIN, "plain", None, (), lambda: copy.deepcopy(network))]
    notes: list[str] = []
    for setting in min_channels:
        try:
            options = replace(squeeze_excite, min_channels=setting)
            selection = select_convs(network, options)
        except (TypeError, ValueError) as error:
            raise UserError(" ".join(str(error).split())) from error
        widths = {choice.name: choice.latent_channels for choice in selection.chosen}
        label = f"{setting} ({selection.min_channels})" if setting == "auto" else str(setting)
        if not widths:
            notes.append(f"min_channels={label} fits no conv of this network: left out")
            continue
        layers = tuple(widths)
        build = _seeded(network, lambda copied, options=options: apply_squeeze_excite(copied, **asdict(options)))
        variants.append(Variant(f"ours {label}", "composer-se", label, layers, build))
        if against_composer:
            composers_layers()  # complains now, not when a variant is built
            build = _seeded(network, lambda copied, widths=widths: _apply_composers(copied, widths))
            variants.append(Variant(f"built-in {label}", "composer", label, layers, build))
    if len(variants) == 1:
        raise UserError(f"--min-channels: {'; '.join(notes)}; try 'auto' or a smaller number")
    return variants, notes


def _seeded(network: nn.Module, convert: Callable[[nn.Module], object]) -> Callable[[], nn.Module]:
    """Makes copies of a network that are all converted with the same random weights."""

    def build() -> nn.Module:
        copied = copy.deepcopy(network)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            convert(copied)
        return copied

    return build


def _apply_composers(network: nn.Module, widths: Mapping[str, int]) -> None:
    composers = composers_layers()
    wrappers: dict[nn.Module, nn.Module] = {}
    for name, width in widths.items():
        conv = network.get_submodule(name)
        wrappers[conv] = composers.SqueezeExciteConv2d(conv=conv, latent_channels=width)
    # A conv may sit in several places; each of them gets the one wrapper.
    for name, module in list(network.named_modules(remove_duplicate=False)):
        if module in wrappers:
            network.set_submodule(name, wrappers[module])


def composers_layers() -> Any:
    """Composer's module with the layers of its built-in algorithm.

    Raises:
        UserError: Composer is not installed.
    """
    try:
        from composer.algorithms.squeeze_excite import squeeze_excite
    except ImportError as error:
        raise UserError("--against composer: Composer is not installed; pip install 'composer-se[composer]'") from error
    return squeeze_excite


@dataclass(frozen=True)
class CalledLayer:
    """An SE layer that a network calls, the norm behind it, and the conv's input and output for one image."""

    wrapper: nn.Module
    norm: nn.Module | None
    image: torch.Tensor
    map: torch.Tensor


def called_layers(
    network: nn.Module, names: Iterable[str], image: torch.Tensor, autocast: Callable[[], AbstractContextManager[Any]]
) -> list[CalledLayer]:
    """The SE layers of these names that the network calls for an image."""
    wrappers = {network.get_submodule(name): network.get_submodule(f"{name}.conv") for name in names}
    seen: dict[nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}

    def remember(conv: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        seen.setdefault(conv, (args[0], output.clone()))  # the block may write over the output

    handles = [conv.register_forward_hook(remember) for conv in wrappers.values()]
    was_training = network.training
    with torch.no_grad(), autocast():
        network.eval()(image)
    network.train(was_training)
    for handle in handles:
        handle.remove()
    norms = following_norms(network)
    return [CalledLayer(wrapper, norms.get(wrapper), *seen[conv]) for wrapper, conv in wrappers.items() if conv in seen]
