"""Reads numbers of channels from a command line. `composer_se.SqueezeExciteOptions` checks them."""

from __future__ import annotations

from typing import Any

from composer_se.errors import UserError

__all__ = ["read_latent_channels", "read_min_channels"]


def read_latent_channels(text: str) -> float:
    """Reads the value of --latent-channels.

    Raises:
        UserError: It is neither a width nor a share.
    """
    return _read("--latent-channels", text, "latent_channels")


def read_min_channels(text: str) -> int | str:
    """Reads one value of --min-channels.

    Raises:
        UserError: It is neither a whole number from 1 on nor "auto".
    """
    return _read("--min-channels", text, "min_channels")


def _read(argument: str, text: str, option: str) -> Any:
    from composer_se.options import SqueezeExciteOptions

    given: dict[str, Any] = {option: _number(text)}
    try:
        return getattr(SqueezeExciteOptions(**given), option)
    except (TypeError, ValueError) as error:
        raise UserError(f"{argument} {text}: {error}") from error


def _number(text: str) -> int | float | str:
    """A number where the text is one."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text.strip()
