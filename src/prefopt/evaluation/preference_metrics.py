"""Metrics of a reward or preference model on comparison rows: accuracy, calibration, length bias, transitivity.

Letters: R responses of a row, M ranked pairs over all rows, K bins.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from prefopt.candidates.pairs import sigmoid
from prefopt.evaluation.calibration import CalibrationErrors, calibration_errors, score_length_correlation


@dataclass(frozen=True)
class RowPrediction:
    """A model's predictions for one row.

    Attributes:
        row_id: of the row.
        ranks: (R,) labels, higher is better; only their order matters.
        lengths: (R,) tokens of the responses.
        logits: (R, R) antisymmetric; sigmoid(logits[i, j]) is the model's probability that i beats j.
        rewards: (R,) where the model has one score per response, else None.
        vectors: of the responses, for comparisons across rows; their form is the trainer's.
    """

    row_id: str
    ranks: np.ndarray
    lengths: np.ndarray
    logits: np.ndarray
    rewards: np.ndarray | None = None
    vectors: Any = None


def ranked_logits(row: RowPrediction) -> np.ndarray:
    """Return the logits of the better response over the worse one, for every ranked pair of the row."""
    better, worse = np.nonzero(row.ranks[:, None] > row.ranks[None, :])
    return row.logits[better, worse]


def preference_metrics(
    rows: Sequence[RowPrediction], *, calibration_bins: Sequence[int] = (10,)
) -> tuple[dict[str, float], dict[int, CalibrationErrors]]:
    """Compute the metrics over all ranked pairs of all rows.

    `accuracy` is the share of ranked pairs with a logit above 0 (an equal score is wrong; 0 where nothing is ranked).
    `mean_reward` is over all responses that are there; `score_length_correlation` is Pearson's over the same.
    `ece_bin<K>`, `ace_bin<K>` and `mce_bin<K>` take each ranked pair from both sides: probability sigmoid(l) with
    outcome 1, and sigmoid(-l) with outcome 0.

    Args:
        rows: predictions.
        calibration_bins: numbers of bins K to compute calibration errors for.

    Returns:
        The metrics (those that are not numbers left out), and the calibration errors with their bins by K.

    Reference: arXiv 2311.08045 and its released code (there, padding responses enter the mean).
    """
    logits = np.concatenate([ranked_logits(row) for row in rows]) if rows else np.empty(0)
    metrics = {"accuracy": float((logits > 0).mean()) if logits.size else 0.0, "ranked_pairs": float(logits.size)}
    scored = [row for row in rows if row.rewards is not None]
    if scored:
        rewards = np.concatenate([row.rewards for row in scored])
        metrics["mean_reward"] = float(rewards.mean())
        metrics["score_length_correlation"] = score_length_correlation(
            rewards, np.concatenate([row.lengths for row in scored])
        )
    errors = {}
    if logits.size:
        probabilities = sigmoid(np.concatenate([logits, -logits]).astype(np.float64))
        outcomes = np.repeat([1.0, 0.0], logits.size)
        for bins in calibration_bins:
            errors[bins] = calibration_errors(probabilities, outcomes, num_bins=bins)
            metrics |= {f"{name}_bin{bins}": getattr(errors[bins], name) for name in ("ece", "ace", "mce")}
    return {name: value for name, value in metrics.items() if math.isfinite(value)}, errors


def transitivity(tables: Iterable[np.ndarray]) -> dict[str, float]:
    """Measure how far tables of preferences are from a ranking.

    - `cyclic_triads`: share of all triples of responses of which each beats one of the others (a > b > c > a).
    - `condorcet_winners`: share of tables in which one response beats every other.
    - `intransitive_share`: the part of the logits that no score per response can express,
      sum_ij (T_ij - (t_i - t_j))^2 / sum_ij T_ij^2 with t_i the mean of row i (the best scores in the least squares
      sense);
      0 for every Bradley-Terry model, 1 for a pure cycle.

    Args:
        tables: (R, R) antisymmetric logits, R >= 3 (smaller ones hold no triple and are left out).

    Returns:
        The three numbers and `tables`, how many tables counted; empty where none did.
    """
    triads = cyclic = winners = count = 0
    residual = total = 0.0
    for table in tables:
        if len(table) < 3:
            continue
        count += 1
        beats = table > 0
        for a, b, c in itertools.combinations(range(len(table)), 3):
            triads += 1
            cyclic += bool(
                (beats[a, b] and beats[b, c] and beats[c, a]) or (beats[b, a] and beats[c, b] and beats[a, c])
            )
        winners += bool((beats.sum(1) == len(table) - 1).any())
        fit = table.mean(1)
        residual += float(((table - (fit[:, None] - fit[None, :])) ** 2).sum())
        total += float((table**2).sum())
    if not count:
        return {}
    return {
        "cyclic_triads": cyclic / triads,
        "condorcet_winners": winners / count,
        "intransitive_share": residual / total if total else 0.0,
        "tables": float(count),
    }
