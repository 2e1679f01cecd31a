"""Intervals and quantiles by hand, against tables, and by coverage."""

import numpy as np
import pytest

from prefopt.intervals import (
    bootstrap_interval,
    normal_quantile,
    student_quantile,
    t_interval,
    wilson_interval,
)


def test_wilson_by_hand():
    """p = 1/2, n = 4, z = 2: (1/2 + 1/2 -+ 2 sqrt(1/16 + 1/16)) / 2, so centre 1/2 and reach sqrt(1/8)."""
    assert wilson_interval(2, 4, z=2) == pytest.approx((0.5 - 0.125**0.5, 0.5 + 0.125**0.5))
    assert wilson_interval(0, 0) == (0.0, 1.0)
    low, high = wilson_interval(0, 10)
    assert low == 0 and wilson_interval(10, 10) == pytest.approx((1 - high, 1))
    assert normal_quantile(0.95) == pytest.approx(1.959964, abs=1e-6)


@pytest.mark.parametrize(
    ("probability", "degrees", "value"),
    [
        (0.975, 1, 12.7062047),
        (0.975, 2, 4.30265273),
        (0.975, 4, 2.77644511),
        (0.975, 9, 2.26215716),
        (0.95, 29, 1.69912703),
        (0.995, 3, 5.84090931),
        (0.9995, 1, 636.619249),
        (0.5, 5, 0.0),
    ],
)
def test_student_quantiles_of_the_tables(probability, degrees, value):
    assert student_quantile(probability, degrees) == pytest.approx(value, rel=1e-7, abs=1e-12)


def test_t_interval_by_hand():
    """Mean 2, sd 1, N = 3: reach 4.30265273 / sqrt(3)."""
    assert t_interval([1.0, 2.0, 3.0]) == pytest.approx((2 - 2.48413771, 2 + 2.48413771))


def test_bootstrap_covers_the_mean():
    rng = np.random.default_rng(1)
    inside = 0
    for number in range(200):
        low, high = bootstrap_interval(rng.choice([0.0, 0.5, 1.0], size=60), seed=number)
        inside += low <= 0.5 <= high
    assert 180 <= inside <= 199
