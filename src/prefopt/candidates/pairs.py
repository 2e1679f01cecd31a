"""Choose preference pairs from the scores of one prompt's candidates: pure functions, no files and no models."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[np.float64]
Probabilities = Literal["pairwise", "aggregate"]
TIE_DECIMALS = 12


@dataclass(frozen=True)
class Pair:
    """Two candidates of one prompt, by index, with what the losses need to know about them.

    Args:
        chosen, rejected: indices into the candidates.
        chosen_win_prob, rejected_win_prob: mean probability with which each beats the prompt's candidates.
        chosen_over_rejected_prob: probability with which chosen beats rejected.
        chosen_score, rejected_score: the score that the policy ranks by (`gpo`: the mean of score differences).
        gap: how far chosen lies above rejected in the quantity that the policy ranks by; always positive.
    """

    chosen: int
    rejected: int
    chosen_win_prob: float
    rejected_win_prob: float
    chosen_over_rejected_prob: float
    chosen_score: float | None = None
    rejected_score: float | None = None
    gap: float | None = None


def _as_array(scores: Any) -> Array:
    return np.asarray(scores.detach().cpu().double() if isinstance(scores, torch.Tensor) else scores, dtype=np.float64)


def score_differences(scores: Any) -> Array:
    """Return the antisymmetric (R, R) matrix of score differences that every quantity here is computed from.

    Formula: D_ij = s_i - s_j for scores s of shape (R,); D_ij = (c_ij - c_ji) / 2 for a table of logits c of shape
    (R, R), where c_ij is the logit that candidate i, shown first, beats candidate j. Averaging the two orders cancels
    a ranker's preference for the first place and leaves a table that is antisymmetric already (c_ij = -c_ji) as it is.

    Args:
        scores: (R,) or (R, R), in nats; list, numpy array or tensor. The diagonal of a table is not read.

    Returns:
        (R, R), float64, antisymmetric.

    Raises:
        ValueError: the shape is neither (R,) nor (R, R), R < 2, or a value is not finite.
    """
    values = _as_array(scores)
    if values.ndim not in (1, 2) or (values.ndim == 2 and values.shape[0] != values.shape[1]):
        raise ValueError(f"scores must have shape (R,) or (R, R), got {values.shape}.")
    if len(values) < 2:
        raise ValueError(f"At least two candidates are needed to compare, got {len(values)}.")
    if values.ndim == 2:
        values = values.copy()
        np.fill_diagonal(values, 0.0)
    if not np.isfinite(values).all():
        where = tuple(int(index) for index in np.argwhere(~np.isfinite(values))[0])
        raise ValueError(f"The score at index {where} is {values[where]}; scores must be finite.")
    if values.ndim == 1:
        return np.subtract.outer(values, values)
    return (values - values.T) / 2


def sigmoid(logits: Array) -> Array:
    """Compute the logistic function without overflow: exp is only taken of non-positive numbers."""
    small = np.exp(-np.abs(logits))
    return np.where(logits >= 0, 1.0, small) / (1.0 + small)


def aggregate_scores(table: Any) -> Array:
    """Reduce a table of logits to one score per candidate, as LLM-Blender does.

    Formula: s_i = (1/R) sum_j (c_ij - c_ji). Where c_ij = r_i - r_j, s_i - s_j = 2 (r_i - r_j): the logits double.

    Args:
        table: (R, R) logits.

    Returns:
        (R,), float64, of sum zero.

    Reference: arXiv 2306.02561 (PairRanker, "MaxLogits").
    """
    return 2 * score_differences(table).mean(axis=1)


def win_probabilities(scores: Any, *, temperature: float = 1.0) -> Any:
    """Compute the probability with which each candidate beats each other one.

    Formula: P_ij = sigmoid(D_ij / temperature), D as in `score_differences`: sigmoid(s_i - s_j) from scores,
    sigmoid((c_ij - c_ji) / 2) from a table of logits. P_ij + P_ji = 1 and P_ii = 0.5.

    Args:
        scores: (R,) scores or (R, R) logits of one prompt.
        temperature: divides the logits; above 1 the probabilities move towards one half.

    Returns:
        (R, R): a float64 array, or, where `scores` is a tensor, a tensor of its dtype.

    Raises:
        ValueError: wrong shape, fewer than two candidates, a value that is not finite, or a temperature not above 0.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}.")
    probabilities = sigmoid(score_differences(scores) / temperature)
    if isinstance(scores, torch.Tensor):
        return torch.as_tensor(probabilities, dtype=scores.dtype if scores.is_floating_point() else None)
    return probabilities


