"""Makes the variants of one network that are compared."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from composer_se.errors import UserError
from composer_se.functional import apply_squeeze_excite
from composer_se.options import SqueezeExciteOptions
from composer_se.selection import select_convs

__all__ = ["PLAIN", "Variant", "composers_layers", "make_variants"]

PLAIN = "plain"


@dataclass(frozen=True)
class Variant:
    """One variant of the network under study.

    Attributes:
        name: As printed in the table.
        code: Whose SE it has: "plain" (none), "composer-se" or "composer".
        min_channels: The setting behind it as printed ("128", "auto (512)"), or None for the plain network.
        layers: Qualified names of the convs that have SE.
        build: Makes a new instance on the CPU; all instances of a variant have the same weights, and all variants have
            the same weights where they have the same parameters.
    """

    name: str
    code: str
    min_channels: str | None
    layers: tuple[str, ...]
    build: Callable[[], nn.Module]


def make_variants(
    network: nn.Module,
    min_channels: Sequence[int | str],
    squeeze_excite: SqueezeExciteOptions,
    *,
    against_composer: bool,
) -> tuple[list[Variant], list[str]]:
    """The plain network, ours for each setting, and Composer's built-in on the same convs.

    Args:
        network: The plain network. It is copied, never changed.
        min_channels: Settings of `apply_squeeze_excite`, one variant each.
        squeeze_excite: Its other options.
        against_composer: True adds Composer's built-in, with the convs and widths of each of ours.

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
        variants.append(Variant(f"ours {label}", "composer-se", label, layers, _build_ours(network, options)))
        if against_composer:
            build = _build_composers(network, widths)
            variants.append(Variant(f"built-in {label}", "composer", label, layers, build))
    if len(variants) == 1:
        raise UserError(f"--min-channels: {'; '.join(notes)}; try 'auto' or a smaller number")
    return variants, notes


def _build_ours(network: nn.Module, options: SqueezeExciteOptions) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        converted = copy.deepcopy(network)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            apply_squeeze_excite(converted, **asdict(options))
        return converted

    return build


def _build_composers(network: nn.Module, widths: Mapping[str, int]) -> Callable[[], nn.Module]:
    composers = composers_layers()

    def build() -> nn.Module:
        converted = copy.deepcopy(network)
        wrappers: dict[nn.Module, nn.Module] = {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for name, width in widths.items():
                conv = converted.get_submodule(name)
                assert isinstance(conv, nn.Conv2d)
                wrappers[conv] = composers.SqueezeExciteConv2d(conv=conv, latent_channels=width)
        # A conv may sit in several places; each of them gets the one wrapper.
        for parent in list(converted.modules()):
            for attribute, child in list(parent._modules.items()):
                if child in wrappers and parent is not wrappers[child]:
                    setattr(parent, attribute, wrappers[child])
        return converted

    return build


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
