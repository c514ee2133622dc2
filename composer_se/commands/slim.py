"""Removes the blocks that a trained network can do without, and writes the remaining network.

Splits the held-out images into two halves, always in the same way. On the first half, computes the mean of every gate
and fixes the gates of one block after the other at their means. The next block is the one that adds least to the cross
entropy. Fixed gates are a constant scale: slim multiplies them into the layer and removes the block. It removes as many
blocks as possible while the accuracy on the first half drops by at most the tolerance. The second half decides nothing;
it gives the accuracies before and after. The run itself is not changed.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from composer_se.commands.options import add_device_argument, read_device
from composer_se.errors import UserError

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `composer-se slim`."""
    parser.add_argument("source", metavar="RUN", type=Path, help="a run's folder")
    parser.add_argument(
        "--tolerance",
        type=float,
        metavar="POINTS",
        default=0.1,
        help="percentage points of accuracy that the deciding half may lose (default: 0.1)",
    )
    parser.add_argument(
        "--data",
        metavar="NAME[:ROOT]",
        help="data set whose held-out images are taken, and its folder (default: the recipe's eval_dataset)",
    )
    parser.add_argument("--out", metavar="FOLDER", type=Path, help="default: slim, in the run's folder")
    add_device_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Removes the blocks, writes weights, recipe, numbers and picture, and prints the results.

    Raises:
        UserError: If an argument is wrong, the recipe has no SE, the run, its checkpoint or the data can't be loaded,
            or a file can't be written.
    """
    tolerance = args.tolerance
    if not 0 <= tolerance < math.inf:
        raise UserError(f"--tolerance {tolerance:g}: expected percentage points, 0 or more, such as 0.1")
    if args.source.is_file():
        raise UserError(f"{args.source}: expected a run's folder, got a file")
    if args.out is not None and args.out.resolve() == args.source.resolve():
        raise UserError(f"--out {args.out}: is the run's own folder, whose recipe.yaml must stay; name another")

    from dataclasses import asdict

    from rich.console import Console

    from composer_se.commands.trained_network import load_trained
    from composer_se.measure.machine import describe_machine
    from composer_se.show.terminal import progress_bar
    from composer_se.slim.images import halves
    from composer_se.slim.latency import measure_latencies
    from composer_se.slim.output import slim_recipe, write
    from composer_se.slim.search import find_curve, fold_first, mean_gates, most_fixed
    from composer_se.slim.table import print_slimming

    device = read_device(args)
    trained = load_trained(args.source, None, args.data, device)
    if (trained.recipe.algorithms or {}).get("squeeze_excite") is None:
        raise UserError(
            f"{args.source}: the recipe has no algorithms.squeeze_excite, so the network brings its blocks along; "
            "take them out with composer_se.fold_constant_gates"
        )
    machine = describe_machine(device)  # before our measurement adds to the load
    (deciding, num_deciding), (reporting, num_reporting) = halves(trained.batches)
    with progress_bar(in_lines=True) as progress:
        progress("averaging the gates", 0, 0)
        means, reasons = mean_gates(trained.network, deciding)
        points = find_curve(trained.network, means, deciding, reporting, progress)
        chosen = most_fixed(points, tolerance)
        images, _ = next(iter(reporting))
        latency = measure_latencies(trained.network, means, points, chosen, images.to(device), progress)
    found = {
        "name": trained.name,
        "checkpoint": str(trained.checkpoint),
        "data": trained.data,
        "tolerance": tolerance,
        "num_images": {"deciding": num_deciding, "reporting": num_reporting},
        "blocks": len(means) + len(reasons),
        "chosen": chosen,
        "points": [asdict(point) for point in points],
        "not_foldable": reasons,
        "latency": {str(size): {str(k): times for k, times in by.items()} for size, by in latency.items()},
        "machine": asdict(machine),
    }
    folder = args.out or args.source / "slim"
    network = fold_first(trained.network, means, points, chosen)
    written = write(folder, slim_recipe(trained.recipe, network, folder), network, found)
    console = Console()
    print_slimming(found, console)
    console.print(f"Written: {', '.join(map(str, written))}", highlight=False, soft_wrap=True)
    console.print(f"Train on: composer-se train {folder / 'recipe.yaml'}", highlight=False, soft_wrap=True)
    return 0
