"""Losses of reward and preference models, and the ranking loss of RRHF.

Letters: B prompts or pairs, R responses to a prompt, d width of a preference embedding.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from prefopt.losses._checks import check_choice, check_not_negative, check_positive, check_shapes, in_float, per_pair

_KINDS = ("logistic", "difference")


def ranked_pairs(scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return which responses of a prompt rank above which: [b, i, j] is True where i has the higher score.

    Args:
        scores: (B, R), higher is better; ties rank neither way.
        mask: (B, R), True for a real response; None where all are real.

    Returns:
        (B, R, R) bool; its sum is the |V| that `ranking_loss` divides by.

    Raises:
        ValueError: shapes that differ or are not (B, R).
    """
    given = {"scores": scores} if mask is None else {"scores": scores, "mask": mask}
    check_shapes(dict.fromkeys(given, "B,R"), given)
    better = scores.unsqueeze(2) > scores.unsqueeze(1)
    if mask is None:
        return better
    real = mask.bool()
    return better & real.unsqueeze(2) & real.unsqueeze(1)


def ranking_loss(
    rewards: Tensor,
    scores: Tensor,
    *,
    mask: Tensor | None = None,
    coefficients: Tensor | None = None,
    kind: str = "logistic",
) -> Tensor:
    """Order the rewards of a prompt's responses as their scores are ordered.

        logistic:    -(1 / |V|) sum over (b, i, j) in V of c_b log sigmoid(reward_bi - reward_bj)
        difference:  -(1 / |V|) sum over (b, i, j) in V of c_b (reward_bi - reward_bj), unbounded below

    V holds the pairs with score_bi > score_bj, both real. |V| counts the whole batch, and coefficients do not enter
    it.

    Args:
        rewards: (B, R) outputs of the reward model.
        scores: (B, R) labels; only their order within a row matters, and ties contribute nothing.
        mask: (B, R), True for a real response; None where all are real. Never guessed from the scores.
        coefficients: (B,) factors c_b, without gradient; None for 1.
        kind: "logistic" or "difference".

    Returns:
        A scalar; 0 (with zero gradient) where V is empty.

    Raises:
        ValueError: shapes that do not agree; an unknown kind.

    Reference: arXiv 2203.02155 (all pairs of a prompt), arXiv 2311.08045 and its code (|V| over the batch; difference
        is its WGAN-like variant). The code counts each pair in both directions, which leaves the mean unchanged.
    """
    given = {"rewards": rewards, "scores": scores, "mask": mask, "coefficients": coefficients}
    letters = {"rewards": "B,R", "scores": "B,R", "mask": "B,R", "coefficients": "B"}
    check_shapes(letters, {name: tensor for name, tensor in given.items() if tensor is not None})
    check_choice("kind", kind, _KINDS)
    better = ranked_pairs(scores, mask)
    difference = _differences(rewards, mask)
    losses = -F.logsigmoid(difference) if kind == "logistic" else -difference
    losses = losses.masked_fill(~better, 0.0).sum(dim=(1, 2))
    if coefficients is not None:
        losses = losses * coefficients.detach().to(losses.dtype)
    return losses.sum() / better.sum().clamp(min=1)


def adversarial_reward_loss(
    rewards: Tensor,
    scores: Tensor,
    is_adversarial: Tensor,
    *,
    adversarial_coeff: float,
    num_samples: int,
    human_coeff: float = 1.0,
    mask: Tensor | None = None,
    kind: str = "logistic",
) -> Tensor:
    """Compute the adversarial reward model loss: human pairs, and golden against sampled answers.

        human_coeff * ranking_loss(c = 1 - a) + adversarial_coeff / num_samples * ranking_loss(c = a)

    a_b is 1 for an adversarial row. Both terms divide by the same number of ranked pairs of the whole batch.

    Args:
        rewards: (B, R) outputs of the reward model.
        scores: (B, R) labels; in an adversarial row the golden answer has the higher one.
        is_adversarial: (B,) a_b, True or nonzero for an adversarial row.
        adversarial_coeff: weight of the adversarial term, at least 0 (0.1 in the authors' recipe).
        num_samples: sampled answers per golden one, at least 1 (4 in the authors' recipe).
        human_coeff: weight of the human pairs, at least 0.
        mask: (B, R), True for a real response; None where all are real.
        kind: "logistic" or "difference", of the adversarial term only.

    Returns:
        A scalar; 0 (with zero gradient) where nothing is ranked.

    Raises:
        ValueError: shapes that do not agree; a coefficient out of range; an unknown kind.

    Reference: arXiv 2311.08045, as computed by its code.
    """
    given = {"rewards": rewards, "scores": scores, "is_adversarial": is_adversarial}
    check_shapes({"rewards": "B,R", "scores": "B,R", "is_adversarial": "B"}, given)
    check_not_negative(adversarial_coeff=adversarial_coeff, human_coeff=human_coeff)
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}.")
    adversarial = is_adversarial.bool()
    human = ranking_loss(rewards, scores, mask=mask, coefficients=~adversarial)
    against = ranking_loss(rewards, scores, mask=mask, coefficients=adversarial, kind=kind)
    return human_coeff * human + adversarial_coeff / num_samples * against


