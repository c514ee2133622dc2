"""Train a recipe in this process. For several processes: composer -n N -m composer_se.train RECIPE."""

from __future__ import annotations

import argparse

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument("recipe", metavar="RECIPE", help="path of a YAML file, or name of a shipped recipe")
    parser.add_argument(
        "overrides",
        metavar="key=value",
        nargs="*",
        help="change a key of the recipe, such as optimizer.lr=0.1 or algorithms.squeeze_excite=null",
    )


def run(args: argparse.Namespace) -> int:
    """Trains the recipe; see `composer_se.recipe.run.run_recipe` for the exit code."""
    from composer_se.recipe.run import run_recipe

    return run_recipe(args.recipe, args.overrides)
