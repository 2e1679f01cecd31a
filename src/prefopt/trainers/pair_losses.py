"""The pair losses by name: how a trainer's numbers reach the pure functions of `prefopt.losses`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from prefopt import losses

if TYPE_CHECKING:
    from prefopt.trainers.config import PreferenceConfig


@dataclass(frozen=True)
class PairScores:
    """Summed log-probs of a batch of pairs under policy and reference, float32, in nats.

    Attributes:
        chosen_logps, rejected_logps: (B,) under the policy.
        chosen_counts, rejected_counts: (B,) scored tokens.
        ref_chosen_logps, ref_rejected_logps: (B,) under the reference.
        chosen_mean_aligned_logps, rejected_mean_aligned_logps: (B,) WPO's log-weights, or None.
    """

    chosen_logps: torch.Tensor
    rejected_logps: torch.Tensor
    chosen_counts: torch.Tensor
    rejected_counts: torch.Tensor
    ref_chosen_logps: torch.Tensor
    ref_rejected_logps: torch.Tensor
    chosen_mean_aligned_logps: torch.Tensor | None = None
    rejected_mean_aligned_logps: torch.Tensor | None = None

    @property
    def chosen_logratios(self) -> torch.Tensor:
        """(B,) log pi / pi_ref of the chosen completions."""
        return self.chosen_logps - self.ref_chosen_logps

    @property
    def rejected_logratios(self) -> torch.Tensor:
        """(B,) log pi / pi_ref of the rejected completions."""
        return self.rejected_logps - self.ref_rejected_logps

    @property
    def mean_logratios(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(B,) log-ratios per completion token, chosen and rejected."""
        return self.chosen_logratios / self.chosen_counts, self.rejected_logratios / self.rejected_counts


def _ratios(loss: Callable[..., torch.Tensor], *settings: str) -> Callable[..., torch.Tensor]:
    """A loss of (chosen, rejected) log-ratios that reads `settings` from the config."""

    def apply(pair: PairScores, config: PreferenceConfig, columns: dict[str, torch.Tensor]) -> torch.Tensor:
        keywords = {name: getattr(config, name) for name in settings}
        return loss(pair.chosen_logratios, pair.rejected_logratios, beta=config.beta, **keywords)

    return apply


def _simpo(pair: PairScores, config: PreferenceConfig, columns: dict[str, torch.Tensor]) -> torch.Tensor:
    return losses.simpo_loss(
        pair.chosen_logps / pair.chosen_counts,
        pair.rejected_logps / pair.rejected_counts,
        beta=config.beta,
        gamma_beta_ratio=config.gamma_beta_ratio,
    )


def _aot(pair: PairScores, config: PreferenceConfig, columns: dict[str, torch.Tensor]) -> torch.Tensor:
    return losses.aot_loss(
        pair.chosen_logps - pair.rejected_logps,
        pair.ref_chosen_logps - pair.ref_rejected_logps,
        beta=config.beta,
        label_smoothing=config.label_smoothing,
    )


def _discopop(pair: PairScores, config: PreferenceConfig, columns: dict[str, torch.Tensor]) -> torch.Tensor:
    return losses.discopop_loss(
        pair.chosen_logratios, pair.rejected_logratios, beta=config.beta, tau=config.discopop_tau
    )


PairLoss = Callable[[PairScores, Any, dict[str, torch.Tensor]], torch.Tensor]

SFT = "sft"
"""The loss name that adds the mean negative log-prob of chosen tokens; the trainer computes it over the optimizer step."""
SORTING_LOSSES = ("aot", "aot_unpaired")
"""Losses that sort the batch, so that their values belong to no pair."""
REFERENCE_FREE_LOSSES = ("simpo", SFT)

# TRL's names; `apo_zero` and `apo_down` are Anchored PO
PAIR_LOSSES: dict[str, PairLoss] = {
    "sigmoid": _ratios(losses.dpo_loss, "label_smoothing"),
    "hinge": _ratios(losses.hinge_loss),
    "ipo": lambda pair, config, columns: losses.ipo_loss(*pair.mean_logratios, beta=config.beta),
    "sigmoid_norm": lambda pair, config, columns: losses.sigmoid_norm_loss(*pair.mean_logratios, beta=config.beta),
    "exo_pair": _ratios(losses.exo_pair_loss, "label_smoothing"),
    "nca_pair": _ratios(losses.nca_pair_loss),
    "robust": _ratios(losses.robust_dpo_loss, "label_smoothing"),
    "bco_pair": _ratios(losses.bco_pair_loss),
    "sppo_hard": _ratios(losses.sppo_hard_loss),
    "aot": _aot,
    "aot_unpaired": _ratios(losses.aot_unpaired_loss, "label_smoothing"),
    "apo_zero": _ratios(losses.anchored_zero_loss),
    "apo_down": _ratios(losses.anchored_down_loss),
    "discopop": _discopop,
    "simpo": _simpo,
}
