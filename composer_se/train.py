"""Trains a recipe: `composer -n N -m composer_se.train RECIPE [key=value ...]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from composer_se import cli
from composer_se.commands import train as command

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one process of a launch: 0, or 2 with one line on stderr when the user's input was wrong."""
    parser = argparse.ArgumentParser(prog="composer -m composer_se.train", description=command.__doc__)
    command.add_arguments(parser)
    return cli.exit_code(command.run, cli.parse(parser, argv), "composer_se.train")


if __name__ == "__main__":
    sys.exit(main())
