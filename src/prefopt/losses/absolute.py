"""Losses that look at each completion's own log-ratio, so that the chosen one cannot sink together with the rejected.

Letters: B pairs. A log-ratio is log pi(y|x) - log pi_ref(y|x) summed over completion tokens, in nats; below, c and r are
beta times the chosen and the rejected one. Nothing is reduced: each function returns (B,).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import check_positive, per_pair


def nca_pair_loss(chosen_logratios: Tensor, rejected_logratios: Tensor, *, beta: float) -> Tensor:
    """Noise contrastive alignment of a pair: tell each completion apart from samples of the reference.

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
    """Binary classifier optimization of a pair: chosen completions are 1, rejected are 0.

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
    """Anchored preference optimization for chosen completions that are better than the model's own.

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
    """Anchored preference optimization for chosen completions that are worse than the model's own.

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
