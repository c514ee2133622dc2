"""Trains a recipe with and without SE, or any arms, with the same seeds, and says whether the difference is real.

With the same seed, all arms see the same data in the same order, and the parameters that they have in common start with
the same values. The same command continues an interrupted comparison. On several processes:
composer -n N -m composer_se.cli compare RECIPE.
"""

from __future__ import annotations

import argparse
import logging
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from composer_se import launch
from composer_se.commands.options import add_recipe_arguments
from composer_se.commands.train import write_run_report
from composer_se.errors import UserError

if TYPE_CHECKING:
    from composer_se.compare.arms import Comparison
    from composer_se.compare.run import Findings

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `composer-se compare`."""
    add_recipe_arguments(parser, "a key for all arms, such as max_duration=5ep")
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--seeds",
        type=int,
        default=5,
        metavar="N",
        help="runs of each arm; 0 measures how fast the arms are and trains none (default: 5)",
    )
    size.add_argument(
        "--pilot",
        type=float,
        metavar="POINTS",
        help="before a comparison: train two other seeds of each arm, and say how many seeds would show a difference "
        "of so many percentage points",
    )
    parser.add_argument(
        "--arm",
        action="append",
        nargs="+",
        default=[],
        metavar=("NAME", "key=value"),
        help="something to compare: a name, and what it changes in the recipe; the first is what the others are "
        "compared with (default: the recipe without SE, and as written)",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to (default: runs/compare-RECIPE)")


def run(args: argparse.Namespace) -> int:
    """Runs or continues the comparison, or its pilot, and prints and writes the results.

    Returns:
        0 when it is complete, 130 or 143 when it was interrupted.
    """
    comparison = _comparison(args)
    launch.share_cores()  # before torch is imported
    launch.keep_freed_memory()

    from composer_se.compare.run import check
    from composer_se.recipe.run import exit_code_of

    check(comparison)
    with launch.log_on_terminal(), launch.logged_from(logging.WARNING):
        work = _compare if args.pilot is None else partial(_pilot, points=args.pilot)
        code = exit_code_of(lambda: work(comparison), comparison.folder)
    if code:
        launch.leave_interrupted("\ncomposer-se compare: stopped; the same command continues")
    return code


def _comparison(args: argparse.Namespace) -> Comparison:
    from composer_se.compare.arms import Arm, Comparison, default_arms

    if not 0 <= args.seeds <= 1000:
        raise UserError(f"--seeds {args.seeds}: expected 0 to 1000")
    if args.pilot is not None and not 0 < args.pilot < 100:
        raise UserError(f"--pilot {args.pilot}: expected percentage points, such as 0.2")
    arms = tuple(Arm(name, tuple(overrides)) for name, *overrides in args.arm)
    slugs = [arm.slug for arm in arms]
    for arm in arms:
        if "=" in arm.name:
            raise UserError(f"--arm {arm.name}: the first word is the arm's name; write --arm NAME {arm.name}")
        if not arm.slug or not re.fullmatch(r"[\w .,:+%()/-]+", arm.name):
            raise UserError(f"--arm {arm.name!r}: a name is made of letters, digits, spaces and .,:+%()/-")
        if slugs.count(arm.slug) > 1:
            raise UserError(f"--arm {arm.name}: two arms have this name, but for signs and capitals")
    if len(arms) == 1:
        raise UserError(f"--arm {arms[0].name}: one arm is nothing to compare; give two or more")
    folder = args.out or Path("runs") / f"compare-{Path(args.recipe).stem}"
    return Comparison(
        args.recipe, tuple(args.overrides), arms or default_arms(args.recipe, args.overrides), args.seeds, folder
    )


def _compare(comparison: Comparison) -> None:
    from composer.utils import dist
    from rich.console import Console

    from composer_se.compare.judgement import judge
    from composer_se.compare.results import print_judgements, print_speeds
    from composer_se.compare.run import run_comparison
    from composer_se.show.terminal import progress_bar

    speaks = dist.get_global_rank() == 0
    findings = None
    with progress_bar(speaks=launch.is_local_rank_zero(), in_lines=True) as progress:
        for findings in run_comparison(comparison, progress):
            if findings.runs and speaks:
                _write(comparison, findings)
    if findings is None or not speaks:
        return
    if findings.runs:
        print_judgements(comparison, judge(comparison, findings), Console())
        print(f"\n{comparison.folder}: comparison.png, results.md, results.json")
    else:
        print_speeds(comparison, findings, Console())


def _pilot(comparison: Comparison, points: float) -> None:
    from composer.utils import dist
    from rich.console import Console

    from composer_se.compare.judgement import judge_pilot
    from composer_se.compare.run import run_pilot
    from composer_se.show.terminal import progress_bar

    with progress_bar(speaks=launch.is_local_rank_zero(), in_lines=True) as progress:
        runs = run_pilot(comparison, progress)
    if dist.get_global_rank() == 0:
        Console().print(judge_pilot(runs, comparison.reference.name, points / 100), highlight=False)


def _write(comparison: Comparison, findings: Findings) -> None:
    from composer_se.compare.judgement import judge
    from composer_se.compare.picture import draw
    from composer_se.compare.results import as_json, as_markdown, conditions
    from composer_se.files import replace_file, writing

    judgements = judge(comparison, findings)
    replace_file(comparison.folder / "results.json", as_json(comparison, findings, judgements))
    replace_file(comparison.folder / "results.md", as_markdown(comparison, findings, judgements))
    picture = comparison.folder / "comparison.png"
    with writing(picture):
        draw(comparison, findings, judgements, conditions(comparison, findings), picture)
    for summary in comparison.folder.glob("runs/*/summary.json"):
        if not (summary.parent / "report.html").exists():
            write_run_report(summary.parent)