def bradley_terry_loss(
    chosen_rewards: Tensor, rejected_rewards: Tensor, *, tau: float = 1.0, margin: Tensor | None = None
) -> Tensor:
    """Compute the negative Bradley-Terry log-likelihood of the preference, with temperature and margin.

        -log sigmoid((chosen - rejected - margin) / tau)

    Args:
        chosen_rewards: (B,) rewards.
        rejected_rewards: (B,) rewards.
        tau: temperature, above 0.
        margin: (B,) by how much the chosen reward should exceed the rejected one; None for 0.

    Returns:
        (B,) losses.

    Raises:
        ValueError: shapes that differ or are not (B,); tau not above 0.

    Reference: arXiv 2203.02155; the margin as in Llama 2, arXiv 2307.09288.
    """
    given = {"chosen_rewards": chosen_rewards, "rejected_rewards": rejected_rewards}
    if margin is not None:
        given["margin"] = margin
    chosen, rejected, *_ = per_pair(**given)
    return general_preference_loss(chosen - rejected, tau=tau, margin=margin)


def general_preference_score(
    chosen_embeddings: Tensor, rejected_embeddings: Tensor, scales: Tensor | None = None
) -> Tensor:
    """Score one response over another from their preference embeddings; antisymmetric, may be cyclic.

        sum_k scale_k (c_2k r_2k+1 - c_2k+1 r_2k)

    Args:
        chosen_embeddings: (B, d) c, d even.
        rejected_embeddings: (B, d) r.
        scales: (B, d/2) weights of the planes, from the prompt; None for 1.

    Returns:
        (B,) scores; above 0 where chosen is preferred.

    Raises:
        ValueError: shapes that do not agree; an odd d.

    Reference: arXiv 2410.02197 and its code.
    """
    pair = {"chosen_embeddings": chosen_embeddings, "rejected_embeddings": rejected_embeddings}
    given = pair if scales is None else {**pair, "scales": scales}
    check_shapes({**dict.fromkeys(pair, "B,d"), "scales": "B,d/2"}, given)
    width = chosen_embeddings.shape[1]
    if width % 2 or (scales is not None and scales.shape[1] * 2 != width):
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in given.items())
        raise ValueError(f"Embeddings must be (B, d) with even d, and scales (B, d/2); got {shapes}.")
    chosen, rejected, *planes = in_float(*given.values())
    turns = chosen[:, 0::2] * rejected[:, 1::2] - chosen[:, 1::2] * rejected[:, 0::2]
    return (turns * planes[0] if planes else turns).sum(dim=1)


def general_preference_loss(preference_scores: Tensor, *, tau: float, margin: Tensor | None = None) -> Tensor:
    """Compute the negative log-likelihood of the preference under a general preference model.

        -log sigmoid((score - margin) / tau)

    Args:
        preference_scores: (B,) scores of chosen over rejected, from `general_preference_score`.
        tau: temperature, above 0 (0.1 in the authors' runs).
        margin: (B,) by how much the score should exceed 0; None for 0.

    Returns:
        (B,) losses.

    Raises:
        ValueError: shapes that differ or are not (B,); tau not above 0.

    Reference: arXiv 2410.02197 and its code.
    """
    given = {"preference_scores": preference_scores}
    scores, *margins = per_pair(**given) if margin is None else per_pair(**given, margin=margin)
    check_positive(tau=tau)
    return -F.logsigmoid((scores - margins[0] if margins else scores) / tau)


def rrhf_loss(mean_logps: Tensor, scores: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Compute the RRHF loss: a hinge on every pair of responses that the policy orders against the scores.

        sum over score_i < score_j of max(0, p_i - p_j)

    The likelihood term on the best response is the trainer's.

    Args:
        mean_logps: (B, R) p, log-probability per completion token of the policy, nats.
        scores: (B, R) labels; only their order within a row matters, and ties contribute nothing.
        mask: (B, R), True for a real response; None where all are real.

    Returns:
        (B,) losses.

    Raises:
        ValueError: shapes that differ or are not (B, R).

    Reference: arXiv 2304.05302.
    """
    given = {"mean_logps": mean_logps, "scores": scores, "mask": mask}
    check_shapes(dict.fromkeys(given, "B,R"), {name: tensor for name, tensor in given.items() if tensor is not None})
    hinges = F.relu(-_differences(mean_logps, mask))  # [b, i, j]: by how much the policy prefers j to i
    return hinges.masked_fill(~ranked_pairs(scores, mask), 0.0).sum(dim=(1, 2))


def _differences(values: Tensor, mask: Tensor | None) -> Tensor:
    """Return (B, R, R) value_i - value_j in float; padded responses count as 0 and get no gradient."""
    (values,) = in_float(values)
    if mask is not None:
        values = values.masked_fill(~mask.bool(), 0.0)
    return values.unsqueeze(2) - values.unsqueeze(1)
