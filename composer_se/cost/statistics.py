"""What repeated timings of several instances of every variant say, and what they cannot say."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median

__all__ = ["Comparison", "Levels", "Ratio", "compare", "compare_overheads", "levels", "typical_seconds"]

Seconds = Mapping[str, Sequence[Sequence[float]]]
"""Per variant, per instance of it, one time in seconds for each round."""


@dataclass(frozen=True)
class Levels:
    """How slow each instance is, in logarithms, with what all instances of a round have in common taken out.

    Attributes:
        of: Per variant, one logarithm for each instance.
        common: Logarithm of the time in seconds that the levels are relative to, in the median round.
        deviation: Standard deviation between instances of the same code, pooled over all variants.
        degrees: Degrees of freedom behind `deviation`.
    """

    of: dict[str, list[float]]
    common: float
    deviation: float
    degrees: int


@dataclass(frozen=True)
class Ratio:
    """One figure with what the run could resolve.

    Attributes:
        value: The figure; 1 would mean no difference.
        low: Lower end of its 95 % interval. NaN where the figure cannot be told at all.
        high: Upper end, likewise.
        lowest: The smallest value among single instances.
        highest: The largest, likewise.
        resolved: Whether the figure differs from 1 by more than the same code differs from itself: in one run of
            twenty, two variants of the very same code would.
    """

    value: float
    low: float
    high: float
    lowest: float
    highest: float
    resolved: bool

    @property
    def resolution(self) -> float:
        """Half width of the interval: of its two halves, the wider one."""
        return self.high - self.value

    def __str__(self) -> str:
        if math.isnan(self.resolution):
            return "not resolved"
        digits = 2 if self.resolution >= 0.005 else 3
        spread = f"±{self.resolution:.{digits}f}"
        return f"{self.value:.{digits}f} {spread}" if self.resolved else f"{self.value:.{digits}f} (within {spread})"


@dataclass(frozen=True)
class Comparison:
    """Ours beside another implementation on the same layers.

    Attributes:
        time: Our time over theirs.
        overhead: Our overhead over the plain network, over theirs.
    """

    time: Ratio
    overhead: Ratio


def levels(seconds: Seconds) -> Levels:
    """Takes out what the rounds share and finds how far instances of the same code lie apart.

    In every round each instance is timed once, so the median of a round is the state of the machine in it (its clock,
    its other guests) and cancels. An instance's level is the median over its rounds, so that a disturbed visit
    does not count.

    Args:
        seconds: Per variant, per instance, one time in seconds for each round; the same number of rounds everywhere
            and at least two instances of some variant.

    Returns:
        The levels.

    Raises:
        ValueError: No variant has two instances.
    """
    logs = {name: [[math.log(t) for t in visits] for visits in rows] for name, rows in seconds.items()}
    everything = [visits for rows in logs.values() for visits in rows]
    common = [median(visits[r] for visits in everything) for r in range(len(everything[0]))]
    of = {
        name: [median(t - c for t, c in zip(visits, common, strict=True)) for visits in rows]
        for name, rows in logs.items()
    }
    degrees = sum(len(values) - 1 for values in of.values())
    if degrees == 0:
        raise ValueError("at least two instances of a variant are needed to know the resolution, got one of each")
    squares = sum((value - mean(values)) ** 2 for values in of.values() for value in values)
    return Levels(of, median(common), math.sqrt(squares / degrees), degrees)


def typical_seconds(measured: Levels, variant: str) -> float:
    """The time of a variant in the median round; quotients of two of them are what `compare` gives."""
    return math.exp(measured.common + mean(measured.of[variant]))


def compare(measured: Levels, variant: str, reference: str) -> Ratio:
    """The time of one variant over that of another.

    Args:
        measured: The levels of all variants.
        variant: Name of the numerator.
        reference: Name of the denominator.

    Returns:
        The ratio, its resolution, and the ratios of single instances of `variant` to the mean of `reference`.
    """
    ours, theirs = measured.of[variant], measured.of[reference]
    base = mean(theirs)
    value = math.exp(mean(ours) - base)
    half = _quantile(measured) * measured.deviation * math.sqrt(1 / len(ours) + 1 / len(theirs))
    return Ratio(
        value,
        low=value * math.exp(-half),
        high=value * math.exp(half),
        lowest=math.exp(min(ours) - base),
        highest=math.exp(max(ours) - base),
        resolved=abs(math.log(value)) > half,
    )


def compare_overheads(measured: Levels, ours: str, theirs: str, plain: str) -> Ratio:
    """Our overhead over the plain network as a share of another implementation's.

    Args:
        measured: The levels of all variants.
        ours: Name of our variant.
        theirs: Name of the other variant.
        plain: Name of the plain network.

    Returns:
        `(ours / plain - 1) / (theirs / plain - 1)`. Its resolution follows from that of the three levels to first
        order, and is NaN where the other variant is not slower than the plain network beyond its resolution: a
        quotient by something that may be zero says nothing.
    """
    a, b = compare(measured, ours, plain), compare(measured, theirs, plain)
    if not b.resolved or b.value < 1:
        return Ratio(math.nan, math.nan, math.nan, math.nan, math.nan, resolved=False)
    over_a, over_b = a.value - 1, b.value - 1
    value = over_a / over_b
    d_ours, d_theirs = a.value / over_b, -over_a * b.value / over_b**2
    slopes = ((ours, d_ours), (theirs, d_theirs), (plain, -d_ours - d_theirs))
    variance = sum(slope**2 / len(measured.of[name]) for name, slope in slopes)
    half = _quantile(measured) * measured.deviation * math.sqrt(variance)
    lowest, highest = sorted(((a.lowest - 1) / over_b, (a.highest - 1) / over_b))
    return Ratio(value, value - half, value + half, lowest, highest, resolved=abs(value - 1) > half)


def _quantile(measured: Levels) -> float:
    """Student's t for 95 %, both sides."""
    from scipy.stats import t

    return float(t.ppf(0.975, measured.degrees))
