"""The `composer-se` command: one subcommand per module of `composer_se.commands`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from composer_se.errors import UserError
from composer_se.recipe import ranks

__all__ = ["main", "make_parser"]

COMMANDS = {
    "train": "train a recipe in this process",
    "plan": "show which layers SE would change, and why",
    "gates": "show what the gates of a trained network do, and which layers need them",
    "report": "write a run's report.html anew",
    "cost": "measure what SE costs on a model and this machine",
    "compare": "train with and without SE, and say whether the difference is real",
}


def make_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands."""
    parser = argparse.ArgumentParser(prog="composer-se", description="Squeeze-and-Excitation for conv nets.")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        module = importlib.import_module(f"composer_se.commands.{name}")
        module.add_arguments(subparsers.add_parser(name, help=summary, description=module.__doc__))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand.

    Args:
        argv: Arguments without the program's name. Default: those of the process.

    Returns:
        The exit code: 0, or 2 with one line on stderr when the user's input was wrong.
    """
    parser = make_parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        misplaced = "overrides" in args and "=" in unknown[0]
        hint = "; key=value stands right behind the recipe, before the options" if misplaced else ""
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    try:
        return importlib.import_module(f"composer_se.commands.{args.command}").run(args)
    except UserError as error:
        ranks.leave_together(f"composer-se {args.command}: error: {error}")
        return 2


if __name__ == "__main__":
    sys.exit(main())
