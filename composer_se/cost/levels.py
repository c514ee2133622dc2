"""Computes ratios of times, with intervals, from repeated timings of several instances of each variant."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from composer_se.measure.uncertainty import Interval, students_t

__all__ = ["Levels", "find_levels"]


@dataclass(frozen=True)
class Levels:
    """The time of each instance as a logarithm, relative to the median of all instances in the same round."""

    of: dict[str, np.ndarray]  # per variant, one for each instance
    common: float  # logarithm of the median time in seconds, in the median round
    deviation: float  # standard deviation between instances of the same variant, pooled over all variants
    degrees: int  # degrees of freedom of the standard deviation

    def seconds(self, variant: str) -> float:
        """The time of a variant in the median round. `ratio` is the quotient of two such times."""
        return math.exp(self.common + self.of[variant].mean())

    def ratio(self, variant: str, reference: str) -> Interval:
        """The time of one variant divided by that of another.

        The interval excludes 1 if the two variants differ by more than instances of the same code do. Two variants of
        the same code differ so much in one run of twenty.
        """
        ours, theirs = self.of[variant], self.of[reference]
        value = math.exp(ours.mean() - theirs.mean())
        half = self._half_width(1 / len(ours) + 1 / len(theirs))
        return Interval(value, value * math.exp(-half), value * math.exp(half))

    def overhead(self, ours: str, theirs: str, plain: str) -> Interval:
        """Our overhead over the plain network as a share of another implementation's.

        Returns:
            `(ours / plain - 1) / (theirs / plain - 1)`, with the interval that the noise of the three levels gives to
            first order. All numbers are NaN if `theirs` is not shown to be slower than `plain`, because the divisor
            could then be zero.
        """
        a, b = self.ratio(ours, plain), self.ratio(theirs, plain)
        if not b.low > 1:
            return Interval(math.nan, math.nan, math.nan)
        over_a, over_b = a.value - 1, b.value - 1
        value = over_a / over_b
        d_ours, d_theirs = a.value / over_b, -over_a * b.value / over_b**2
        slopes = ((ours, d_ours), (theirs, d_theirs), (plain, -d_ours - d_theirs))
        half = self._half_width(sum(slope**2 / len(self.of[name]) for name, slope in slopes))
        return Interval(value, value - half, value + half)

    def _half_width(self, variance: float) -> float:
        """Half the width of the interval of a sum of levels; `variance` is in units of the squared deviation."""
        return students_t(self.degrees) * self.deviation * math.sqrt(variance)


def find_levels(seconds: Mapping[str, Sequence[Sequence[float]]]) -> Levels:
    """Computes the level of each instance, and the spread between instances of the same variant.

    `seconds` holds times by variant, instance and round; each instance is timed once per round. Each time is divided by
    the median of its round, so the state of the machine (its clock, other programs) cancels. An instance's level is its
    median over rounds, so a single disturbed visit does not count.

    Raises:
        ValueError: If no variant has two instances.
    """
    logs = {name: np.log(rows) for name, rows in seconds.items()}
    common = np.median(np.concatenate(list(logs.values())), axis=0)
    of = {name: np.median(rows - common, axis=1) for name, rows in logs.items()}
    degrees = sum(len(levels) - 1 for levels in of.values())
    if degrees == 0:
        raise ValueError("at least two instances of a variant are needed to know the noise, got one of each")
    squares = sum(float(((levels - levels.mean()) ** 2).sum()) for levels in of.values())
    return Levels(of, float(np.median(common)), math.sqrt(squares / degrees), degrees)
