"""The options of Squeeze-and-Excitation: their defaults, what they mean, and the values they take."""

from __future__ import annotations

import logging
import math
import numbers
from collections.abc import Sequence
from dataclasses import InitVar, dataclass

__all__ = [
    "RECOMMENDED_LATENT_CHANNELS",
    "RECOMMENDED_MIN_CHANNELS",
    "SqueezeExciteOptions",
    "check_init",
    "check_latent_channels",
    "latent_width",
    "warn_of_inplace",
]

log = logging.getLogger(__name__)

RECOMMENDED_LATENT_CHANNELS = 64
RECOMMENDED_MIN_CHANNELS = 512

Patterns = str | Sequence[str] | None


@dataclass(frozen=True)
class SqueezeExciteOptions:
    """The options that choose the convs that get Squeeze-and-Excitation, and that shape the blocks.

    Args:
        latent_channels: Hidden width of the blocks' MLP: a whole number >= 1, or a share of the conv's output channels
            in (0, 1), rounded down but at least 1. Default: ``64``, the least width that is recommended.
        min_channels: The least number of channels of a conv that gets a block. ``"auto"`` is the smaller of 512 and the
            largest number in the model, as recommended. Default: ``128``.
        min_channels_of: ``"output"`` compares ``min_channels`` with the conv's output channels, ``"both"`` with the
            smaller of input and output channels, as Composer's built-in algorithm does. Default: ``"output"``.
        include: Glob pattern, or several, over qualified module names: only convs that match one, or lie in a module
            that does, get a block. A conv's full name also admits a conv inside an existing SE block or on a 1×1 map.
            A leading ``module.`` of a name, which Composer's and torch's wrappers add, may be left out. Default: all.
        exclude: Glob pattern, or several, of convs to skip. Default: none.
        init: How a block starts. ``"default"``: the initialisation of `torch.nn.Linear`, for networks trained from
            scratch. Each gate starts at about one half. ``"identity"``: gates of 1, which leave the network as it is,
            for networks that are trained already, and for blocks at the end of residual branches. The gates are
            ``2 sigmoid(z)`` then, and the last layer of the MLP starts at zero. Default: ``"default"``.
        placement: Where the block of a chosen conv goes. ``"conv"``: right after it. ``"norm"``: after the norm that
            follows it, as in the paper. Default: ``"conv"``.
        inplace: An option of earlier versions without effect. Any value but None logs a warning.

    Raises:
        TypeError: If an option has the wrong type.
        ValueError: If an option is out of range.
    """

    latent_channels: float = 64
    min_channels: int | str = 128
    min_channels_of: str = "output"
    include: Patterns = None
    exclude: Patterns = None
    init: str = "default"
    placement: str = "conv"
    inplace: InitVar[object] = None

    def __post_init__(self, inplace: object) -> None:
        warn_of_inplace(inplace)
        check_latent_channels(self.latent_channels)
        _check_min_channels(self.min_channels)
        if self.min_channels_of not in ("output", "both"):
            raise ValueError(
                f'min_channels_of is {self.min_channels_of!r}; choose "output" (the output channels count) or '
                '"both" (input and output channels do, as in Composer\'s built-in algorithm).'
            )
        check_init(self.init)
        if self.placement not in ("conv", "norm"):
            raise ValueError(
                f'placement is {self.placement!r}; choose "conv" (blocks after convs) or "norm" (after the norms '
                "that follow them)."
            )
        # Plain numbers and tuples, so that the repr can be evaluated whatever they came as.
        width = self.latent_channels
        normalised = {
            "latent_channels": int(width) if width >= 1 else float(width),
            "min_channels": self.min_channels if isinstance(self.min_channels, str) else int(self.min_channels),
            "include": as_patterns(self.include, "include"),
            "exclude": as_patterns(self.exclude, "exclude"),
        }
        for name, value in normalised.items():
            object.__setattr__(self, name, value)


def check_init(init: str) -> None:
    """Checks the option ``init``.

    Raises:
        ValueError: If it is neither "default" nor "identity".
    """
    if init not in ("default", "identity"):
        raise ValueError(f'init is {init!r}; choose "default", or "identity" for networks that are trained already.')


def warn_of_inplace(inplace: object) -> None:
    """Logs that the option ``inplace`` of earlier versions is not needed any more, if it was given."""
    if inplace is not None:
        log.warning("inplace=%r is not needed any more and does nothing: leave it out.", inplace)


_WIDTH_ADVICE = (
    "Give a whole number >= 1 for a width, or a fraction between 0 and 1 for a share of the conv's output channels."
)


def check_latent_channels(latent_channels: float) -> None:
    """Checks a hidden width, absolute or a share.

    Args:
        latent_channels: A whole number >= 1, or a fraction in (0, 1).

    Raises:
        TypeError: If it is not a number.
        ValueError: If it is neither a width nor a share.
    """
    if isinstance(latent_channels, bool) or not isinstance(latent_channels, numbers.Real):
        raise TypeError(
            f"latent_channels is {latent_channels!r} of type {type(latent_channels).__name__}. {_WIDTH_ADVICE}"
        )
    width = float(latent_channels)
    if not (0 < width < 1 or (width >= 1 and width.is_integer())):
        raise ValueError(f"latent_channels is {latent_channels!r}. {_WIDTH_ADVICE}")


def latent_width(latent_channels: float, num_features: int) -> int:
    """The number of hidden units of a block.

    Args:
        latent_channels: A whole number >= 1, or a share of ``num_features`` in (0, 1).
        num_features: Channels of the gated map.

    Returns:
        The width. A share is rounded down, but not below 1.
    """
    share = latent_channels < 1
    return max(1, int(latent_channels * num_features)) if share else int(latent_channels)


def _check_min_channels(min_channels: int | str) -> None:
    advice = 'Give the least number of output channels of a conv that gets SE, a whole number >= 1, or "auto".'
    if min_channels == "auto":
        return
    if isinstance(min_channels, bool | str) or not isinstance(min_channels, numbers.Real):
        raise TypeError(f"min_channels is {min_channels!r} of type {type(min_channels).__name__}. {advice}")
    if not math.isfinite(min_channels) or min_channels < 1 or min_channels != int(min_channels):
        raise ValueError(f"min_channels is {min_channels!r}. {advice}")


def as_patterns(patterns: Patterns, option: str) -> tuple[str, ...] | None:
    if patterns is None:
        return None
    as_tuple = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    for pattern in as_tuple:
        if not isinstance(pattern, str):
            raise TypeError(f"{option} holds {pattern!r}; give glob patterns over qualified names, as strings.")
    return as_tuple or None
