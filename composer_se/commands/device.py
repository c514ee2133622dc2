"""The `--device` option."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from composer_se.errors import UserError

if TYPE_CHECKING:
    import torch

__all__ = ["add_device_argument", "read_device"]


def add_device_argument(parser: Any) -> None:
    """Adds `--device` to a parser or an argument group."""
    parser.add_argument("--device", help="as torch names it (default: cuda where there is one, else cpu)")


def read_device(args: argparse.Namespace) -> torch.device:
    """The device named, or the GPU where there is one.

    Raises:
        UserError: Torch does not know the device, or can't compute on it here.
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
