"""Confidence intervals and quantiles of the figures that prefopt reports.

Letters: N values, n degrees of freedom.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np


def normal_quantile(confidence: float) -> float:
    """Return z such that a standard normal lies in (-z, z) with probability `confidence`."""
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def wilson_interval(successes: int, trials: int, *, z: float = 1.959964) -> tuple[float, float]:
    """Compute the confidence interval of a share: (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n).

    Args:
        successes: 0 to `trials`.
        trials: number of trials; without any, the interval is (0, 1).
        z: normal quantile; the default gives 95 %, `normal_quantile` any other.

    Reference: E. B. Wilson, JASA 22 (1927).
    """
    assert 0 <= successes <= trials
    if not trials:
        return 0.0, 1.0
    share, ratio = successes / trials, z * z / trials
    centre = (share + ratio / 2) / (1 + ratio)
    reach = z / (1 + ratio) * math.sqrt(share * (1 - share) / trials + ratio / (4 * trials))
    return max(0.0, centre - reach), min(1.0, centre + reach)


def t_interval(values: Sequence[float] | np.ndarray, *, confidence: float = 0.95) -> tuple[float, float]:
    """Compute the confidence interval of a mean: mean -+ t_{N-1} sd / sqrt(N).

    Args:
        values: (N,), N >= 2, independent and roughly normal.
        confidence: between 0 and 1.
    """
    array = np.asarray(values, dtype=np.float64)
    mean, count = float(array.mean()), len(array)
    reach = student_quantile(0.5 + confidence / 2, count - 1) * float(array.std(ddof=1)) / math.sqrt(count)
    return mean - reach, mean + reach


def bootstrap_interval(
    values: Sequence[float] | np.ndarray, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Compute the percentiles of the mean under resampling of `values`, (N,), which assumes no shape."""
    array = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(seed).integers(0, len(array), size=(resamples, len(array)))
    low, high = np.quantile(array[drawn].mean(axis=1), (0.5 - confidence / 2, 0.5 + confidence / 2))
    return float(low), float(high)


def student_quantile(probability: float, degrees: int) -> float:
    """Return the value that Student's t with n degrees of freedom stays below with this probability."""
    from scipy.special import stdtrit  # here, as its import takes as long as that of some whole commands

    return float(stdtrit(degrees, probability))