def row_means(table: Array, *, include_self: bool) -> Array:
    """Average each row of an (R, R) table, with its diagonal (divisor R) or without (divisor R - 1)."""
    if include_self:
        return table.mean(axis=1)
    return (table.sum(axis=1) - np.diagonal(table)) / (len(table) - 1)


_Picked: TypeAlias = list[tuple[int, int]]


@dataclass(frozen=True)
class _Choice:
    """What a policy picks from: `standing` (R,) ranks; `allowed` lists the candidates that may be picked, in order."""

    standing: Array
    allowed: list[int]
    texts: Sequence[str]
    rng: random.Random
    min_gap: float


def _is_gap(gap: float, min_gap: float) -> bool:
    return gap > 0 and gap >= min_gap


def _first_best(standing: Array, allowed: list[int]) -> int:
    return max(allowed, key=lambda index: (standing[index], -index))


def _extremes(choice: _Choice) -> _Picked:
    return [(_first_best(choice.standing, choice.allowed), _first_best(-choice.standing, choice.allowed))]


def _best_random(choice: _Choice) -> _Picked:
    standing = choice.standing
    chosen = _first_best(standing, choice.allowed)
    worse = [index for index in choice.allowed if _is_gap(standing[chosen] - standing[index], choice.min_gap)]
    return [(chosen, choice.rng.choice(worse))] if worse else [(chosen, chosen)]


def _shortest_then_closest(choice: _Choice) -> _Picked:
    standing, allowed, texts = choice.standing, choice.allowed, choice.texts
    best = [index for index in allowed if standing[index] == standing[allowed].max()]
    chosen = min(best, key=lambda index: (len(texts[index]), index))
    worst = [index for index in allowed if standing[index] == standing[allowed].min()]
    rejected = min(worst, key=lambda index: (abs(len(texts[index]) - len(texts[chosen])), index))
    return [(chosen, rejected)]


def _all_pairs(choice: _Choice) -> _Picked:
    return [(i, j) for i in choice.allowed for j in choice.allowed if choice.standing[i] > choice.standing[j]]


@dataclass(frozen=True)
class Policy:
    """How one policy picks, by which quantity it ranks, and which numbers of the pair its losses read (`columns`)."""

    pick: Callable[[_Choice], _Picked]
    ranks_by: Literal["score", "win_prob"]
    columns: tuple[str, ...]


_SCORES = ("chosen_score", "rejected_score")
_WIN_PROBS = ("chosen_win_prob", "rejected_win_prob", "chosen_over_rejected_prob")
POLICIES: dict[str, Policy] = {
    "best_worst": Policy(_extremes, "win_prob", _SCORES),
    "best_random": Policy(_best_random, "score", _SCORES),
    "wpo_v2": Policy(_shortest_then_closest, "score", _SCORES),
    "all_pairs": Policy(_all_pairs, "score", _SCORES),
    "max_min": Policy(_extremes, "score", _SCORES),
    "sppo": Policy(_extremes, "win_prob", _WIN_PROBS),
    "sppo_paper": Policy(_extremes, "score", _WIN_PROBS),
    "sppo_mean_logit": Policy(_extremes, "score", _WIN_PROBS),
    "gpo": Policy(_extremes, "score", _SCORES),
}


def check_policy(policy: str, probabilities: str, temperature: float, include_self: bool) -> None:
    """Check the settings of `select_pairs`.

    Raises:
        ValueError: one is unknown, out of range, or would be ignored by the policy.
    """
    if policy not in POLICIES:
        raise ValueError(f"Unknown pair policy {policy!r}; known: {', '.join(POLICIES)}.")
    if probabilities not in ("pairwise", "aggregate"):
        raise ValueError(f"probabilities must be 'pairwise' or 'aggregate', got {probabilities!r}.")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}.")
    if policy == "sppo_paper" and (probabilities, temperature, include_self) != ("pairwise", 1.0, True):
        raise ValueError(
            "sppo_paper fixes probabilities, temperature and the self term; use policy 'sppo' to set them."
        )


