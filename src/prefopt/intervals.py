"""Confidence intervals of the figures that prefopt reports."""

from __future__ import annotations

import math


def wilson_interval(successes: int, trials: int, *, z: float = 1.959964) -> tuple[float, float]:
    """Confidence interval of a share: (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n).

    Args:
        successes: 0 to `trials`.
        trials: at least 1.
        z: normal quantile; the default gives 95 %.

    Reference: E. B. Wilson, JASA 22 (1927).
    """
    assert 0 <= successes <= trials and trials > 0
    share, ratio = successes / trials, z * z / trials
    centre = (share + ratio / 2) / (1 + ratio)
    reach = z / (1 + ratio) * math.sqrt(share * (1 - share) / trials + ratio / (4 * trials))
    return max(0.0, centre - reach), min(1.0, centre + reach)
