"""Differences between arms, paired by seed, and ratios of times, paired by turn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

__all__ = ["Estimate", "mean_difference", "ratio_of_means", "seeds_needed"]


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % confidence interval.

    Attributes:
        value: The figure.
        low: Lower end of the interval. NaN where there is one observation only.
        high: Upper end, likewise.
        count: Observations behind it.
    """

    value: float
    low: float
    high: float
    count: int

    @property
    def half_width(self) -> float:
        """Half the interval."""
        return (self.high - self.low) / 2

    def excludes(self, value: float) -> bool:
        """Whether the interval lies on one side of a value.

        One observation excludes nothing, nor do several that agree to the digit: accuracies come in whole images, and
        two seeds of two equal arms differ by the same number of them in 7 % of cases.
        """
        return not self.is_tie and (self.low > value or self.high < value)

    @property
    def is_tie(self) -> bool:
        """Whether there is no spread to judge by, but for rounding."""
        return self.high - self.low < 1e-9


def mean_difference(ours: Sequence[float], theirs: Sequence[float]) -> Estimate:
    """The mean of `ours[i] - theirs[i]`, with Student's t interval over the pairs."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    return _around(mean(differences), differences, scale=1.0)


def ratio_of_means(ours: Sequence[float], theirs: Sequence[float]) -> Estimate:
    """The mean of `ours` over the mean of `theirs`.

    The interval is that of the linearised ratio (the delta method) over the pairs: what both members of a pair share,
    such as the state of the machine, cancels.
    """
    ratio = mean(ours) / mean(theirs)
    residuals = [a - ratio * b for a, b in zip(ours, theirs, strict=True)]
    return _around(ratio, residuals, scale=1 / mean(theirs))


def seeds_needed(difference: Estimate) -> int | None:
    """About how many seeds would tell a difference of the size seen from zero.

    Returns:
        The number whose interval would be as wide as the difference is large, given the spread seen: with so many
        seeds it would be shown about every other time. One more than there are where no spread was seen. None where
        it is over 10,000, the spread is unknown or the difference is nought.
    """
    if difference.count < 2 or math.isnan(difference.half_width) or difference.value == 0:
        return None
    if difference.is_tie:
        return difference.count + 1
    deviation = difference.half_width / _quantile(difference.count) * math.sqrt(difference.count)
    count = 2
    while _quantile(count) * deviation / math.sqrt(count) > abs(difference.value):
        count = count + 1 if count < 100 else math.ceil(count * 1.1)
        if count > 10_000:
            return None
    return count


def _around(value: float, deviations: Sequence[float], scale: float) -> Estimate:
    count = len(deviations)
    if count < 2:
        return Estimate(value, math.nan, math.nan, count)
    half = _quantile(count) * stdev(deviations) * scale / math.sqrt(count)
    return Estimate(value, value - half, value + half, count)


def _quantile(count: int) -> float:
    from scipy.stats import t

    return float(t.ppf(0.975, count - 1))