def select_pairs(
    texts: Sequence[str],
    scores: Any,
    *,
    policy: str = "best_worst",
    seed: int | str = 0,
    probabilities: Probabilities = "pairwise",
    temperature: float = 1.0,
    include_self: bool = True,
    min_gap: float = 0.0,
    eligible: Sequence[bool] | None = None,
) -> list[Pair]:
    """Pick the preference pairs of one prompt; none where the candidates tie.

    A pair is kept where its gap is positive and at least `min_gap`. Ties go to the first candidate unless the policy
    says otherwise:

    - `best_worst`: highest and lowest (for a table: of mean win probability); `max_min`: of score (for a table: of
      mean logit).
    - `best_random`: highest score, and a random one of those below it by the required gap (WPO, first version).
    - `wpo_v2`: highest score, among several the shortest; lowest score, among several the one whose length (in
      characters) differs least from the chosen's.
    - `all_pairs`: every pair of different scores.
    - `sppo`: highest and lowest mean win probability; `sppo_mean_logit`: the same probabilities, but highest and
      lowest score (for a table: of mean logit), as in GPM's fork of SPPO; `sppo_paper`: the published variant, which
      ranks by s = `aggregate_scores` of a table (or by given scores) and takes P_ij = sigmoid(s_i - s_j), the self
      term among the R terms of the mean.
    - `gpo`: highest and lowest mean of score differences D_ij / temperature, which become chosen_score and
      rejected_score.

    Args:
        texts: R candidates.
        scores: (R,) scores or an (R, R) table of logits c_ij that candidate i, shown first, beats j.
        policy: one of the above.
        seed: for `best_random`; use another one for each prompt.
        probabilities: win probabilities from the "pairwise" table, or from its row means ("aggregate"); the same for
            (R,) scores.
        temperature: divides the logits of the probabilities (and of `gpo`'s differences).
        include_self: whether a candidate's own P_ii = 0.5 (or D_ii = 0) is one of the R terms of its mean.
        min_gap: in the unit of the quantity ranked by.
        eligible: which candidates may be picked (default all). The others still count in the means: they are samples
            too.

    Returns:
        Pairs, at most one except for `all_pairs`.

    Raises:
        ValueError: unknown policy, lengths that differ, fewer than two candidates, or a score that is not finite.

    Reference: WPO arXiv 2406.11827; SPPO arXiv 2405.00675 and its released code (`sppo_paper`); GPO arXiv 2410.02197.
    """
    check_policy(policy, probabilities, temperature, include_self)
    differences = score_differences(scores)
    if not len(texts) == len(differences) == len(eligible if eligible is not None else texts):
        raise ValueError(
            f"{len(texts)} texts, scores of shape {np.shape(scores)} and `eligible` must agree in length."
        )
    is_table = np.ndim(scores) == 2
    # sums in another order differ in the last digits: without rounding, candidates that tie in a table would not
    means = np.round(differences.mean(axis=1), TIE_DECIMALS)
    raw = _as_array(scores) if not is_table else 2 * means if policy == "sppo_paper" else means
    logits = differences if probabilities == "pairwise" and policy != "sppo_paper" else np.subtract.outer(raw, raw)
    table = sigmoid(logits / temperature)
    win_prob = row_means(table, include_self=include_self)
    reported = row_means(differences / temperature, include_self=include_self) if policy == "gpo" else raw
    # for (R,) scores the mean win probability is an increasing function of the score, but rounds large scores to ties
    by_prob = POLICIES[policy].ranks_by == "win_prob" and probabilities == "pairwise" and is_table
    standing = np.round(win_prob, TIE_DECIMALS) if by_prob else raw
    allowed = [index for index in range(len(texts)) if eligible is None or eligible[index]]
    choice = _Choice(standing, allowed, texts, random.Random(seed), min_gap)
    picked = POLICIES[policy].pick(choice) if allowed else []
    return [
        Pair(
            chosen=chosen,
            rejected=rejected,
            chosen_win_prob=float(win_prob[chosen]),
            rejected_win_prob=float(win_prob[rejected]),
            chosen_over_rejected_prob=float(table[chosen, rejected]),
            chosen_score=float(reported[chosen]),
            rejected_score=float(reported[rejected]),
            gap=float(standing[chosen] - standing[rejected]),
        )
        for chosen, rejected in picked
        if _is_gap(standing[chosen] - standing[rejected], min_gap)
    ]
