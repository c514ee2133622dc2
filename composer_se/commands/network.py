"""Finds the network that a command line names: by a registered name, a recipe, or a function of the user."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from composer_se.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from composer_se.options import SqueezeExciteOptions

__all__ = ["NamedNetwork", "add_network_arguments", "read_network"]


@dataclass(frozen=True)
class NamedNetwork:
    """A network that the user named."""

    name: str  # as the user wrote it
    build: Callable[[], nn.Module]  # builds the plain network on the CPU, with the same weights at every call
    squeeze_excite: SqueezeExciteOptions | None = None  # the recipe's options
    image_size: int | None = None  # height and width in pixels of the recipe's images


def add_network_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the three arguments that name a network. The user gives one of them."""
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
        UserError: If the arguments name no network, several networks, or one that does not exist. `build` raises a
            `UserError` if the network can't be built.
    """
    named = {"package.module:factory": args.factory, "--model": args.model, "--recipe": args.recipe}
    given = [option for option, value in named.items() if value is not None]
    if len(given) != 1:
        got = " and ".join(given) or "none"
        raise UserError(f"name one network, by --model NAME, --recipe RECIPE or package.module:factory; got {got}")
    if args.model is not None:
        from composer_se.parts.models import build_network

        return NamedNetwork(args.model, _seeded(partial(build_network, args.model)))
    if args.recipe is not None:
        return _read_recipe(args.recipe)
    return NamedNetwork(args.factory, _seeded(_read_factory(args.factory)))


def _read_recipe(name: str) -> NamedNetwork:
    from composer_se.parts.data import image_size
    from composer_se.parts.models import without_weights
    from composer_se.recipe.load import load_recipe
    from composer_se.recipe.validate import plan_network, squeeze_excite_options

    recipe = load_recipe(name)
    fresh = replace(recipe, model=without_weights(recipe.model))  # plan and cost don't depend on the weights
    return NamedNetwork(
        f"{recipe.model['name']} ({name})",
        _seeded(plan_network(fresh).build),
        squeeze_excite_options(recipe),
        image_size(recipe.train_dataset),
    )


def _read_factory(spec: str) -> Callable[[], nn.Module]:
    from torch import nn

    from composer_se.parts.own_parts import own_part

    if not all(spec.partition(":")):
        raise UserError(f"{spec!r} is not of the form package.module:factory; to take a registered model, use --model")
    return own_part(spec, "network", "a torch.nn.Module", lambda made: isinstance(made, nn.Module))


def _seeded(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def seeded() -> nn.Module:
        import torch

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return build()

    return seeded
