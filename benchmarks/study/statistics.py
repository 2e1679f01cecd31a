"""The study's statistics: paired differences over seeds, scores at the same KL, and the word for each claim.

Letters: S seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from prefopt.evaluation.study import Difference, paired_difference

SEEN, NOT_SEEN, OPPOSITE, UNTESTED = "seen at this scale", "not seen", "the opposite is seen", "not run yet"
UNDERPOWERED = "not seen (under-powered)"
BySeed = Mapping[int, float]


@dataclass(frozen=True)
class Claim:
    """A claim, written down before the runs, and what the seeds say about it.

    Attributes:
        text: the claim.
        effect: what is measured, as in "WPO - DPO at 100 %".
        difference: over the seeds; None where fewer than two have been run.
        smallest: the smallest effect that would matter. Where the interval holds 0 and effects beyond it, the seeds
            are too few to say.
        same: the claim is that there is no difference larger than `smallest`, not that there is one above 0.
        planned: how many seeds were planned.
        sign: +1 if the claim is that the difference lies above 0, -1 if below.
    """

    text: str
    effect: str
    difference: Difference | None
    smallest: float
    planned: int
    same: bool = False
    sign: int = 1

    @property
    def verdict(self) -> str:
        """The word of the summary table."""
        if self.difference is None:
            return UNTESTED
        if self.difference.interval == "none":  # the very same difference in every seed
            agrees = abs(self.difference.mean) <= self.smallest
            if self.same:
                return SEEN if agrees else OPPOSITE
            return NOT_SEEN if agrees else UNDERPOWERED
        low, high = sorted((self.sign * self.difference.low, self.sign * self.difference.high))
        if self.same:
            if -self.smallest <= low and high <= self.smallest:
                return SEEN
            return OPPOSITE if low > 0 or high < 0 else UNDERPOWERED
        if low > 0:
            return SEEN
        if high < 0:
            return OPPOSITE
        return UNDERPOWERED if high > self.smallest else NOT_SEEN


def difference(mine: BySeed, theirs: BySeed) -> Difference | None:
    """Compute the paired difference over the seeds that both have; None where these are fewer than two."""
    return paired_difference(mine, theirs) if len(set(mine) & set(theirs)) > 1 else None


def contrast(mine: BySeed, theirs: BySeed) -> dict[int, float]:
    """Compute the difference of each seed that both have."""
    return {seed: mine[seed] - theirs[seed] for seed in sorted(set(mine) & set(theirs))}


def score_at(points: Sequence[tuple[float, float]], kl: float) -> float | None:
    """Interpolate a score linearly in KL between the runs of one seed; None where `kl` is outside of their range.

    Args:
        points: (KL, score) of each run.
        kl: where the score is wanted.
    """
    ordered = sorted(points)
    if len(ordered) < 2 or not ordered[0][0] <= kl <= ordered[-1][0]:
        return None
    return float(np.interp(kl, [point[0] for point in ordered], [point[1] for point in ordered]))


def shared_kl(ranges: Sequence[tuple[float, float]]) -> float:
    """Choose the KL at which methods are compared: the middle of the range that all of them reach.

    Args:
        ranges: the smallest and largest KL of each method.

    Raises:
        ValueError: there is no such range.
    """
    low, high = max(pair[0] for pair in ranges), min(pair[1] for pair in ranges)
    if low > high:
        raise ValueError(f"no KL is reached by all methods: {ranges}; widen their betas.")
    return (low + high) / 2


def bracket(points: Mapping[float, float], kl: float) -> tuple[float, float]:
    """Choose the two betas whose KLs lie next to `kl` on either side (beta -> KL)."""
    below = [beta for beta, found in points.items() if found <= kl]
    above = [beta for beta, found in points.items() if found > kl]
    if not below or not above:
        raise ValueError(f"{kl} is not between the KLs {dict(points)}.")
    pair = max(below, key=lambda beta: points[beta]), min(above, key=lambda beta: points[beta])
    return min(pair), max(pair)


def reach(found: Difference) -> list[list[float]]:
    """Return the lengths of an error bar below and above the mean; none where every seed agrees."""
    if found.interval == "none":
        return [[0.0], [0.0]]
    return [[found.mean - found.low], [found.high - found.mean]]
