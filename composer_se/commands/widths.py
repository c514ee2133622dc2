"""The numbers of channels on a command line: spelled here, judged by the library's own checks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from composer_se.errors import UserError

__all__ = ["read_latent_channels", "read_min_channels"]


def read_latent_channels(text: str) -> float:
    """Reads the value of --latent-channels.

    Raises:
        UserError: It is neither a width nor a share.
    """
    from composer_se.modules import check_latent_channels

    return _read("--latent-channels", text, check_latent_channels)


def read_min_channels(text: str) -> int | str:
    """Reads one value of --min-channels.

    Raises:
        UserError: It is neither a whole number from 1 on nor "auto".
    """
    from composer_se.selection import check_min_channels

    value = _read("--min-channels", text, check_min_channels)
    return value if isinstance(value, str) else int(value)


def _read(option: str, text: str, check: Callable[[Any], None]) -> Any:
    value = _number(text)
    try:
        check(value)
    except (TypeError, ValueError) as error:
        raise UserError(f"{option} {text}: {error}") from error
    return value


def _number(text: str) -> int | float | str:
    """A number where the text is one."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text.strip()
