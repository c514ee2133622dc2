"""Writes a run's report.html again, with the results that were added to the run's folder.

Reads the results of `composer-se gates` and of `composer-se cost --json RUN/cost.json`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the argument of `composer-se report`."""
    parser.add_argument("run_folder", metavar="RUN", type=Path, help="a run's folder")


def run(args: argparse.Namespace) -> int:
    """Writes the report; see `composer_se.report.write_report`."""
    from composer_se.report.write import write_report

    print(write_report(args.run_folder))
    return 0
