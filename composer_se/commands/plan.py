"""Shows the convs of a network that would get Squeeze-and-Excitation, and the added cost. Changes and trains nothing.

Equal convs whose names differ only in numbers share a row. Its numbers are those of each conv.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from composer_se.commands.network import add_network_arguments, read_network
from composer_se.commands.widths import read_latent_channels, read_min_channels
from composer_se.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from composer_se.options import SqueezeExciteOptions
    from composer_se.planning import Plan

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `composer-se plan`."""
    add_network_arguments(parser)
    choice = parser.add_argument_group("which convs (default: the recipe's, or those of apply_squeeze_excite)")
    choice.add_argument("--min-channels", metavar="N", help="least number of channels, or 'auto' (default: 128)")
    choice.add_argument(
        "--min-channels-of",
        choices=("output", "both"),
        help="which channels must reach --min-channels: the conv's output's, or input's and output's (default: output)",
    )
    choice.add_argument(
        "--latent-channels", metavar="N", help="hidden width, or a share of the channels in (0, 1) (default: 64)"
    )
    choice.add_argument("--include", action="append", metavar="GLOB", help="only convs that match; may be repeated")
    choice.add_argument("--exclude", action="append", metavar="GLOB", help="no conv that matches; may be repeated")
    choice.add_argument("--init", choices=("default", "identity"), help="how blocks start (default: default)")
    choice.add_argument("--placement", choices=("conv", "norm"), help="what the blocks follow (default: conv)")
    parser.add_argument(
        "--image-size",
        type=_size,
        metavar="N",
        help="height and width in pixels (N, or HxW), for sizes of maps and multiply-adds (default: the recipe's)",
    )
    parser.add_argument("--json", metavar="FILE", help="write every conv and the totals to a file; - for stdout")


def run(args: argparse.Namespace) -> int:
    """Prints the plan, or writes it as JSON.

    Args:
        args: As parsed by `add_arguments`.

    Returns:
        0.

    Raises:
        UserError: An option is wrong, or the network can't be built.
    """
    from rich.console import Console

    from composer_se.planning import plan

    network = read_network(args)
    options = _options(args, network.squeeze_excite)
    try:
        planned = plan(network.build(), image_size=args.image_size or network.image_size, **asdict(options))
    except (TypeError, ValueError) as error:
        raise UserError(" ".join(str(error).split())) from error
    if args.json == "-":
        json.dump(as_json(planned), sys.stdout, indent=2)
        print()
        return 0
    if args.json is not None:
        try:
            Path(args.json).write_text(json.dumps(as_json(planned), indent=2) + "\n")
        except OSError as error:
            raise UserError(f"--json {args.json}: {error.strerror}") from error
    console = Console()
    console.print(_table(network.name, planned))
    for line in planned.summary():
        console.print(line, highlight=False)
    for note in planned.notes:
        console.print(f"[yellow]Note:[/yellow] {note}", highlight=False)
    return 0


def as_json(planned: Plan) -> dict[str, Any]:
    """A plan for JSON: totals, notes and one object per conv."""
    return {
        **asdict(planned.options),
        "threshold": planned.threshold,
        "image_size": planned.image_size,
        "parameters": planned.parameters,
        "added_parameters": planned.added_parameters,
        "multiply_adds": planned.multiply_adds,
        "added_multiply_adds": planned.added_multiply_adds,
        "gated_share": planned.gated_share,
        "notes": planned.notes,
        "convs": planned.to_dicts(),
    }


def _options(args: argparse.Namespace, recipe: SqueezeExciteOptions | None) -> SqueezeExciteOptions:
    from composer_se.options import SqueezeExciteOptions

    given = {
        "min_channels": None if args.min_channels is None else read_min_channels(args.min_channels),
        "min_channels_of": args.min_channels_of,
        "latent_channels": None if args.latent_channels is None else read_latent_channels(args.latent_channels),
        "include": args.include,
        "exclude": args.exclude,
        "init": args.init,
        "placement": args.placement,
    }
    given = {option: value for option, value in given.items() if value is not None}
    return replace(recipe or SqueezeExciteOptions(), **given)


def _size(text: str) -> tuple[int, int]:
    parts = text.lower().replace("×", "x").split("x")
    if len(parts) > 2 or not all(part.isdecimal() and int(part) >= 1 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of pixels nor HxW")
    return int(parts[0]), int(parts[-1])


def _table(name: str, planned: Plan) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=f"Squeeze-and-Excitation on {name}", box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 1, 0, 0)
    )
    with_maps = planned.multiply_adds is not None
    table.add_column("conv", overflow="fold")
    table.add_column("×", justify="right", no_wrap=True)
    table.add_column("channels", justify="right", no_wrap=True)
    if with_maps:
        table.add_column("map", justify="right", no_wrap=True)
    # One column for the cost of chosen convs and the reason for the others, so that the table fits 80 characters.
    gets = f"{'width':>5} {'+weights':>9}" + (f" {'+mult-adds':>10}" if with_maps else "")
    table.add_column(Text(gets), min_width=len(gets))
    for conv in planned.grouped():
        cells = [conv.name, str(conv.num_convs), f"{conv.in_channels}→{conv.out_channels}"]
        if with_maps:
            cells.append("×".join(map(str, conv.map_size)) if conv.map_size else "")
        gets = f"{conv.latent_channels:>5} {conv.added_parameters:>9,}"
        gets += f" {conv.added_multiply_adds:>10,}" if with_maps else ""
        # As Text: brackets of a name are no markup.
        cells.append(gets if conv.chosen else conv.reason)
        table.add_row(*map(Text, cells), style="green" if conv.chosen else "dim")
    return table
