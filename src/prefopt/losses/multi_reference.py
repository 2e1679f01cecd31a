"""Several reference models: mixtures of references, losses over references, and the trust region of MRPO.

Letters: K references, B pairs. Weights are (K,) for the whole set or (K, B) per example, at least 0, with sum 1 over
the references; they never carry a gradient. Log-probabilities are sums over a completion in nats, or nats per token or
byte where the caller normalises; all of one call in the same unit.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from prefopt.losses._checks import check_choice, check_positive, check_shapes, in_float

_MODES = ("harmonic", "geometric", "arithmetic")
_LARGEST_EXPONENT = 80.0  # exp of it still leaves room for beta in float32, whose exp overflows at 88.7


def mixture_logps(ref_logps: Tensor, weights: Tensor, *, mode: str) -> Tensor:
    """Compute the log-probability of one completion under a mixture of references, to stand in for a single one's.

        harmonic:   -logsumexp_k(log a_k - l_k), the weighted harmonic mean of the probabilities (MRPO)
        geometric:  sum_k a_k l_k, exact for a weighted sum of reverse KL penalties
        arithmetic: logsumexp_k(log a_k + l_k), a heuristic under the logistic loss

    harmonic <= geometric <= arithmetic. A weight of 0 leaves its reference out altogether, whatever its score. On sums
    over a completion the scores differ by far more than log a_k does, so harmonic is close to the minimum and
    arithmetic to the maximum over the references, nearly regardless of the weights.

    Args:
        ref_logps: (K, B) log-probabilities l_k of the same completions under each reference.
        weights: (K,) or (K, B) a_k.
        mode: "harmonic", "geometric" or "arithmetic".

    Returns:
        (B,) log-probabilities, not normalised over completions (the constant cancels in a pair).

    Raises:
        ValueError: shapes that do not agree; weights in host memory that are negative or do not sum to 1; an unknown
            mode.

    Reference: MRPO, arXiv 2405.16388 (harmonic); arXiv 2502.01203 (the exact solutions). The MRPO authors' code swaps
        the two weights and bounds them below by 1e-6; we do neither.
    """
    check_shapes({"ref_logps": "K,B", "weights": "K|K,B"}, {"ref_logps": ref_logps, "weights": weights})
    check_choice("mode", mode, _MODES)
    (logps,) = in_float(ref_logps)
    shares = _shares(weights, logps)
    logps = logps.masked_fill(shares == 0, 0.0)  # log 0 would meet an infinite score, and 0 times it, as NaN
    if mode == "geometric":
        return (shares * logps).sum(dim=0)
    if mode == "harmonic":
        return -torch.logsumexp(shares.log() - logps, dim=0)
    return torch.logsumexp(shares.log() + logps, dim=0)


def multi_dpo_loss(policy_margins: Tensor, ref_margins: Tensor, weights: Tensor, *, beta: float) -> Tensor:
    """Compute the weighted mean of the DPO losses against each reference (MDPO).

        sum_k a_k [ -log sigmoid(beta (D - D_k)) ],   D = log-probability of chosen minus rejected

    At least the DPO loss against the geometric mixture, by convexity, and equal where all D_k agree. A reference pulls
    with at most beta a_k, so that one broken reference has bounded influence.

    Args:
        policy_margins: (B,) D of the policy.
        ref_margins: (K, B) D_k of the references.
        weights: (K,) or (K, B) a_k; a weight of 0 leaves its reference out altogether.
        beta: strength of the pull to the references, above 0.

    Returns:
        (B,) losses.

    Raises:
        ValueError: shapes that do not agree; weights in host memory that are negative or do not sum to 1; beta not
            above 0.

    Reference: the multi-reference DPO baseline of arXiv 2405.16388, and MDPO of arXiv 2512.10040.
    """
    check_shapes(
        {"policy_margins": "B", "ref_margins": "K,B", "weights": "K|K,B"},
        {"policy_margins": policy_margins, "ref_margins": ref_margins, "weights": weights},
    )
    check_positive(beta=beta)
    policy, reference = in_float(policy_margins, ref_margins)
    shares = _shares(weights, reference)
    reference = reference.masked_fill(shares == 0, 0.0)
    losses = -F.logsigmoid(beta * (policy.unsqueeze(0) - reference))
    return (shares * losses).sum(dim=0)


def forward_kl_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    weights: Tensor,
    *,
    beta: float,
    max_exponent: float,
) -> Tensor:
    """Compute (experimental) the preference loss for a reward penalised by the forward KL from several references.

        r(y) = -beta exp(min(l_mix(y) - l(y), max_exponent)) + const,   l_mix = logsumexp_k(log a_k + l_k)
        loss = -log sigmoid(r(chosen) - r(rejected))

    The optimum of E r - beta sum_k a_k KL(pi_k || pi) is pi = beta pi_mix / (lambda - r). The exponent overflows on
    sums over long completions, so it is capped; a completion beyond the cap gets no gradient. Prefer scores per token.

    Args:
        policy_chosen_logps: (B,) log-probabilities l of the policy.
        policy_rejected_logps: (B,) the same for the rejected completions.
        ref_chosen_logps: (K, B) log-probabilities l_k of the references.
        ref_rejected_logps: (K, B) the same for the rejected completions.
        weights: (K,) or (K, B) a_k; a weight of 0 leaves its reference out altogether.
        beta: strength of the penalty, above 0.
        max_exponent: cap of l_mix - l, in (0, 80].

    Returns:
        (B,) losses.

    Raises:
        ValueError: shapes that do not agree; weights in host memory that are negative or do not sum to 1; beta or
            max_exponent out of range.

    Reference: derived from the objective above, which arXiv 2502.01203 treats; not compared with its constants.
    """
    pair = {"policy_chosen_logps": policy_chosen_logps, "policy_rejected_logps": policy_rejected_logps}
    references = {"ref_chosen_logps": ref_chosen_logps, "ref_rejected_logps": ref_rejected_logps}
    check_shapes(
        {**dict.fromkeys(pair, "B"), **dict.fromkeys(references, "K,B"), "weights": "K|K,B"},
        {**pair, **references, "weights": weights},
    )
    check_positive(beta=beta)
    if not 0.0 < max_exponent <= _LARGEST_EXPONENT:
        raise ValueError(f"max_exponent must lie in (0, {_LARGEST_EXPONENT:.0f}], got {max_exponent}.")
    chosen, rejected = in_float(policy_chosen_logps, policy_rejected_logps)
    chosen_gap = mixture_logps(ref_chosen_logps, weights, mode="arithmetic") - chosen
    rejected_gap = mixture_logps(ref_rejected_logps, weights, mode="arithmetic") - rejected
    margin = rejected_gap.clamp(max=max_exponent).exp() - chosen_gap.clamp(max=max_exponent).exp()
    return -F.logsigmoid(beta * margin)


def clip_to_anchor(
    ref_chosen_logps: Tensor, ref_rejected_logps: Tensor, *, anchor: int, max_eps: float = 0.1
) -> tuple[Tensor, Tensor]:
    """Keep every reference within a relative distance of one of them (MRPO's clipped trust region).

        eps_chosen = max_eps |b_chosen| / (|b_chosen| + |b_rejected|),   eps_rejected = max_eps - eps_chosen
        l_k(y) <- clip(l_k(y), (1 + eps) l_anchor(y), (1 - eps) l_anchor(y)),   b = mean over k of l_k

    The anchor is the policy's own initial model. Weights of references are to be taken before clipping, and mixing
    follows it.

    Args:
        ref_chosen_logps: (K, B) summed log-probabilities of the chosen completions.
        ref_rejected_logps: (K, B) the same of the rejected completions.
        anchor: row of the anchor, 0 to K - 1; it comes back unchanged.
        max_eps: sum of the two relative distances, in [0, 1); 0 makes every reference the anchor.

    Returns:
        Clipped chosen and rejected log-probabilities, (K, B) each.

    Raises:
        ValueError: shapes that differ or are not (K, B); anchor or max_eps out of range.

    Reference: arXiv 2405.16388 and its code. The code covers K = 2; the mean b over all K is our extension. Its
        fixed distance (a negative setting) is left out.
    """
    references = {"ref_chosen_logps": ref_chosen_logps, "ref_rejected_logps": ref_rejected_logps}
    check_shapes(dict.fromkeys(references, "K,B"), references)
    if not 0 <= anchor < ref_chosen_logps.shape[0]:
        raise ValueError(f"anchor must be a row from 0 to {ref_chosen_logps.shape[0] - 1}, got {anchor}.")
    if not 0.0 <= max_eps < 1.0:
        raise ValueError(f"max_eps must lie in [0, 1), got {max_eps}.")
    chosen, rejected = in_float(ref_chosen_logps, ref_rejected_logps)
    chosen_size, rejected_size = chosen.mean(dim=0).abs(), rejected.mean(dim=0).abs()
    total = chosen_size + rejected_size
    share = torch.where(total > 0, chosen_size / total.clamp(min=torch.finfo(total.dtype).tiny), 0.5)
    return _clip(chosen, anchor, max_eps * share), _clip(rejected, anchor, max_eps * (1 - share))


def _clip(logps: Tensor, anchor: int, eps: Tensor) -> Tensor:
    centre, reach = logps[anchor], eps * logps[anchor].abs()
    return logps.clamp(centre - reach, centre + reach)


def _shares(weights: Tensor, like: Tensor) -> Tensor:
    """Return the weights as (K, B), without gradient and in the dtype of the scores that they weigh.

    Their values are checked in host memory only: on a device the check would wait for the whole forward pass.
    """
    weights = weights.detach()
    if weights.device.type == "cpu" and weights.numel() > 0:
        tolerance = 1e-3 if weights.dtype in (torch.float32, torch.float64) else 2e-2
        totals = weights.double().sum(dim=0)
        if not bool((weights >= 0).all() and ((totals - 1).abs() <= tolerance).all()):
            raise ValueError(
                f"weights must be at least 0 and sum to 1 over the references; got sums from {totals.min():.6g} to "
                f"{totals.max():.6g} and a smallest weight of {weights.min():.6g}."
            )
    shares = weights.to(like.dtype)
    return shares if shares.ndim == 2 else shares.unsqueeze(1).expand_as(like)
