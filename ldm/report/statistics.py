"""Means over seeds with confidence intervals, and differences with p-values, by Student's t."""

import math
import statistics
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from scipy.special import stdtr, stdtrit

LEVEL = 0.05


@dataclass(frozen=True)
class Mean:
    """A mean of `count` values; `half` is half the width of its 95 % interval, None for fewer than two values."""

    value: float
    half: float | None
    count: int


@dataclass(frozen=True)
class Contrast:
    """The difference a - b; half the width of its 95 % interval and its p-value are None if there are too few seeds."""

    difference: float
    half: float | None
    p: float | None
    count: int  # of pairs, or of values of the smaller group
    paired: bool


def mean(values: Sequence[float]) -> Mean:
    n = len(values)
    half = quantile(n - 1) * statistics.stdev(values) / math.sqrt(n) if n > 1 else None
    return Mean(statistics.fmean(values), half, n)


def contrast(a: Mapping[Hashable, float], b: Mapping[Hashable, float]) -> Contrast:
    """Compares values by seed: paired if at least two seeds are common, over those, otherwise by Welch's test."""
    common = [seed for seed in a if seed in b and seed is not None]
    if len(common) > 1:
        differences = [a[seed] - b[seed] for seed in common]
        error = statistics.stdev(differences) / math.sqrt(len(common))
        return _tested(statistics.fmean(differences), error, len(common) - 1, len(common), paired=True)
    x, y = list(a.values()), list(b.values())
    difference, count = statistics.fmean(x) - statistics.fmean(y), min(len(x), len(y))
    if count < 2:
        return Contrast(difference, None, None, count, paired=False)
    u, v = statistics.variance(x) / len(x), statistics.variance(y) / len(y)
    freedom = (u + v) ** 2 / (u**2 / (len(x) - 1) + v**2 / (len(y) - 1)) if u + v else len(x) + len(y) - 2
    return _tested(difference, math.sqrt(u + v), freedom, count, paired=False)


def _tested(difference: float, error: float, freedom: float, count: int, paired: bool) -> Contrast:
    p = two_sided(abs(difference) / error, freedom) if error else float(difference == 0)
    return Contrast(difference, quantile(freedom) * error, p, count, paired)


def two_sided(t: float, freedom: float) -> float:
    """Returns P(|T| > t) of Student's t distribution."""
    return float(2 * stdtr(freedom, -abs(t)))


def quantile(freedom: float, level: float = LEVEL) -> float:
    """Returns the t with P(|T| > t) = level of Student's t distribution."""
    return float(-stdtrit(freedom, level / 2))


def holm(values: Sequence[float]) -> list[float]:
    """Adjusts p-values for their number (Holm 1979)."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    adjusted, largest = [0.0] * len(values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, values[index] * (len(values) - rank)))
        adjusted[index] = largest
    return adjusted
