"""Do several references help? Paired differences over seeds, intervals, one word; and how much the references acted.

Pure functions on numbers. A *result* maps seed -> metric (more is better); runs of one seed share their rows, so that differences are taken
within seeds. S seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

HELPS, NO_EVIDENCE, HURTS = "helps", "no evidence", "hurts"
MANY_SEEDS = 30  # from here on the interval is a bootstrap's, which assumes no shape
RESAMPLES = 10_000
SAME = 1e-9  # differences closer than this are one: what rounding leaves of equal ones
INFLUENCE_METRICS = ("references/spread", "references/effective_number", "references/harmonic_dominance")
WEIGHT_METRIC = "references/weight/"
Result = Mapping[int, float]


@dataclass(frozen=True)
class Difference:
    """One result minus another, over the seeds that both have.

    Attributes:
        mean: of the differences, in the unit of the metric.
        low, high: ends of its interval; infinite where the seeds say nothing about the spread.
        interval: "t", "bootstrap", or "none" (one seed, or the same difference in every one: accuracies are multiples of one pair, so two
            or three seeds may well agree by chance, and an interval without width would call that evidence).
        seeds: S.
    """

    mean: float
    low: float
    high: float
    interval: str
    seeds: int

    @property
    def verdict(self) -> str:
        """ "helps" where the whole interval is above 0, "hurts" where it is below, else "no evidence"."""
        return HELPS if self.low > 0 else HURTS if self.high < 0 else NO_EVIDENCE

    def __str__(self) -> str:
        reach = "no interval" if self.interval == "none" else f"[{self.low:+.4f}, {self.high:+.4f}]"
        return f"{self.mean:+.4f} {reach}"


def paired_difference(mine: Result, theirs: Result, *, confidence: float = 0.95, seed: int = 0) -> Difference:
    """Mean of d_s = mine_s - theirs_s with an interval.

    S < 30: mean -+ t_{S-1} sd(d) / sqrt(S); S >= 30: percentiles of the mean under resampling of the seeds.

    Args:
        mine, theirs: seed -> metric.
        confidence: of the interval, between 0 and 1.
        seed: of the resampling.

    Raises:
        ValueError: no seed in common, or a metric that is not finite.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, not {confidence}.")
    common = sorted(set(mine) & set(theirs))
    if not common:
        raise ValueError(f"no seed in common: {sorted(mine)} and {sorted(theirs)}.")
    values = np.array([mine[s] - theirs[s] for s in common], dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError(f"a metric of the seeds {common} is not finite.")
    mean, count = float(values.mean()), len(values)
    if np.ptp(values) < SAME:
        return Difference(mean, -math.inf, math.inf, "none", count)
    if count >= MANY_SEEDS:
        drawn = np.random.default_rng(seed).integers(0, count, size=(RESAMPLES, count))
        low, high = np.quantile(values[drawn].mean(axis=1), (0.5 - confidence / 2, 0.5 + confidence / 2))
        return Difference(mean, float(low), float(high), "bootstrap", count)
    reach = student_quantile(0.5 + confidence / 2, count - 1) * float(values.std(ddof=1)) / math.sqrt(count)
    return Difference(mean, mean - reach, mean + reach, "t", count)


def student_quantile(probability: float, degrees: int) -> float:
    """The number that Student's t with so many degrees of freedom stays below with this probability (at least one half).

    Bisection on the distribution function, which is elementary for whole degrees.

    Reference: Abramowitz & Stegun 26.7.3 and 26.7.4.
    """
    assert 0.5 <= probability < 1 and degrees >= 1
    low, high = 0.0, 1.0
    while _student_below(high, degrees) < probability:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_below(middle, degrees) < probability else (low, middle)
    return (low + high) / 2


def _student_below(t: float, degrees: int) -> float:
    """P(T < t) for t >= 0: 1/2 + A/2, with A the probability of (-t, t)."""
    angle = math.atan(t / math.sqrt(degrees))
    term = total = math.cos(angle) if degrees % 2 else 1.0
    for k in range(3 if degrees % 2 else 2, degrees, 2):
        term *= (k - 1) / k * math.cos(angle) ** 2
        total += term
    if degrees == 1:
        inside = 2 * angle / math.pi
    elif degrees % 2:
        inside = 2 / math.pi * (angle + math.sin(angle) * total)
    else:
        inside = math.sin(angle) * total
    return 0.5 + inside / 2


def chosen_on_validation(
    validation: Mapping[str, Result], test: Mapping[str, Result]
) -> tuple[dict[int, float], dict[int, str]]:
    """For each seed the candidate with the best validation metric, and what it reaches on test.

    The choice is made within a seed, because other seeds' validation rows may be this seed's test rows. The first of equals wins.

    Args:
        validation: candidate -> seed -> metric.
        test: the same on test rows.

    Returns:
        Seed -> test metric of the chosen candidate, and seed -> its name; only seeds that all candidates have finished.

    Raises:
        ValueError: no candidate, or no seed that all of them have.
    """
    if not validation:
        raise ValueError("there is no run to choose from.")
    seeds = set.intersection(*(set(validation[name]) & set(test.get(name, {})) for name in validation))
    if not seeds:
        raise ValueError(f"no seed was finished by all of {', '.join(validation)}.")
    names = {s: max(validation, key=lambda name, s=s: validation[name][s]) for s in sorted(seeds)}
    return {s: test[name][s] for s, name in names.items()}, names


def sentence(against: str, difference: Difference, *, confidence: float = 0.95) -> str:
    """The verdict as one line: "multi-reference minus best single: +0.0120 [+0.0010, +0.0230] (95 % t over 5 seeds): helps"."""
    basis = f"{confidence:.0%} {difference.interval} over {difference.seeds} seeds"
    if difference.interval == "none":
        basis = "1 seed" if difference.seeds == 1 else f"the same in {difference.seeds} seeds"
    return f"multi-reference minus {against}: {difference} ({basis}): {difference.verdict}"


@dataclass(frozen=True)
class Influence:
    """How much the references acted in a run, means over its logged steps.

    Attributes:
        spread: standard deviation over references of beta times the margin, nats; near 0 nobody can tell which reference was used.
        effective_number: exp of the weights' entropy, 1 to K.
        harmonic_dominance: share of completions of which one reference makes up more than 99 % of the harmonic mean.
        weights: reference -> mean weight.
    """

    spread: float
    effective_number: float
    harmonic_dominance: float
    weights: Mapping[str, float]


def influence(log: Sequence[Mapping[str, float]]) -> Influence | None:
    """The influence of the references from a trainer's log entries; None where none was logged."""
    entries = [entry for entry in log if INFLUENCE_METRICS[0] in entry]
    if not entries:
        return None
    names = [key for key in entries[0] if key.startswith(WEIGHT_METRIC)]
    means = {key: float(np.mean([entry[key] for entry in entries])) for key in (*INFLUENCE_METRICS, *names)}
    return Influence(
        *(means[key] for key in INFLUENCE_METRICS), {name.removeprefix(WEIGHT_METRIC): means[name] for name in names}
    )
