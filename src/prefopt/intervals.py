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
    """Compute the value that Student's t with n degrees of freedom stays below with this probability (at least 1/2).

    Newton's method on the distribution function, which is elementary for whole n. It is concave above 0, so iterates
    that start below the quantile, at the normal one, rise to it and never pass it.

    Reference: Abramowitz & Stegun 26.7.3 and 26.7.4.
    """
    assert 0.5 <= probability < 1 and degrees >= 1
    log_scale = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2) - math.log(degrees * math.pi) / 2
    t, step = NormalDist().inv_cdf(probability), 1.0
    while step > 1e-15 * t:  # ends where rounding stops the rise
        density = math.exp(log_scale - (degrees + 1) / 2 * math.log1p(t * t / degrees))
        step = (probability - _student_below(t, degrees)) / density
        t += step
    return t


def _student_below(t: float, degrees: int) -> float:
    """Compute P(T < t) for t >= 0: 1/2 + A/2, with A the probability of (-t, t)."""
    angle = math.atan(t / math.sqrt(degrees))
    first = 3 if degrees % 2 else 2
    term = total = math.cos(angle) if degrees % 2 else 1.0
    for k in range(first, degrees, 2):
        term *= (k - 1) / k * math.cos(angle) ** 2
        total += term
    if degrees == 1:
        inside = 2 * angle / math.pi
    elif degrees % 2:
        inside = 2 / math.pi * (angle + math.sin(angle) * total)
    else:
        inside = math.sin(angle) * total
    return 0.5 + inside / 2
