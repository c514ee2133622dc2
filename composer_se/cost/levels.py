"""The level of each copy of each variant, from repeated timings, and the ratios that follow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median

from composer_se.measure.uncertainty import Interval, students_t

__all__ = ["Levels", "find_levels", "overhead_ratio", "time_ratio", "typical_seconds"]

Seconds = Mapping[str, Sequence[Sequence[float]]]
"""Per variant, per instance of it, one time in seconds for each round."""


@dataclass(frozen=True)
class Levels:
    """The time of each instance as a logarithm, relative to the median of all instances in the same round.

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


def find_levels(seconds: Seconds) -> Levels:
    """Divides by the median of each round, and finds the spread between instances of the same code.

    Each instance is timed once a round. The median of a round measures the state of the machine (its clock, other
    programs), and cancels. An instance's level is the median over its rounds, so a single disturbed visit does not
    count.

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
    """The time of a variant in the median round. `time_ratio` is the quotient of two such times."""
    return math.exp(measured.common + mean(measured.of[variant]))


def time_ratio(measured: Levels, variant: str, reference: str) -> Interval:
    """The time of one variant over that of another.

    Args:
        measured: The levels of all variants.
        variant: Name of the numerator.
        reference: Name of the denominator.

    Returns:
        The ratio. Its interval excludes 1 when the two differ by more than copies of the same code do. For two variants
        of the same code this happens in one run of twenty.
    """
    ours, theirs = measured.of[variant], measured.of[reference]
    value = math.exp(mean(ours) - mean(theirs))
    half = students_t(measured.degrees) * measured.deviation * math.sqrt(1 / len(ours) + 1 / len(theirs))
    return Interval(value, value * math.exp(-half), value * math.exp(half))


def overhead_ratio(measured: Levels, ours: str, theirs: str, plain: str) -> Interval:
    """Our overhead over the plain network as a share of another implementation's.

    Args:
        measured: The levels of all variants.
        ours: Name of our variant.
        theirs: Name of the other variant.
        plain: Name of the plain network.

    Returns:
        `(ours / plain - 1) / (theirs / plain - 1)`. Its interval follows from that of the three levels to first order.
        All is NaN if the other variant is not shown to be slower than the plain network: the divisor could be zero.
    """
    a, b = time_ratio(measured, ours, plain), time_ratio(measured, theirs, plain)
    if not b.low > 1:
        return Interval(math.nan, math.nan, math.nan)
    over_a, over_b = a.value - 1, b.value - 1
    value = over_a / over_b
    d_ours, d_theirs = a.value / over_b, -over_a * b.value / over_b**2
    slopes = ((ours, d_ours), (theirs, d_theirs), (plain, -d_ours - d_theirs))
    variance = sum(slope**2 / len(measured.of[name]) for name, slope in slopes)
    half = students_t(measured.degrees) * measured.deviation * math.sqrt(variance)
    return Interval(value, value - half, value + half)
