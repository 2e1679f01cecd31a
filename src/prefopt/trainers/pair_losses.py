"""The pair losses by name: what each one reads, and the pure function of `prefopt.losses` that it is.

To add one, write the function, add a line to `PAIR_LOSSES`, and a field to the config for a new hyperparameter.

Letters: B pairs, K references.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from prefopt import losses
from prefopt.arguments import default_of

Pair = tuple[Tensor, Tensor]
"""One (B,) tensor for the chosen completions and one for the rejected."""


@dataclass(frozen=True)
class ReferenceScores:
    """Summed log-probs of chosen and rejected under K references, each (K, B) float32, in nats.

    Attributes:
        chosen_logps, rejected_logps: (K, B).
        weights: (K,) or (K, B), of the references; None where there is one.
    """

    chosen_logps: Tensor
    rejected_logps: Tensor
    weights: Tensor | None = None


@dataclass(frozen=True)
class PairScores:
    """Summed log-probs of a batch of pairs under policy and reference, float32, in nats.

    Attributes:
        chosen_logps, rejected_logps: (B,) under the policy.
        chosen_counts, rejected_counts: (B,) scored tokens.
        ref_chosen_logps, ref_rejected_logps: (B,) under the reference.
        chosen_mean_aligned_logps, rejected_mean_aligned_logps: (B,) WPO's log-weights, or None.
    """

    chosen_logps: Tensor
    rejected_logps: Tensor
    chosen_counts: Tensor
    rejected_counts: Tensor
    ref_chosen_logps: Tensor
    ref_rejected_logps: Tensor
    chosen_mean_aligned_logps: Tensor | None = None
    rejected_mean_aligned_logps: Tensor | None = None

    def logratios(self) -> Pair:
        """Return log pi / pi_ref of both completions."""
        return self.chosen_logps - self.ref_chosen_logps, self.rejected_logps - self.ref_rejected_logps

    def mean_logratios(self) -> Pair:
        """Return the log-ratios of both completions per completion token."""
        chosen, rejected = self.logratios()
        return chosen / self.chosen_counts, rejected / self.rejected_counts

    def mean_logps(self) -> Pair:
        """Return the policy's log-probs of both completions per completion token."""
        return self.chosen_logps / self.chosen_counts, self.rejected_logps / self.rejected_counts

    def mean_aligned_logps(self) -> Pair:
        """Return WPO's log-weights of both completions."""
        assert self.chosen_mean_aligned_logps is not None and self.rejected_mean_aligned_logps is not None
        return self.chosen_mean_aligned_logps, self.rejected_mean_aligned_logps

    def margins(self) -> Pair:
        """Return log p(chosen) - log p(rejected) under the policy, and under the reference."""
        return self.chosen_logps - self.rejected_logps, self.ref_chosen_logps - self.ref_rejected_logps


@dataclass(frozen=True)
class LossSetting:
    """A field of the config that a loss takes as a keyword.

    Attributes:
        name: the config's field.
        interval: values that the loss can use, as in "(0, 0.5]"; None: any.
        keyword: the function's keyword where it has another name.
        why: ends the message about a value outside.
    """

    name: str
    interval: str | None = None
    keyword: str = ""
    why: str = ""

    def check(self, value: float, loss_type: str) -> None:
        """Raise a ValueError where `value` is outside of the interval."""
        if self.interval is None:
            return
        low, high = (float(bound) for bound in self.interval[1:-1].split(","))
        above = low < value if self.interval.startswith("(") else low <= value
        below = value < high if self.interval.endswith(")") else value <= high
        if not (above and below):
            raise ValueError(
                f"{self.name} must lie in {self.interval} for `loss_type: {loss_type}`, not {value}{self.why}."
            )


