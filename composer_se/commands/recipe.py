"""Shared by the commands that train: a recipe on the command line, and the report of its run."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

__all__ = ["add_recipe_arguments", "write_run_report"]


def add_recipe_arguments(parser: argparse.ArgumentParser, changes: str) -> None:
    """Adds a recipe and its overrides, which may also stand among the options; see `composer_se.cli.parse`."""
    parser.add_argument("recipe", metavar="RECIPE", help="path of a YAML file, or name of a shipped recipe")
    parser.add_argument("overrides", metavar="key=value", nargs="*", default=[], help=f"change {changes}")


def write_run_report(run_folder: Path) -> None:
    """Writes a complete run's report. A fault in it must not make the run look like one that failed."""
    from composer_se.report import write_report

    try:
        write_report(run_folder)
    except Exception:
        logging.getLogger(__name__).warning("%s: report.html could not be written", run_folder, exc_info=True)
