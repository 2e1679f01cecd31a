"""Win rates of one policy's answers against another's under a ranker, with intervals; and lengths of answers.

Letters: N prompts; R candidates of a prompt, of which some are mine and some theirs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from prefopt.candidates.pairs import TIE_DECIMALS, score_differences, sigmoid
from prefopt.candidates.records import Record
from prefopt.evaluation.figures import Figure, resampled, share
from prefopt.intervals import bootstrap_interval, normal_quantile, wilson_interval

LENGTH_RESAMPLES = 200  # each is a regression
_RIDGE = 1.0  # one prompt's worth: lengths that separate wins from losses would have an infinite coefficient


@dataclass(frozen=True)
class WinRate:
    """One policy against another.

    Attributes:
        win_rate: mean over prompts of the share of comparisons won, a tie counting one half.
        low, high: ends of its interval.
        interval: "wilson" where each prompt is one comparison won or lost, else "bootstrap" (percentiles over
            resampled prompts).
        win_prob: mean probability, under the ranker, that mine beats theirs.
        wins, ties, losses: comparisons, over all prompts.
        prompts: N.
    """

    win_rate: float
    low: float
    high: float
    interval: str
    win_prob: float
    wins: int
    ties: int
    losses: int
    prompts: int


def win_rate(records: Sequence[Record], score: str, mine: str, theirs: str, *, confidence: float = 0.95) -> WinRate:
    """Compare the candidates of source `mine` with those of source `theirs` on every prompt that has both.

    Args:
        records: scored candidates.
        score: name of the scores; a table of pairwise logits where there is one.
        mine: `source` of the candidates of one side.
        theirs: `source` of those of the other.
        confidence: of the interval.

    Raises:
        ValueError: no prompt has candidates of both.
    """
    shares, probabilities, counts = [], [], np.zeros(3, dtype=int)
    for _, rows, columns, table in _met(records, score, mine, theirs):
        block = np.round(score_differences(table)[np.ix_(rows, columns)], TIE_DECIMALS)
        wins, ties = int((block > 0).sum()), int((block == 0).sum())
        counts += (wins, ties, block.size - wins - ties)
        shares.append((wins + 0.5 * ties) / block.size)
        probabilities.append(float(sigmoid(block).mean()))
    if not shares:
        raise ValueError(f"No prompt has answers of both {mine!r} and {theirs!r}.")
    low, high, kind = interval(shares, confidence=confidence)
    wins, ties, losses = map(int, counts)
    return WinRate(
        win_rate=float(np.mean(shares)),
        low=low,
        high=high,
        interval=kind,
        win_prob=float(np.mean(probabilities)),
        wins=wins,
        ties=ties,
        losses=losses,
        prompts=len(shares),
    )


def _met(
    records: Sequence[Record], score: str, mine: str, theirs: str
) -> Iterator[tuple[Record, list[int], list[int], Any]]:
    """Yield each record that both sides answered, the places of their candidates, and the scores or the table."""
    for record in records:
        rows = [place for place, c in enumerate(record["candidates"]) if c["source"] == mine]
        columns = [place for place, c in enumerate(record["candidates"]) if c["source"] == theirs]
        if rows and columns:
            table = record["tables"].get(score) or [candidate["scores"][score] for candidate in record["candidates"]]
            yield record, rows, columns, table


def length_controlled_win_rate(
    records: Sequence[Record], score: str, mine: str, theirs: str, *, confidence: float = 0.95
) -> Figure:
    """Compute the win rate that would be left if both sides' answers were equally long.

    Fits P(mine wins) = sigmoid(theta + phi tanh(d / sd(d))) over prompts, where d is the difference of the mean
    answers' characters, with the penalty phi^2 / 2; the figure is sigmoid(theta). Where every prompt is won, lost or
    tied alike, it is the plain win rate. The interval is a bootstrap over prompts.

    Args:
        records: scored candidates.
        score: name of the scores.
        mine: `source` of the candidates of one side.
        theirs: `source` of those of the other.
        confidence: of the interval.

    Raises:
        ValueError: no prompt has candidates of both.

    Reference: the idea of arXiv 2404.04475, without its terms for instructions' difficulty and for its own baseline.
    """
    shares, lengths = [], []
    for record, rows, columns, table in _met(records, score, mine, theirs):
        block = np.round(score_differences(table)[np.ix_(rows, columns)], TIE_DECIMALS)
        shares.append(float(((block > 0) + 0.5 * (block == 0)).mean()))
        sizes = [len(candidate["text"]) for candidate in record["candidates"]]
        lengths.append(float(np.mean([sizes[i] for i in rows]) - np.mean([sizes[i] for i in columns])))
    if not shares:
        raise ValueError(f"No prompt has answers of both {mine!r} and {theirs!r}.")
    y, d = np.array(shares), np.array(lengths)
    return resampled(
        lambda rows: without_length(y[rows], d[rows]), len(y), confidence=confidence, resamples=LENGTH_RESAMPLES
    )


def without_length(shares: np.ndarray, differences: np.ndarray) -> float:
    """Fit the regression of `length_controlled_win_rate`, (N,) shares won on (N,) differences.

    Returns:
        sigmoid(theta).
    """
    spread = float(np.std(differences, ddof=1)) if len(differences) > 1 else 0.0
    if np.ptp(shares) == 0 or spread == 0:
        return float(shares.mean())
    features = np.stack([np.ones_like(differences), np.tanh(differences / spread)], axis=1)
    theta, _ = fit_logistic(features, shares, ridge=np.array([0.0, _RIDGE]))
    return float(1 / (1 + math.exp(-theta)))


def fit_logistic(features: np.ndarray, outcomes: np.ndarray, *, ridge: float | np.ndarray) -> np.ndarray:
    """Fit a logistic regression by Newton's method.

    Args:
        features: (N, F), without an intercept unless it is a column.
        outcomes: (N,) in [0, 1]: shares won, or probabilities.
        ridge: weight of half the squared coefficients, one or (F,).

    Returns:
        (F,) coefficients.
    """
    penalty = np.broadcast_to(np.asarray(ridge, dtype=np.float64), features.shape[1:])
    weights = np.zeros(features.shape[1])
    for _ in range(100):
        p = sigmoid(features @ weights)
        gradient = features.T @ (outcomes - p) - penalty * weights
        curvature = (features * (p * (1 - p))[:, None]).T @ features + np.diag(penalty)
        step = np.linalg.solve(curvature, gradient)
        weights = weights + step * min(1.0, 4 / max(float(np.abs(step).max()), 1e-12))
        if np.abs(step).max() < 1e-10:
            break
    return weights


def order_consistency(
    records: Sequence[Record], score: str, mine: str, theirs: str, *, confidence: float = 0.95
) -> Figure | None:
    """Compute the share of comparisons with the same winner whichever answer was shown first.

    Returns:
        None where the ranker has no table, and so shows no order.
    """
    same = [
        np.sign(np.round(table[i][j], TIE_DECIMALS)) == -np.sign(np.round(table[j][i], TIE_DECIMALS))
        for record, rows, columns, table in _met(records, score, mine, theirs)
        if score in record["tables"]
        for i in rows
        for j in columns
    ]
    return share(same, confidence=confidence) if same else None


def interval(shares: Sequence[float], *, confidence: float = 0.95, seed: int = 0) -> tuple[float, float, str]:
    """Compute an interval for the mean of shares in [0, 1], one a prompt.

    Args:
        shares: (N,); where all are 0 or 1 the interval is Wilson's, else that of a bootstrap over prompts.
        confidence: of the interval.
        seed: of the bootstrap.

    Returns:
        Its ends, and "wilson" or "bootstrap".
    """
    values = np.asarray(shares, dtype=np.float64)
    if np.isin(values, (0.0, 1.0)).all():
        return *wilson_interval(int(values.sum()), len(values), z=normal_quantile(confidence)), "wilson"
    return *bootstrap_interval(values, confidence=confidence, seed=seed), "bootstrap"


def join_answers(answers: Mapping[str, Sequence[Record]]) -> tuple[list[Record], int]:
    """Join the answers of all policies to each prompt that every policy has answered, named after their policies.

    Args:
        answers: policy -> its records.

    Returns:
        The records in the order of the first policy's, and how many prompts some policy lacks.

    Raises:
        ValueError: no prompt was answered by all.
    """
    by_id = {name: {record["prompt_id"]: record for record in records} for name, records in answers.items()}
    everyone = set.intersection(*(set(found) for found in by_id.values()))
    seen = set.union(*(set(found) for found in by_id.values()))
    if not everyone:
        raise ValueError(f"No prompt was answered by all of {', '.join(answers)}: were they asked the same prompts?")
    first = next(iter(by_id.values()))
    joined = []
    for prompt_id, record in first.items():
        if prompt_id in everyone:
            candidates = [
                {**candidate, "source": name, "scores": {}}
                for name, found in by_id.items()
                for candidate in found[prompt_id]["candidates"]
            ]
            joined.append({**record, "candidates": candidates, "tables": {}})
    return joined, len(seen) - len(everyone)


def length_statistics(records: Sequence[Record], source: str) -> dict[str, float]:
    """Compute one policy's mean and median characters, mean tokens (where known), shares of empty and cut answers."""
    answers = [candidate for record in records for candidate in record["candidates"] if candidate["source"] == source]
    characters = np.array([len(answer["text"]) for answer in answers], dtype=np.float64)
    found: dict[str, float] = {
        "answers": float(len(answers)),
        "mean_characters": float(characters.mean()),
        "median_characters": float(np.median(characters)),
        "empty": float(np.mean([not answer["text"].strip() for answer in answers])),
        "cut_off": float(np.mean([answer["finish_reason"] == "length" for answer in answers])),
    }
    tokens: list[Any] = [answer["num_tokens"] for answer in answers]
    if None not in tokens:
        found["mean_tokens"] = float(np.mean(tokens))
    return found
