"""Losses of the margin between chosen and rejected, the DPO family, and WPO's weight, which multiplies any of them.

Letters: B pairs. A log-ratio is log pi(y|x) - log pi_ref(y|x) summed over completion tokens, in nats; a *mean*
log-ratio is that divided by the number of completion tokens. h = chosen - rejected. Nothing is reduced: each function
returns (B,).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from prefopt.losses._checks import check_not_negative, check_positive, per_pair


def dpo_loss(
    chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float, label_smoothing: float = 0.0
) -> Tensor:
    """Compute the DPO loss: logistic regression on the margin of implicit rewards.

        -(1 - eps) log sigmoid(beta h) - eps log sigmoid(-beta h)

    TRL 1.16 ignores `label_smoothing` in this loss; with the default 0 both agree.

    Args:
        chosen_logratios: (B,) nats.
        rejected_logratios: (B,) nats.
        beta: strength of the pull to the reference, above 0.
        label_smoothing: eps, the supposed share of flipped labels, in [0, 0.5]; 0 is plain DPO, above 0 is cDPO.

    Returns:
        (B,) losses.

    Raises:
        ValueError: shapes that differ or are not (B,); beta or label_smoothing out of range.

    Reference: arXiv 2305.18290, Eq. 7; cDPO: E. Mitchell, "A note on DPO with noisy preferences" (2023).
    """
    chosen, rejected = per_pair(chosen_logratios=chosen_logratios, rejected_logratios=rejected_logratios)
    check_positive(beta=beta)
    if not 0.0 <= label_smoothing <= 0.5:
        raise ValueError(f"label_smoothing must lie in [0, 0.5], got {label_smoothing}; above 0.5, swap the labels.")
    margin = beta * (chosen - rejected)
    loss = -F.logsigmoid(margin)
    if label_smoothing == 0.0:
        return loss
    return (1 - label_smoothing) * loss - label_smoothing * F.logsigmoid(-margin)


def hinge_loss(chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float) -> Tensor:
    """Compute the hinge loss of the margin: no gradient once a pair is separated by 1 / beta nats.

        max(0, 1 - beta h)

    Args:
        chosen_logratios: (B,) nats.
        rejected_logratios: (B,) nats.
        beta: the reciprocal of the wanted margin in nats, above 0.

    Returns:
        (B,) losses.

    Raises:
        ValueError: shapes that differ or are not (B,); beta not above 0.

    Reference: SLiC-HF, arXiv 2305.10425; on log-ratios as in RSO, arXiv 2309.06657.
    """
    chosen, rejected = per_pair(chosen_logratios=chosen_logratios, rejected_logratios=rejected_logratios)
    check_positive(beta=beta)
    return torch.relu(1 - beta * (chosen - rejected))


def robust_dpo_loss(
    chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float, label_smoothing: float
) -> Tensor:
    """Compute a DPO loss that is unbiased under labels that are flipped with a known probability.

        [ -(1 - eps) log sigmoid(beta h) + eps log sigmoid(-beta h) ] / (1 - 2 eps)

    Its expectation over flipped labels is the clean DPO loss; single values may be negative. eps = 0.5 is a division
    by
    zero and above it the sign turns: TRL only warns there, this raises.

    Args:
        chosen_logratios: (B,) nats.
        rejected_logratios: (B,) nats.
        beta: strength of the pull to the reference, above 0.
        label_smoothing: eps, the probability that a label is flipped, in [0, 0.5); 0 is DPO.

    Returns:
        (B,) losses.

    Raises:
        ValueError: shapes that differ or are not (B,); beta or label_smoothing out of range.

    Reference: arXiv 2403.00409.
    """
    chosen, rejected = per_pair(chosen_logratios=chosen_logratios, rejected_logratios=rejected_logratios)
    check_positive(beta=beta)
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must lie in [0, 0.5) for robust DPO, got {label_smoothing}.")
    margin = beta * (chosen - rejected)
    as_labelled, as_flipped = -F.logsigmoid(margin), -F.logsigmoid(-margin)
    return ((1 - label_smoothing) * as_labelled - label_smoothing * as_flipped) / (1 - 2 * label_smoothing)


def exo_pair_loss(
    chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float, label_smoothing: float
) -> Tensor:
    """Compute the reverse KL (EXO) from the policy's preference over the pair to the smoothed label (1 - eps, eps).

        q log(q / (1 - eps)) + (1 - q) log((1 - q) / eps),   q = sigmoid(beta h)

    Args:
        chosen_logratios: (B,) nats.
        rejected_logratios: (B,) nats.
        beta: strength of the pull to the reference, above 0.
        label_smoothing: eps in (0, 0.5]; the paper uses 1e-3. At 0 the divergence is infinite, so 0 raises.

    Returns:
        (B,) losses; 0 where q = 1 - eps.

    Raises:
        ValueError: shapes that differ or are not (B,); beta or label_smoothing out of range.

    Reference: EXO, arXiv 2402.00856, Eq. 16.
    """
    chosen, rejected = per_pair(chosen_logratios=chosen_logratios, rejected_logratios=rejected_logratios)
    check_positive(beta=beta)
    if not 0.0 < label_smoothing <= 0.5:
        raise ValueError(
            f"label_smoothing must lie in (0, 0.5] for EXO, whose loss is infinite at 0; got {label_smoothing} "
            "(the paper uses 1e-3)."
        )
    margin = beta * (chosen - rejected)
    chosen_term = torch.sigmoid(margin) * (F.logsigmoid(margin) - math.log1p(-label_smoothing))
    rejected_term = torch.sigmoid(-margin) * (F.logsigmoid(-margin) - math.log(label_smoothing))
    return chosen_term + rejected_term


def discopop_loss(chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float, tau: float = 0.05) -> Tensor:
    """Compute the log-ratio modulated loss (DiscoPOP): logistic for misordered pairs, exponential for ordered ones.

        -log sigmoid(beta h) (1 - m) + exp(-beta h) m,   m = sigmoid(beta h / tau)

    The second term is computed as exp(-beta h + log m). TRL multiplies exp(-beta h) by m, which is infinity times zero
    for beta h below about -88. With tau above 1 the term itself grows without bound, so tau must not exceed 1.

    Args:
        chosen_logratios: (B,) nats.
        rejected_logratios: (B,) nats.
        beta: strength of the pull to the reference, above 0.
        tau: width of the blend, in (0, 1]; the paper's value is 0.05.

    Returns:
        (B,) losses.

    Raises:
        ValueError: shapes that differ or are not (B,); beta or tau out of range.

    Reference: DiscoPOP, arXiv 2406.08414, Eq. 5.
    """
    chosen, rejected = per_pair(chosen_logratios=chosen_logratios, rejected_logratios=rejected_logratios)
    check_positive(beta=beta)
    if not 0.0 < tau <= 1.0:
        raise ValueError(f"tau must lie in (0, 1], got {tau}: above 1 the loss of a misordered pair overflows.")
    margin = beta * (chosen - rejected)
    logistic = -F.logsigmoid(margin) * torch.sigmoid(-margin / tau)
    exponential = torch.exp(F.logsigmoid(margin / tau) - margin)
    return logistic + exponential


def ipo_loss(chosen_mean_logratios: Tensor, rejected_mean_logratios: Tensor, *, beta: float) -> Tensor:
    """Compute the IPO loss: regress the margin per token onto 1 / (2 beta).

        (h - 1 / (2 beta))^2

    Args:
        chosen_mean_logratios: (B,) nats per completion token.
        rejected_mean_logratios: (B,) nats per completion token.
        beta: the paper's tau, above 0.

    Returns:
        (B,) losses.

    Raises:
        ValueError: shapes that differ or are not (B,); beta not above 0.

    Reference: arXiv 2310.12036, Eq. 17. The division by length is not in the paper; TRL reports that its authors
        confirmed it, and we follow TRL.
    """
    chosen, rejected = per_pair(
        chosen_mean_logratios=chosen_mean_logratios, rejected_mean_logratios=rejected_mean_logratios
    )
    check_positive(beta=beta)
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def sigmoid_norm_loss(chosen_mean_logratios: Tensor, rejected_mean_logratios: Tensor, *, beta: float) -> Tensor:
    """Compute length-normalised DPO.

        -log sigmoid(beta h), h per token

    Args:
        chosen_mean_logratios: (B,) nats per completion token.
        rejected_mean_logratios: (B,) nats per completion token.
        beta: above 0, and larger than for sums by about the number of tokens (Tulu 3 uses 5).

    Returns:
        (B,) losses.

    Raises:
        ValueError: shapes that differ or are not (B,); beta not above 0.

    Reference: Tulu 3, arXiv 2411.15124; TRL's `sigmoid_norm`.
    """
    chosen, rejected = per_pair(
        chosen_mean_logratios=chosen_mean_logratios, rejected_mean_logratios=rejected_mean_logratios
    )
    return dpo_loss(chosen, rejected, beta=beta)


def simpo_loss(
    chosen_mean_logps: Tensor, rejected_mean_logps: Tensor, *, beta: float, gamma_beta_ratio: float
) -> Tensor:
    """Compute the SimPO loss: no reference, a target margin instead.

        -log sigmoid(beta (p_chosen - p_rejected - gamma / beta)),   p = mean log-probability per token

    Args:
        chosen_mean_logps: (B,) nats per completion token, of the policy.
        rejected_mean_logps: (B,) nats per completion token, of the policy.
        beta: scale of the reward, above 0 (2.0 to 10 in the paper).
        gamma_beta_ratio: gamma / beta in nats per token, at least 0. TRL's `simpo_gamma` is gamma itself.

    Returns:
        (B,) losses.

    Raises:
        ValueError: shapes that differ or are not (B,); beta or gamma_beta_ratio out of range.

    Reference: arXiv 2405.14734, Eq. 6.
    """
    chosen, rejected = per_pair(chosen_mean_logps=chosen_mean_logps, rejected_mean_logps=rejected_mean_logps)
    check_not_negative(gamma_beta_ratio=gamma_beta_ratio)
    return dpo_loss(chosen - gamma_beta_ratio, rejected, beta=beta)


def nca_pair_loss(chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float) -> Tensor:
    """Compute the NCA loss of a pair: tell each completion apart from samples of the reference.

        -log sigmoid(c) - 1/2 log sigmoid(-c) - 1/2 log sigmoid(-r)

    Args:
        chosen_logratios: (B,) nats.
        rejected_logratios: (B,) nats.
        beta: strength of the pull to the reference, above 0.

    Returns:
        (B,) losses.

    Raises:
        ValueError: shapes that differ or are not (B,); beta not above 0.

    Reference: arXiv 2402.05369.
    """
    chosen, rejected = per_pair(chosen_logratios=chosen_logratios, rejected_logratios=rejected_logratios)
    check_positive(beta=beta)
    noise = 0.5 * (F.logsigmoid(-beta * chosen) + F.logsigmoid(-beta * rejected))
    return -F.logsigmoid(beta * chosen) - noise


def bco_pair_loss(chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float) -> Tensor:
    """Compute the BCO loss of a pair: chosen completions are 1, rejected are 0.

        -log sigmoid(c) - log sigmoid(-r)

    The reward shift delta of the paper is 0 here, as in TRL's `bco_pair`.

    Args:
        chosen_logratios: (B,) nats.
        rejected_logratios: (B,) nats.
        beta: strength of the pull to the reference, above 0.

    Returns:
        (B,) losses.

    Raises:
        ValueError: shapes that differ or are not (B,); beta not above 0.

    Reference: arXiv 2404.04656.
    """
    chosen, rejected = per_pair(chosen_logratios=chosen_logratios, rejected_logratios=rejected_logratios)
    check_positive(beta=beta)
    return -F.logsigmoid(beta * chosen) - F.logsigmoid(-beta * rejected)


def anchored_zero_loss(chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float) -> Tensor:
    """Compute anchored preference optimization for chosen completions better than the model's own.

        1 - sigmoid(c) + sigmoid(r)

    Raises the chosen and lowers the rejected completion. TRL calls it `apo_zero`.

    Args:
        chosen_logratios: (B,) nats.
        rejected_logratios: (B,) nats.
        beta: strength of the pull to the reference, above 0.

    Returns:
        (B,) losses in (0, 2).

    Raises:
        ValueError: shapes that differ or are not (B,); beta not above 0.

    Reference: arXiv 2408.06266, Eq. 7.
    """
    chosen, rejected = per_pair(chosen_logratios=chosen_logratios, rejected_logratios=rejected_logratios)
    check_positive(beta=beta)
    return torch.sigmoid(-beta * chosen) + torch.sigmoid(beta * rejected)


def anchored_down_loss(chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float) -> Tensor:
    """Compute anchored preference optimization for chosen completions worse than the model's own.

        sigmoid(c) + 1 - sigmoid(c - r)

    Lowers both completions, the rejected one more. TRL calls it `apo_down`.

    Args:
        chosen_logratios: (B,) nats.
        rejected_logratios: (B,) nats.
        beta: strength of the pull to the reference, above 0.

    Returns:
        (B,) losses in (0, 2).

    Raises:
        ValueError: shapes that differ or are not (B,); beta not above 0.

    Reference: arXiv 2408.06266, Eq. 8.
    """
    chosen, rejected = per_pair(chosen_logratios=chosen_logratios, rejected_logratios=rejected_logratios)
    check_positive(beta=beta)
    return torch.sigmoid(beta * chosen) + torch.sigmoid(-beta * (chosen - rejected))


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
