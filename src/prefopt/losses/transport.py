"""Alignment via optimal transport (AOT): compare sorted batches, not pairs.

Letters: B pairs. The optimal transport between two sets of numbers matches them in sorted order, so position b of the
result is the b-th smallest of the batch and belongs to no pair: these losses cannot be weighted per pair, and their
value depends on how a batch is cut into micro-batches.
"""

from __future__ import annotations

from torch import Tensor

from ._checks import per_pair
from .pairwise import dpo_loss


def aot_loss(policy_margins: Tensor, ref_margins: Tensor, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Make the policy's margins dominate the reference's, quantile by quantile.

        d = sort(log pi(chosen) - log pi(rejected)) - sort(log pi_ref(chosen) - log pi_ref(rejected))
        -(1 - eps) log sigmoid(beta d) - eps log sigmoid(-beta d)

    Args:
        policy_margins: (B,) nats, chosen minus rejected log-probability of the policy.
        ref_margins: (B,) nats, the same of the reference.
        beta: strength of the pull to the reference, above 0.
        label_smoothing: eps in [0, 0.5].

    Returns:
        (B,) losses in sorted order.

    Raises:
        ValueError: shapes that differ or are not (B,); beta or label_smoothing out of range.

    Reference: arXiv 2406.05882 (paired); TRL's `aot`.
    """
    policy, reference = per_pair(policy_margins=policy_margins, ref_margins=ref_margins)
    return dpo_loss(policy.sort().values, reference.sort().values, beta=beta, label_smoothing=label_smoothing)


def aot_unpaired_loss(
    chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float, label_smoothing: float = 0.0
) -> Tensor:
    """Make the rewards of chosen completions dominate those of rejected ones, whichever prompt they answer.

        d = sort(chosen log-ratios) - sort(rejected log-ratios)
        -(1 - eps) log sigmoid(beta d) - eps log sigmoid(-beta d)

    Args:
        chosen_logratios: (B,) nats.
        rejected_logratios: (B,) nats.
        beta: strength of the pull to the reference, above 0.
        label_smoothing: eps in [0, 0.5].

    Returns:
        (B,) losses in sorted order.

    Raises:
        ValueError: shapes that differ or are not (B,); beta or label_smoothing out of range.

    Reference: arXiv 2406.05882 (unpaired); TRL's `aot_unpaired`.
    """
    chosen, rejected = per_pair(chosen_logratios=chosen_logratios, rejected_logratios=rejected_logratios)
    return dpo_loss(chosen.sort().values, rejected.sort().values, beta=beta, label_smoothing=label_smoothing)
