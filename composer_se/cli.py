"""The `composer-se` command. Each subcommand is a module of `composer_se.commands`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence

from composer_se import launch
from composer_se.errors import UserError

__all__ = ["exit_code", "main", "make_parser", "parse"]

COMMANDS = {
    "train": "train a recipe in this process",
    "plan": "show which layers SE would change, and why",
    "gates": "show what the gates of a trained network do, and which layers need them",
    "slim": "take out the blocks that a trained network can do without",
    "report": "write a run's report.html anew",
    "cost": "measure what SE costs on a model and this machine",
    "compare": "train with and without SE, and say whether the difference is real",
}

# The packages of the extra `recipes`, by their import names.
_RECIPES = ("composer", "jinja2", "matplotlib", "numpy", "omegaconf", "rich", "scipy", "sklearn", "torchvision", "yaml")


def make_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands."""
    parser = argparse.ArgumentParser(prog="composer-se", description="Squeeze-and-Excitation for conv nets.")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        module = importlib.import_module(f"composer_se.commands.{name}")
        module.add_arguments(subparsers.add_parser(name, help=summary, description=module.__doc__))
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses a command line on which overrides of a recipe may stand anywhere among the options.

    argparse itself finds overrides only right after the recipe. It gives those after `--arm NAME` to the arm.
    """
    args, rest = parser.parse_known_args(argv)
    if "overrides" in args:
        args.overrides = [*args.overrides, *(word for word in rest if "=" in word and not word.startswith("-"))]
        rest = [word for word in rest if "=" not in word or word.startswith("-")]
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


def exit_code(run: Callable[[argparse.Namespace], int], args: argparse.Namespace, name: str) -> int:
    """Runs a command of this name.

    Returns:
        Its exit code; 2, with one line on stderr, when the user's input was wrong; 130 after Ctrl-C.
    """
    try:
        return run(args)
    except KeyboardInterrupt:
        launch.leave_interrupted(f"\n{name}: stopped")
        return 130
    except UserError as error:
        launch.leave_together(f"{name}: error: {error}")
        return 2
    except ModuleNotFoundError as error:
        if error.name not in _RECIPES:
            raise
        launch.leave_together(
            f"{name}: error: needs {error.name}, which is not installed: pip install 'composer-se[recipes]'"
        )
        return 2


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand: its exit code, or 2 with one line on stderr when the user's input was wrong."""
    args = parse(make_parser(), argv)
    command = importlib.import_module(f"composer_se.commands.{args.command}")
    return exit_code(command.run, args, f"composer-se {args.command}")


if __name__ == "__main__":
    sys.exit(main())
