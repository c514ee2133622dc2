"""Options that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from composer_se.errors import UserError

if TYPE_CHECKING:
    import torch

    from composer_se.options import SqueezeExciteOptions

__all__ = [
    "add_device_argument",
    "add_recipe_arguments",
    "add_squeeze_excite_arguments",
    "read_device",
    "read_min_channels",
    "read_squeeze_excite",
    "writing",
]


def add_recipe_arguments(parser: argparse.ArgumentParser, changes: str) -> None:
    """Adds a recipe and its overrides. `composer_se.cli.parse` also finds overrides among the options."""
    parser.add_argument("recipe", metavar="RECIPE", help="path of a YAML file, or name of a shipped recipe")
    parser.add_argument("overrides", metavar="key=value", nargs="*", default=[], help=f"change {changes}")


def add_device_argument(parser: Any) -> None:
    """Adds `--device` to a parser or an argument group."""
    parser.add_argument("--device", help="as torch names it (default: cuda where there is one, else cpu)")


def read_device(args: argparse.Namespace) -> torch.device:
    """The device of `--device`. By default the GPU if there is one, else the CPU.

    Raises:
        UserError: If torch does not know the device, or can't compute on it here.
    """
    import torch

    if args.device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(args.device)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {args.device}: {str(error).splitlines()[0]}") from error
    return device


def add_squeeze_excite_arguments(parser: Any) -> None:
    """Adds options of Squeeze-and-Excitation to a parser or an argument group."""
    parser.add_argument(
        "--min-channels-of",
        choices=("output", "both"),
        help="which channels must reach --min-channels: the conv's output's, or input's and output's (default: output)",
    )
    parser.add_argument(
        "--latent-channels", metavar="N", help="hidden width, or a share of the channels in (0, 1) (default: 64)"
    )
    parser.add_argument("--include", action="append", metavar="GLOB", help="only convs that match; may be repeated")
    parser.add_argument("--exclude", action="append", metavar="GLOB", help="no conv that matches; may be repeated")
    parser.add_argument("--init", choices=("default", "identity"), help="how blocks start (default: default)")
    parser.add_argument(
        "--placement", choices=("conv", "norm"), help="blocks after convs, or after their norms (default: conv)"
    )


def read_squeeze_excite(
    args: argparse.Namespace, recipe: SqueezeExciteOptions | None, **others: Any
) -> SqueezeExciteOptions:
    """The options of SE: the recipe's or the defaults, with those of the command line in their place.

    Args:
        args: The parsed arguments, with those of `add_squeeze_excite_arguments`.
        recipe: The recipe's options, or None.
        others: Further options of the command. None stands for an option that the user did not give.

    Raises:
        UserError: If `--latent-channels` is neither a width nor a share.
    """
    from composer_se.options import SqueezeExciteOptions

    as_typed = {option.name for option in fields(SqueezeExciteOptions)} - {"min_channels", "latent_channels"}
    given = others | {option: getattr(args, option) for option in as_typed}
    if args.latent_channels is not None:
        given["latent_channels"] = _read_number("--latent-channels", args.latent_channels, "latent_channels")
    given = {option: value for option, value in given.items() if value is not None}
    return replace(recipe or SqueezeExciteOptions(), **given)


def read_min_channels(text: str) -> int | str:
    """Reads one value of --min-channels.

    Raises:
        UserError: If the value is neither a whole number from 1 on nor "auto".
    """
    return _read_number("--min-channels", text, "min_channels")


def _read_number(argument: str, text: str, option: str) -> Any:
    from composer_se.options import SqueezeExciteOptions

    given: dict[str, Any] = {option: _number(text)}
    try:
        return getattr(SqueezeExciteOptions(**given), option)
    except (TypeError, ValueError) as error:
        raise UserError(f"{argument} {text}: {error}") from error


def _number(text: str) -> int | float | str:
    """The text as a number, or without surrounding spaces if it is none."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text.strip()


@contextmanager
def writing(option: str, path: Path) -> Iterator[None]:
    """Turns a failed write into a `UserError` that names the option and its path."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{option} {path}: can't be written: {error.strerror or error}") from error
