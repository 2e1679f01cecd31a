"""Self-play losses (SPPO, GPO): regress each log-ratio onto how often its completion wins.

Letters: B pairs. A log-ratio is log pi(y|x) - log pi_ref(y|x) summed over completion tokens, in nats. The reference is
the policy at the start of the iteration, and 1 / beta is the paper's eta. Losses are squares of nats: about 1e5 at the
first step with beta = 0.001. Nothing is reduced: each function returns (B,).
"""

from __future__ import annotations

from torch import Tensor

from prefopt.losses._checks import check_positive, per_pair


def sppo_loss(
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    chosen_win_prob: Tensor,
    rejected_win_prob: Tensor,
    *,
    beta: float,
) -> Tensor:
    """Compute the SPPO loss with soft win probabilities.

        1/2 [ (chosen - (p_chosen - 1/2) / beta)^2 + (rejected - (p_rejected - 1/2) / beta)^2 ]

    Args:
        chosen_logratios: (B,) nats.
        rejected_logratios: (B,) nats.
        chosen_win_prob: (B,) probability in [0, 1] that the chosen completion beats a sample of the policy. The range
            is for whoever builds the data to check: checking values here would stall the device.
        rejected_win_prob: (B,) the same for the rejected completion.
        beta: 1 / eta, above 0 (0.001 in the paper's runs).

    Returns:
        (B,) losses in nats squared.

    Raises:
        ValueError: shapes that differ or are not (B,); beta not above 0.

    Reference: arXiv 2405.00675, Eq. 4.7, with log Z taken as eta / 2; the factor 1/2 is the released code's.
    """
    chosen, rejected, chosen_wins, rejected_wins = per_pair(
        chosen_logratios=chosen_logratios,
        rejected_logratios=rejected_logratios,
        chosen_win_prob=chosen_win_prob,
        rejected_win_prob=rejected_win_prob,
    )
    check_positive(beta=beta)
    return _regression(chosen, rejected, (chosen_wins - 0.5) / beta, (rejected_wins - 0.5) / beta)


def sppo_single_loss(
    chosen_logratios: Tensor, rejected_logratios: Tensor, chosen_over_rejected_prob: Tensor, *, beta: float
) -> Tensor:
    """Compute the SPPO loss with the one probability that chosen beats rejected, used for both.

        1/2 [ (chosen - (P - 1/2) / beta)^2 + (rejected + (P - 1/2) / beta)^2 ]

    Args:
        chosen_logratios: (B,) nats.
        rejected_logratios: (B,) nats.
        chosen_over_rejected_prob: (B,) P, probability in [0, 1] (not checked, as in `sppo_loss`).
        beta: 1 / eta, above 0.

    Returns:
        (B,) losses in nats squared.

    Raises:
        ValueError: shapes that differ or are not (B,); beta not above 0.

    Reference: `sppo_single` in the code released with arXiv 2405.00675.
    """
    chosen, rejected, prob = per_pair(
        chosen_logratios=chosen_logratios,
        rejected_logratios=rejected_logratios,
        chosen_over_rejected_prob=chosen_over_rejected_prob,
    )
    check_positive(beta=beta)
    target = (prob - 0.5) / beta
    return _regression(chosen, rejected, target, -target)


def sppo_hard_loss(chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float) -> Tensor:
    """Compute the SPPO loss of plain pairs: the chosen completion always wins, the rejected one never does.

        (chosen - 1 / (2 beta))^2 + (rejected + 1 / (2 beta))^2

    As in TRL there is no factor 1/2, so this is twice `sppo_loss` with probabilities 1 and 0.

    Args:
        chosen_logratios: (B,) nats.
        rejected_logratios: (B,) nats.
        beta: 1 / eta, above 0.

    Returns:
        (B,) losses in nats squared.

    Raises:
        ValueError: shapes that differ or are not (B,); beta not above 0.

    Reference: TRL's `sppo_hard`, after arXiv 2405.00675, Eq. 4.7.
    """
    chosen, rejected = per_pair(chosen_logratios=chosen_logratios, rejected_logratios=rejected_logratios)
    check_positive(beta=beta)
    return 2 * _regression(chosen, rejected, 0.5 / beta, -0.5 / beta)


def gpo_loss(
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    chosen_score: Tensor,
    rejected_score: Tensor,
    *,
    beta: float,
    max_target: float | None = None,
) -> Tensor:
    """Compute the GPO loss: regress each log-ratio onto its completion's average preference score.

        1/2 [ (chosen - t_chosen)^2 + (rejected - t_rejected)^2 ],   t = clip(score / beta, -max_target, max_target)

    Scores are logits, not probabilities, so nothing is subtracted; with scores p - 1/2 and no clipping this is
    `sppo_loss`.

    Args:
        chosen_logratios: (B,) nats.
        rejected_logratios: (B,) nats.
        chosen_score: (B,) mean preference score of the chosen completion over the policy's samples, a logit.
        rejected_score: (B,) the same for the rejected completion.
        beta: 1 / eta, above 0.
        max_target: bound of the target's size in nats, above 0; None does not clip. Scores of general preference
            models reach 2 to 8, hence targets of thousands of nats at beta = 0.001.

    Returns:
        (B,) losses in nats squared.

    Raises:
        ValueError: shapes that differ or are not (B,); beta or max_target not above 0.

    Reference: arXiv 2410.02197. The loss of its runs was not released; this follows its data (row means of the score
        table as targets), and where the released scripts name a threshold of 1000 it is `max_target`.
    """
    chosen, rejected, chosen_target, rejected_target = per_pair(
        chosen_logratios=chosen_logratios,
        rejected_logratios=rejected_logratios,
        chosen_score=chosen_score,
        rejected_score=rejected_score,
    )
    check_positive(beta=beta)
    chosen_target, rejected_target = chosen_target / beta, rejected_target / beta
    if max_target is not None:
        check_positive(max_target=max_target)
        chosen_target = chosen_target.clamp(-max_target, max_target)
        rejected_target = rejected_target.clamp(-max_target, max_target)
    return _regression(chosen, rejected, chosen_target, rejected_target)


def _regression(
    chosen: Tensor, rejected: Tensor, chosen_target: Tensor | float, rejected_target: Tensor | float
) -> Tensor:
    return 0.5 * ((chosen - chosen_target) ** 2 + (rejected - rejected_target) ** 2)
