"""Reads the network from a command line: a registered name, a recipe, or a function of the user's."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from composer_se.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from composer_se.options import SqueezeExciteOptions

__all__ = ["NamedNetwork", "add_network_arguments", "read_network"]


@dataclass(frozen=True)
class NamedNetwork:
    """A network that the user named."""

    name: str  # as the user wrote it
    build: Callable[[], nn.Module]  # makes the plain network on the CPU, with the same weights at every call
    squeeze_excite: SqueezeExciteOptions | None = None  # the recipe's
    image_size: int | None = None  # height and width in pixels of the recipe's images


def add_network_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the three ways to name a network. The user takes one."""
    group = parser.add_argument_group("the network (one of)")
    group.add_argument(
        "factory",
        nargs="?",
        metavar="package.module:factory",
        help="a function or class that makes it when called without arguments",
    )
    group.add_argument("--model", metavar="NAME", help="a model as recipes name it: resnet50, timm/NAME, …")
    group.add_argument("--recipe", metavar="RECIPE", help="a recipe's network: a shipped recipe's name, or a path")


def read_network(args: argparse.Namespace) -> NamedNetwork:
    """Finds the network that the arguments name, and does not build it yet.

    Raises:
        UserError: None or several are named, or what is named does not exist. `build` raises it where the network
            cannot be made.
    """
    named = {"package.module:factory": args.factory, "--model": args.model, "--recipe": args.recipe}
    given = [option for option, value in named.items() if value is not None]
    if len(given) != 1:
        got = " and ".join(given) or "none"
        raise UserError(f"name one network, by --model NAME, --recipe RECIPE or package.module:factory; got {got}")
    if args.model is not None:
        return NamedNetwork(args.model, _seeded(lambda: _build_model({"name": args.model})))
    if args.recipe is not None:
        return _read_recipe(args.recipe)
    return NamedNetwork(args.factory, _seeded(_read_factory(args.factory)))


def _read_recipe(name: str) -> NamedNetwork:
    from composer_se.recipe.data import image_size
    from composer_se.recipe.load import load_recipe
    from composer_se.recipe.validate import squeeze_excite_options

    recipe = load_recipe(name)
    return NamedNetwork(
        f"{recipe.model['name']} ({name})",
        _seeded(lambda: _build_model(recipe.model)),
        squeeze_excite_options(recipe),
        image_size(recipe.train_dataset),
    )


def _build_model(section: Mapping[str, Any]) -> nn.Module:
    from composer_se.recipe.models import build_network, without_weights

    return build_network(**without_weights(section))  # plan and cost don't depend on them


def _read_factory(spec: str) -> Callable[[], nn.Module]:
    from torch import nn

    module_name, separator, attribute = spec.partition(":")
    if not (module_name and separator and attribute):
        raise UserError(f"{spec!r} is not of the form package.module:factory; to take a registered model, use --model")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # a console script does not look in the current folder by itself
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(f"{spec}: module {module_name!r} can't be imported: {error}") from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        raise UserError(f"{spec}: module {module_name!r} has no function or class {attribute!r}")

    def build() -> nn.Module:
        try:
            network = factory()
        except Exception as error:
            raise UserError(f"{spec}: calling it without arguments fails: {type(error).__name__}: {error}") from error
        if not isinstance(network, nn.Module):
            raise UserError(f"{spec}: returned a {type(network).__name__}, expected a torch.nn.Module")
        return network

    return build


def _seeded(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def seeded() -> nn.Module:
        import torch

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return build()

    return seeded
