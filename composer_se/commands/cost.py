"""Measures the cost of Squeeze-and-Excitation on a network and this machine.

Prints a row for the plain network and one for each --min-channels: SE layers, parameters, multiply-adds, bytes saved
for backward, full-size passes, and the time of a training step and of inference. The rows also have ratios to the plain
network, those of times with their noise. --layers also prints what SE adds to each different layer alone.
"""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from composer_se import launch
from composer_se.commands.network import NamedNetwork, add_network_arguments, read_network
from composer_se.commands.options import (
    add_device_argument,
    add_squeeze_excite_arguments,
    read_device,
    read_min_channels,
    read_squeeze_excite,
    writing,
)
from composer_se.errors import UserError

if TYPE_CHECKING:
    from composer_se.cost.settings import Settings

__all__ = ["add_arguments", "run"]

DEFAULT_IMAGE_SIZE = 224
DEFAULT_MIN_CHANNELS: tuple[int | str, ...] = (64, 128, 256, 512)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `composer-se cost`."""
    add_network_arguments(parser)
    what = parser.add_argument_group("what is measured")
    what.add_argument(
        "--min-channels",
        metavar="N,N,…",
        help="settings to compare, each a whole number or 'auto' (default: 64,128,256,512, or the recipe's)",
    )
    add_squeeze_excite_arguments(what)
    what.add_argument(
        "--against", choices=("composer",), help="measure Composer's built-in too, on the same convs and widths"
    )
    what.add_argument(
        "--layers", action="store_true", help="measure each different SE layer alone, too (one --min-channels)"
    )
    what.add_argument("--batch-size", type=_positive, default=16, metavar="N", help="images (default: 16)")
    what.add_argument(
        "--image-size", type=_positive, metavar="N", help="height and width in pixels (default: the recipe's, or 224)"
    )
    where = parser.add_argument_group("how it is run")
    add_device_argument(where)
    where.add_argument("--precision", choices=("fp32", "amp_bf16", "amp_fp16"), default="fp32", help="default: fp32")
    where.add_argument("--channels-last", action="store_true", help="network and images in channels_last layout")
    where.add_argument("--compile", action="store_true", help="through torch.compile")
    where.add_argument(
        "--repeats",
        type=_positive,
        default=5,
        metavar="N",
        help="timed visits to each instance: more take longer and reduce the noise (default: 5)",
    )
    where.add_argument(
        "--instances",
        type=_positive,
        default=4,
        metavar="N",
        help="copies of each variant, at least 2: the spread between them is the noise (default: 4)",
    )
    output = parser.add_argument_group("output")
    output.add_argument("--json", type=Path, metavar="FILE", help="write everything found, each timing included")
    output.add_argument("--plot", type=Path, metavar="FILE", help="draw cost against min_channels (.png, .svg, …)")


def run(args: argparse.Namespace) -> int:
    """Measures the cost, prints the tables, and writes the files that the user asked for."""
    from matplotlib.backend_bases import FigureCanvasBase
    from rich.console import Console

    from composer_se.cost.picture import draw
    from composer_se.cost.study import measure
    from composer_se.cost.tables import as_dict, print_study
    from composer_se.show.terminal import progress_bar
    from composer_se.show.text import to_json

    _check_file("--json", args.json)
    _check_file("--plot", args.plot)
    if args.plot is not None and args.plot.suffix.removeprefix(".") not in FigureCanvasBase.get_supported_filetypes():
        raise UserError(f"--plot {args.plot}: its ending must name a picture format, such as .png or .svg")
    network = read_network(args)
    settings = _settings(args, network)
    built = network.build()
    with launch.logged_from(logging.ERROR), progress_bar() as progress:
        study = measure(network.name, built, settings, progress)
    print_study(study, Console())
    if args.json is not None:
        with writing("--json", args.json):
            args.json.write_text(to_json(as_dict(study)))
    if args.plot is not None:
        with writing("--plot", args.plot):
            draw(study, args.plot)
    return 0


def _settings(args: argparse.Namespace, network: NamedNetwork) -> Settings:
    from composer_se.cost.settings import Settings

    if args.instances < 2:
        raise UserError(f"--instances {args.instances}: at least 2 are needed to know what the run can resolve")
    options = read_squeeze_excite(args, network.squeeze_excite)
    if args.min_channels is not None:
        min_channels = tuple(dict.fromkeys(read_min_channels(part.strip()) for part in args.min_channels.split(",")))
    else:
        min_channels = DEFAULT_MIN_CHANNELS if network.squeeze_excite is None else (options.min_channels,)
    device = read_device(args)
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {args.device}: only cpu and cuda devices can be timed")
    if args.layers and len(min_channels) > 1:
        raise UserError("--layers: measures the layers of one setting; give one --min-channels")
    return Settings(
        min_channels=min_channels,
        squeeze_excite=options,
        against_composer=args.against == "composer",
        batch_size=args.batch_size,
        image_size=args.image_size or network.image_size or DEFAULT_IMAGE_SIZE,
        device=device,
        precision=args.precision,
        channels_last=args.channels_last,
        compiled=args.compile,
        instances=args.instances,
        rounds=args.repeats,
        layers=args.layers,
    )


def _check_file(option: str, path: Path | None) -> None:
    """Raises an error now, and not after the measurement, if the file can't be written."""
    if path is None:
        return
    is_new = not os.path.lexists(path)
    with writing(option, path):
        path.open("a").close()
        if is_new:
            path.unlink()  # a later failure must not leave an empty file


def _positive(text: str) -> int:
    if not (text.isdecimal() and int(text) >= 1):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)