@dataclass(frozen=True)
class PairLoss:
    """A loss of pairs.

    Attributes:
        function: the pure function; it takes what `reads` returns, then `columns`, then `beta` and `settings`.
        reads: which numbers of a pair it takes.
        rewards: which numbers, times beta, are its implicit rewards, for the metrics.
        columns: columns of the data that it takes, (B,) each.
        settings: fields of the config that it takes.
        needs_reference: False if it takes no log-probs of the reference.
        sorts_batch: it sorts the batch, so that its values belong to no pair.
    """

    function: Callable[..., Tensor]
    reads: Callable[[PairScores], Pair] = PairScores.logratios
    rewards: Callable[[PairScores], Pair] = PairScores.logratios
    columns: tuple[str, ...] = ()
    settings: tuple[LossSetting, ...] = ()
    needs_reference: bool = True
    sorts_batch: bool = False

    def __call__(self, pair: PairScores, config: Any, columns: Mapping[str, Tensor]) -> Tensor:
        """Return the losses (B,) of the pairs under the settings of `config`."""
        data = [*self.reads(pair), *(columns[name] for name in self.columns)]
        keywords = {setting.keyword or setting.name: getattr(config, setting.name) for setting in self.settings}
        return self.function(*data, beta=config.beta, **keywords)

    def check_settings(self, config: Any, loss_type: str) -> None:
        """Raise a ValueError where a setting of `config` is outside of what the loss can use."""
        for setting in self.settings:
            setting.check(getattr(config, setting.name), loss_type)


_SMOOTHING = LossSetting("label_smoothing", "[0, 0.5]")
_FLIPPED = LossSetting("label_smoothing", "[0, 0.5)")
_EXO_SMOOTHING = LossSetting("label_smoothing", "(0, 0.5]", why=" (the loss is infinite at 0; its paper uses 1e-3)")
_TAU = LossSetting("discopop_tau", "(0, 1]", keyword="tau")
_GAMMA = LossSetting("gamma_beta_ratio", "[0, inf)")

# TRL's names, and `ipo_sum`; `apo_zero` and `apo_down` are Anchored PO
PAIR_LOSSES: dict[str, PairLoss] = {
    "sigmoid": PairLoss(losses.dpo_loss, settings=(_SMOOTHING,)),
    "hinge": PairLoss(losses.hinge_loss),
    "ipo": PairLoss(losses.ipo_loss, PairScores.mean_logratios),
    "ipo_sum": PairLoss(losses.ipo_loss),  # as the paper's equation and the SPPO repository: no division by length
    "sigmoid_norm": PairLoss(losses.sigmoid_norm_loss, PairScores.mean_logratios),
    "exo_pair": PairLoss(losses.exo_pair_loss, settings=(_EXO_SMOOTHING,)),
    "nca_pair": PairLoss(losses.nca_pair_loss),
    "robust": PairLoss(losses.robust_dpo_loss, settings=(_FLIPPED,)),
    "bco_pair": PairLoss(losses.bco_pair_loss),
    "sppo_hard": PairLoss(losses.sppo_hard_loss),
    "aot": PairLoss(losses.aot_loss, PairScores.margins, settings=(_SMOOTHING,), sorts_batch=True),
    "aot_unpaired": PairLoss(losses.aot_unpaired_loss, settings=(_SMOOTHING,), sorts_batch=True),
    "apo_zero": PairLoss(losses.anchored_zero_loss),
    "apo_down": PairLoss(losses.anchored_down_loss),
    "discopop": PairLoss(losses.discopop_loss, settings=(_TAU,)),
    "simpo": PairLoss(
        losses.simpo_loss, PairScores.mean_logps, PairScores.mean_logps, settings=(_GAMMA,), needs_reference=False
    ),
}

SFT = "sft"
"""Adds the mean negative log-prob of chosen tokens; the trainer computes it over the whole optimizer step."""
REFERENCE_FREE_LOSSES = (SFT, *(name for name, loss in PAIR_LOSSES.items() if not loss.needs_reference))


def check_unread_settings(config: Any, loss_types: Sequence[str]) -> None:
    """Raise a ValueError where a setting of losses is set and none of the run's losses reads it."""
    readers: dict[str, list[str]] = {}
    for loss_type, loss in PAIR_LOSSES.items():
        for setting in loss.settings:
            readers.setdefault(setting.name, []).append(loss_type)
    for field in dataclasses.fields(config):
        names = readers.get(field.name)
        if names and getattr(config, field.name) != default_of(field) and not set(names) & set(loss_types):
            raise ValueError(
                f"{field.name} is read with loss_type {' or '.join(names)} only, and this run's loss_type is "
                f"{', '.join(loss_types)}: change it, or remove {field.name}."
            )
