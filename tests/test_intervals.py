"""Intervals against scipy's."""

from __future__ import annotations

import math

import pytest
from scipy import stats

from moco_dist.probe import figures


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 6, 9, 30, 101])
def test_students_quantile_is_that_of_scipy(freedom: int) -> None:
    assert figures.t_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-9)


def test_the_interval_of_seeds_is_that_of_scipy() -> None:
    values = [0.51, 0.55, 0.53, 0.50]
    low, high = stats.t.interval(0.95, 3, loc=sum(values) / 4, scale=stats.sem(values))
    assert figures.student_t(values) == pytest.approx((low, high), rel=1e-9)


@pytest.mark.parametrize(("hits", "count"), [(0, 37), (37, 37), (11, 37), (5090, 10000)])
def test_the_interval_of_a_share_is_wilsons(hits: int, count: int) -> None:
    theirs = stats.binomtest(hits, count).proportion_ci(method="wilson")
    assert figures.wilson(hits / count, count) == pytest.approx(tuple(theirs), abs=1e-9)


def test_the_interval_of_a_mean_is_that_of_the_normal_law() -> None:
    values = [1.0, 2.5, 0.5, 4.0]
    mean, squares = sum(values) / 4, sum(v * v for v in values) / 4
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / 4)
    theirs = stats.norm.interval(0.95, loc=mean, scale=spread / 2)
    assert figures.normal(mean, squares, 4) == pytest.approx(tuple(theirs), rel=1e-9)
