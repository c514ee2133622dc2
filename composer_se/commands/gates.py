"""Shows the gates of a trained network on held-out images, by class and by layer, and which layers need their gates.

Prints a table, and writes gates.png and gates.json into the run's folder (or --out). Fixes the gates of one layer at a
time at their means over the images, and measures the accuracy that the network loses.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from composer_se.commands.options import add_device_argument, read_device, writing

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `composer-se gates`."""
    parser.add_argument("source", metavar="RUN|CHECKPOINT", type=Path, help="a run's folder, or a checkpoint (.pt)")
    parser.add_argument(
        "--data",
        metavar="NAME[:ROOT]",
        help="data set whose held-out images are taken, and its folder, or package.module:name of your own "
        "(default: the recipe's eval_dataset)",
    )
    parser.add_argument(
        "--recipe", metavar="RECIPE", help="the recipe of a checkpoint that is not in a run's folder: a path or a name"
    )
    parser.add_argument("--out", metavar="FOLDER", type=Path, help="default: gates, in the run's folder if it has one")
    add_device_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Analyses the gates, prints the table, writes picture and numbers, and writes the run's report again."""
    from rich.console import Console

    from composer_se.commands.trained_network import load_trained
    from composer_se.gates.analysis import analyse
    from composer_se.gates.picture import draw
    from composer_se.gates.table import as_dict, print_analysis
    from composer_se.report.write import write_report
    from composer_se.show.terminal import progress_bar
    from composer_se.show.text import to_json

    trained = load_trained(args.source, args.recipe, args.data, read_device(args))
    with progress_bar() as progress:
        analysis = analyse(trained.network, trained.batches, progress)
    title = f"Gates of {trained.name} on {analysis.num_images:,} images of {trained.data}"
    outputs = len(analysis.layers[0].by_class)
    classes = [*(trained.classes or ())[:outputs], *map(str, range(len(trained.classes or ()), outputs))]
    origin = {"name": trained.name, "checkpoint": str(trained.checkpoint), "data": trained.data}
    folder = args.out or (trained.run_folder or Path()) / "gates"
    with writing("--out", folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "gates.json").write_text(to_json(origin | as_dict(analysis, classes)))
        draw(title, analysis, classes, folder / "gates.png")
    console = Console()
    print_analysis(title, analysis, console)
    written = [folder / "gates.png", folder / "gates.json"]
    if trained.run_folder is not None and args.out is None:
        written.append(write_report(trained.run_folder))
    console.print(f"Written: {', '.join(map(str, written))}", highlight=False, soft_wrap=True)
    return 0
