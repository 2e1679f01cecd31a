"""Weights of pairs (WPO). They multiply any unreduced pairwise loss of this package."""

from __future__ import annotations

from torch import Tensor

from prefopt.losses._checks import check_positive, per_pair


def wpo_pair_weights(
    chosen_mean_aligned_logps: Tensor, rejected_mean_aligned_logps: Tensor, *, max_weight: float | None = 1.0
) -> Tensor:
    """Compute the weight of a pair: how likely the present policy is to write both of its completions.

        w = min(exp(omega_chosen + omega_rejected), max_weight), without gradient

    With sampled alignment omega = mean_t [log p_t(y_t) - log sum_v p_t(v)^2], which is about 0 for text that the
    policy would sample itself, so that on-policy pairs weigh about 1. The weighted loss is still divided by the number
    of pairs, not by the sum of weights.

    Args:
        chosen_mean_aligned_logps: (B,) omega of the chosen completion, nats per completion token.
        rejected_mean_aligned_logps: (B,) omega of the rejected completion, nats per completion token.
        max_weight: upper bound, above 0; None for no bound.

    Returns:
        (B,) weights, detached.

    Raises:
        ValueError: shapes that differ or are not (B,); max_weight not above 0.

    Reference: arXiv 2406.11827, Eq. 2. The authors' code clamps at 1, our default; TRL 1.16 does not clamp, which is
        `max_weight=None`.
    """
    chosen, rejected = per_pair(
        chosen_mean_aligned_logps=chosen_mean_aligned_logps, rejected_mean_aligned_logps=rejected_mean_aligned_logps
    )
    weights = (chosen.detach() + rejected.detach()).exp()
    if max_weight is None:
        return weights
    check_positive(max_weight=max_weight)
    return weights.clamp(max=max_weight)
