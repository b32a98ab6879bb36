"""95 % intervals of a figure: over seeds, or of a share of so many images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, stdev

LEVEL = 0.95
Z = NormalDist().inv_cdf((1 + LEVEL) / 2)


def student_t(values: Sequence[float]) -> tuple[float, float]:
    """Return the interval of the mean of two values or more, Student's t (Student 1908)."""
    half = t_quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return fmean(values) - half, fmean(values) + half


def wilson(share: float, count: int) -> tuple[float, float]:
    """Return the interval of a share of `count` images (Wilson 1927); it lies within 0 and 1."""
    weight = Z**2 / count
    middle = (share + weight / 2) / (1 + weight)
    half = Z / (1 + weight) * math.sqrt(share * (1 - share) / count + weight / (4 * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def normal(mean: float, mean_of_squares: float, count: int) -> tuple[float, float]:
    """Return the interval of the mean of `count` values by their mean and that of their squares."""
    half = Z * math.sqrt(max(0.0, mean_of_squares - mean**2) / count)
    return mean - half, mean + half


def t_quantile(freedom: int) -> float:
    """Return the two-sided 95 % quantile of Student's t with whole degrees of freedom, from 1."""
    low, high = 0.0, 13.0  # that of one degree is 12.706
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < LEVEL else (low, middle)
    return high


def _within(t: float, freedom: int) -> float:
    """Return the probability of [-t, t]: Abramowitz and Stegun 1964, 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(freedom))
    cosine, odd = math.cos(angle), freedom % 2
    term = total = cosine if odd else 1.0
    if odd and freedom == 1:
        total = 0.0
    for k in range(2 + odd, freedom - 1, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total
