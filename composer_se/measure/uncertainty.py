"""Computes 95 % confidence intervals of differences, ratios and shares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from scipy.stats import t

__all__ = ["Interval", "change_of_share", "mean_difference", "pairs_needed", "ratio_of_means", "students_t"]


@dataclass(frozen=True)
class Interval:
    """A number with its 95 % confidence interval, whose ends are NaN if the spread is unknown."""

    value: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """The distance from the value to the upper end. The lower distance differs if logarithms were averaged."""
        return self.high - self.value

    def excludes(self, value: float) -> bool:
        """True if the whole interval is above or below a value. An unknown interval excludes nothing."""
        return self.low > value or self.high < value

    def with_spread(self, separator: str = " ") -> str:
        """The number, and the distance to the upper end of its interval: `1.08 ±0.03`."""
        digits = 2 if not self.half_width < 0.005 else 3
        return f"{self.value:.{digits}f}{separator}±{self.half_width:.{digits}f}"

    def __str__(self) -> str:
        """The ratio with its spread: in brackets if the interval includes 1, "not resolved" if it is unknown."""
        if math.isnan(self.half_width):
            return "not resolved"
        shown = self.with_spread()
        return shown if self.excludes(1) else f"{shown.replace('±', '(within ±')})"


def students_t(degrees: int) -> float:
    """The two-sided 95 % quantile of Student's t distribution; NaN for no degrees of freedom."""
    return float(t.ppf(0.975, degrees))


def pairs_needed(difference: float, deviation: float, chance: float) -> int | None:
    """The approximate number of pairs that show a difference by the 95 % interval of `mean_difference`.

    At a chance of 0.5 the interval's half width is about the difference.

    Args:
        difference: The difference to show.
        deviation: The standard deviation of the difference from pair to pair.
        chance: The probability that so many pairs show it.

    Returns:
        The number of pairs, 2 or more; None if it is over 10,000.
    """
    count = 2
    while (students_t(count - 1) + t.ppf(chance, count - 1)) * deviation / math.sqrt(count) > abs(difference):
        count = count + 1 if count < 100 else math.ceil(count * 1.1)
        if count > 10_000:
            return None
    return count


def change_of_share(lost: int, gained: int, total: int) -> Interval:
    """The change of a share of `total` things when `lost` of them leave it and `gained` of them join it.

    The interval is that of Agresti and Min (2005) for paired shares. It adds half a thing to each of the four outcomes,
    so it has a width even if nothing changes.
    """
    change, n = (gained - lost) / total, total + 2
    half = 1.96 * math.sqrt(lost + gained + 1 - (gained - lost) ** 2 / n) / n
    return Interval(change, change - half, change + half)


def mean_difference(ours: Sequence[float], theirs: Sequence[float]) -> Interval:
    """The mean of `ours[i] - theirs[i]`, with Student's t interval over the pairs."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    return _around(mean(differences), differences)


def ratio_of_means(ours: Sequence[float], theirs: Sequence[float]) -> Interval:
    """The mean of `ours` over the mean of `theirs`.

    The interval is that of the linearised ratio (the delta method) over the pairs. Both members of a
    pair share the state of the machine, so it cancels.
    """
    ratio = mean(ours) / mean(theirs)
    return _around(ratio, [(a - ratio * b) / mean(theirs) for a, b in zip(ours, theirs, strict=True)])


def _around(value: float, deviations: Sequence[float]) -> Interval:
    if len(deviations) < 2:
        return Interval(value, math.nan, math.nan)
    half = students_t(len(deviations) - 1) * stdev(deviations) / math.sqrt(len(deviations))
    return Interval(value, value - half, value + half)
