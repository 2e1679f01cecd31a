"""How much each reference counts: fixed, from validation data, from the example itself, or learned online.

K references, B pairs, N validation pairs. References come first: (K, B) per example, (K,) for a whole set. Weights are
non-negative, sum to one over the references, carry no gradient, and are uniform where there is nothing to tell the
references apart. A *confidence* is |m_k(y+) - m_k(y-)|, unsigned: a confidently wrong reference has as much of it as a
confidently right one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prefopt.references.confidence import (
    at_least_float32,
    check_confidence,
    check_pair,
    fixed_weights,
    normalise,
    uniform_weights,
)
from prefopt.references.online_weights import SlidingWindowWeights, ThompsonSampling

__all__ = [
    "SlidingWindowWeights",
    "ThompsonSampling",
    "adaptive_weights",
    "discriminative_confidence",
    "fixed_weights",
    "uniform_weights",
    "validation_accuracy_weights",
    "validation_discrimination_weights",
    "weighting_name",
]

# what a recipe may say -> our name; the second block holds the names of the original notebooks
WEIGHTING_NAMES = {
    "uniform": "uniform",
    "fixed": "fixed",
    "arwc": "arwc",
    "arwc_normalized": "arwc_normalized",
    "vdw": "vdw",
    "vaw": "vaw",
    "swcw": "swcw",
    "swcw_one_hot": "swcw_one_hot",
    "tsw": "tsw",
    "offline_1": "vdw",
    "offline_2": "vaw",
    "online_1": "swcw",
}


def weighting_name(name: str) -> str:
    """The library's name of a weighting, given that name or the original notebooks' one (`offline_1`, ...).

    Raises:
        ValueError: no weighting has this name.
    """
    if name not in WEIGHTING_NAMES:
        raise ValueError(f"weighting: no weighting is called {name!r}; choose one of {', '.join(WEIGHTING_NAMES)}.")
    return WEIGHTING_NAMES[name]


def discriminative_confidence(chosen_mean_logps: Tensor, rejected_mean_logps: Tensor) -> Tensor:
    """How clearly each reference tells the two completions apart, whichever it prefers.

    c_kb = |m_kb(chosen) - m_kb(rejected)|

    Args:
        chosen_mean_logps: (K, B) nats per unit of length (token or byte); sums give the confidence of MRPO's code.
        rejected_mean_logps: (K, B) in the same unit.

    Returns:
        (K, B), float32 or float64, without gradient.

    Raises:
        ValueError: the shapes differ or are not (K, B).

    Reference: arXiv 2512.10040 (released notebooks: per-token means, each model's own tokens).
    """
    check_pair(chosen_mean_logps, rejected_mean_logps)
    dtype = at_least_float32(chosen_mean_logps)
    return (chosen_mean_logps.detach().to(dtype) - rejected_mean_logps.detach().to(dtype)).abs()


def adaptive_weights(confidence: Tensor) -> Tensor:
    """Weights of each example from its own confidences (ARWC); uniform where the example has none.

    alpha_kb = c_kb / sum_j c_jb

    Args:
        confidence: (K, B), from per-token means (`arwc_normalized`) or from sums (`arwc`, MRPO's code).

    Returns:
        (K, B), each column sums to one. MRPO's code adds 1e-6 to the denominator, so its weights sum to a little less.

    Raises:
        ValueError: not (K, B), or an entry is negative or not finite; the message names reference and row.

    Reference: arXiv 2405.16388 (MRPO; ARWC). In harmonic mode MRPO's code gives reference 1 the weight meant for
    reference 2; here a weight belongs to the reference it was computed for.
    """
    check_confidence(confidence)
    return normalise(confidence.detach().to(at_least_float32(confidence)))


def validation_discrimination_weights(confidence: Tensor) -> Tensor:
    """One set of weights from the confidences on a validation set (VDW, `offline_1`).

    alpha_k = sum_i c_ki / sum_j sum_i c_ji, a ratio of sums, accumulated in float64

    Args:
        confidence: (K, N) over the validation pairs.

    Returns:
        (K,); uniform where no pair has any confidence.

    Raises:
        ValueError: not (K, N), no pair, or an entry is negative or not finite.

    Reference: arXiv 2512.10040 (VDW).
    """
    check_confidence(confidence)
    if confidence.shape[1] == 0:
        raise ValueError("validation weights need at least one validation pair, got none.")
    return normalise(confidence.detach().double().sum(dim=1)).to(at_least_float32(confidence))


def validation_accuracy_weights(
    chosen_mean_logps: Tensor, rejected_mean_logps: Tensor, *, temperature: float | None = None
) -> Tensor:
    """One set of weights from each reference's accuracy on a validation set (VAW, `offline_2`).

    acc_k = mean_i 1[m_ki(chosen) > m_ki(rejected)];  alpha_k = acc_k / sum_j acc_j,
    or softmax_k(acc_k / temperature), because the ratio of accuracies is nearly uniform by construction.

    Args:
        chosen_mean_logps: (K, N) nats per unit of length.
        rejected_mean_logps: (K, N); an equal pair counts as wrong.
        temperature: in units of accuracy (0.05: five points more weigh e times as much); None for the ratio.

    Returns:
        (K,); uniform where no reference is ever right.

    Raises:
        ValueError: the shapes differ or are not (K, N), no pair, a score that is not finite, a temperature <= 0.

    Reference: arXiv 2512.10040 (VAW); the temperature is ours.
    """
    check_pair(chosen_mean_logps, rejected_mean_logps)
    if chosen_mean_logps.shape[1] == 0:
        raise ValueError("validation weights need at least one validation pair, got none.")
    if not bool(torch.isfinite(chosen_mean_logps).all() & torch.isfinite(rejected_mean_logps).all()):
        raise ValueError("validation weights need finite log-probs of every reference.")
    accuracy = (chosen_mean_logps.detach() > rejected_mean_logps.detach()).double().mean(dim=1)
    dtype = at_least_float32(chosen_mean_logps)
    if temperature is None:
        return normalise(accuracy).to(dtype)
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}.")
    return torch.softmax(accuracy / temperature, dim=0).to(dtype)
