"""SPPO and GPO: regress each log-ratio onto how often its completion wins against the policy's own samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from prefopt import losses as pure
from prefopt.arguments import setting
from prefopt.launch import print_on_main
from prefopt.scoring.logprobs import CompletionScores
from prefopt.trainers.config import PreferenceConfig
from prefopt.trainers.metrics import MetricSums
from prefopt.trainers.pair_losses import SFT, LossSetting, PairLoss, PairScores
from prefopt.trainers.preference import SIDES, PreferenceTrainer

QUANTILES = (5, 25, 50, 75, 95)
WIN_PROBABILITIES = ("chosen_win_prob", "rejected_win_prob", "chosen_over_rejected_prob")


@dataclass
class SPPOConfig(PreferenceConfig):
    """Settings of `SPPOTrainer`; the papers' `beta` is far below DPO's, since it divides targets."""

    beta: float = setting(
        0.001,
        "1 / eta. Targets are (win probability - 1/2) / beta nats, so a SMALLER beta moves the policy further (0.001 "
        "in the papers, for whole answers of 7B models).",
    )
    loss_type: list[str] = field(
        default_factory=lambda: ["sppo"],
        metadata={
            "help": "'sppo' (soft win probabilities), 'sppo_single' (one probability for both sides), 'sppo_hard' "
            "(plain pairs), 'gpo' (scores of a general preference model); 'sft' may be added."
        },
    )
    max_target: float | None = setting(
        None,
        "gpo: largest size of a target in nats; null: no bound. Scores of 2 to 8 make targets of thousands of nats at "
        "beta 0.001.",
        above=0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_target is not None and "gpo" not in self.loss_type:
            raise ValueError("`max_target` bounds the targets of `loss_type: gpo`; remove it.")
        if self.label_smoothing:
            raise ValueError("`label_smoothing` is not used here: uncertain pairs have win probabilities near 1/2.")


Targets = tuple[torch.Tensor | float, torch.Tensor | float]


@dataclass(frozen=True)
class SelfPlayLoss(PairLoss):
    """A self-play loss; `targets` returns its targets (chosen, rejected) in nats from config and columns."""

    targets: Callable[[Any, Mapping[str, torch.Tensor]], Targets] = lambda config, batch: (0.0, 0.0)


def _soft_targets(config: Any, batch: Mapping[str, torch.Tensor]) -> Targets:
    chosen, rejected = (batch[name] - 0.5 for name in _SOFT)
    return chosen / config.beta, rejected / config.beta


def _single_targets(config: Any, batch: Mapping[str, torch.Tensor]) -> Targets:
    prob = batch[_SINGLE[0]]
    return (prob - 0.5) / config.beta, (0.5 - prob) / config.beta


def _hard_targets(config: Any, batch: Mapping[str, torch.Tensor]) -> Targets:
    return 0.5 / config.beta, -0.5 / config.beta


def _score_targets(config: Any, batch: Mapping[str, torch.Tensor]) -> Targets:
    chosen, rejected = (batch[name] / config.beta for name in _SCORES)
    if config.max_target is None:
        return chosen, rejected
    return chosen.clamp(-config.max_target, config.max_target), rejected.clamp(-config.max_target, config.max_target)


_SOFT, _SINGLE, _SCORES = WIN_PROBABILITIES[:2], WIN_PROBABILITIES[2:], ("chosen_score", "rejected_score")
SELF_PLAY_LOSSES: dict[str, SelfPlayLoss] = {
    "sppo": SelfPlayLoss(pure.sppo_loss, columns=_SOFT, targets=_soft_targets),
    "sppo_single": SelfPlayLoss(pure.sppo_single_loss, columns=_SINGLE, targets=_single_targets),
    "sppo_hard": SelfPlayLoss(pure.sppo_hard_loss, targets=_hard_targets),
    "gpo": SelfPlayLoss(pure.gpo_loss, columns=_SCORES, settings=(LossSetting("max_target"),), targets=_score_targets),
}


class SPPOTrainer(PreferenceTrainer):
    """Self-play preference optimization, and GPO: one iteration on pairs of the policy's own samples.

    The reference is the policy at the start of the iteration. The loss is a square of nats, about 1e5 at first with
    beta 0.001; watch `loss_normalized` (beta^2 times it, in squared probabilities) instead. `prefopt pipeline` runs
    whole iterations.

    Example:
    ```python
    trainer = SPPOTrainer("Qwen/Qwen2.5-0.5B-Instruct", args=SPPOConfig("out"), train_dataset=pairs_with_probabilities)
    trainer.train()
    ```

    Reference: arXiv 2405.00675 (SPPO), 2410.02197 (GPO).
    """

    config_class = SPPOConfig
    pair_loss_table = SELF_PLAY_LOSSES
    args: SPPOConfig
    _described = False
    _name = "SPPO"
    _tag_names = ("prefopt", "sppo")
    _paper = {  # noqa: RUF012
        "title": "Self-Play Preference Optimization for Language Model Alignment",
        "id": "2405.00675",
        "citation": """
@inproceedings{wu2025selfplay,
    title     = {Self-Play Preference Optimization for Language Model Alignment},
    author    = {Wu, Yue and Sun, Zhiqing and Yuan, Huizhuo and Ji, Kaixuan and Yang, Yiming and Gu, Quanquan},
    booktitle = {ICLR},
    year      = 2025,
}""",
    }

    @classmethod
    def check_columns(cls, dataset: Dataset, args: PreferenceConfig, name: str) -> None:
        """Check that the columns which the losses read are there and hold numbers they can use."""
        super().check_columns(dataset, args, name)
        check_self_play_columns(dataset, args.loss_type, name)

    def train(self, *arguments: Any, **keywords: Any) -> Any:
        """Train; print first where the loss will start, and why that high."""
        if self._self_play() and self.train_dataset is not None:
            start = self.expected_initial_loss(self.train_dataset)
            print_on_main(
                f"The loss is in nats squared: it starts near {start:.3g} by design, where policy and reference "
                "agree, and its gradient is as large. `loss_normalized` is beta^2 times it, and starts near "
                f"{start * self.args.beta**2:.3g}."
            )
        return super().train(*arguments, **keywords)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, before the first loss, the quantiles of the columns that the losses read; see `Trainer.log`."""
        if "loss" in logs and not self._described:
            self._described = True
            quantiles = self.quantiles(self.train_dataset)
            if quantiles:
                super().log(quantiles)
        super().log(logs, start_time)

    def quantiles(self, dataset: Dataset) -> dict[str, float]:
        """Return quantiles of win probabilities (or scores) over all pairs: `win_prob/chosen_p05` to `_p95`."""
        found: dict[str, float] = {}
        for column in dict.fromkeys(c for loss, _ in self._self_play() for c in SELF_PLAY_LOSSES[loss].columns):
            values = np.percentile(dataset[column], QUANTILES)
            found |= {f"{_metric_name(column)}_p{q:02d}": float(value) for q, value in zip(QUANTILES, values)}
        return found

    def expected_initial_loss(self, dataset: Dataset) -> float:
        """Compute the mean loss of a policy that still is its reference (before WPO's weights)."""
        columns = {
            name: torch.tensor(dataset[name], dtype=torch.float32)
            for loss, _ in self._self_play()
            for name in SELF_PLAY_LOSSES[loss].columns
        }
        zeros = torch.zeros(len(dataset))
        agreeing = PairScores(*[zeros] * 2, *[torch.ones_like(zeros)] * 2, *[zeros] * 2)
        losses = [
            weight * self.pair_loss_table[loss](agreeing, self.args, columns) for loss, weight in self._self_play()
        ]
        return float(sum(loss.mean() for loss in losses))

    def record(
        self,
        losses: torch.Tensor,
        pair: PairScores,
        scores: CompletionScores,
        batch: dict[str, Any],
        sums: MetricSums,
    ) -> None:
        """Add the metrics of self-play to the usual ones."""
        super().record(losses, pair, scores, batch, sums)
        real = batch["real"]
        sums.add_mean("loss_normalized", losses * self.args.beta**2, real)
        for side, logratios in zip(SIDES, pair.logratios()):
            sums.add_mean(f"logratios/{side}", logratios, real)
        for loss, _ in self._self_play():
            suffix = "" if len(self._self_play()) == 1 else f"_{loss}"
            targets = SELF_PLAY_LOSSES[loss].targets(self.args, batch)
            for side, target in zip(("chosen", "rejected"), targets):
                whole = torch.broadcast_to(torch.as_tensor(target, device=real.device), real.shape)
                sums.add_mean(f"targets/{side}{suffix}", whole, real)
                if loss == "gpo" and self.args.max_target is not None:
                    sums.add_mean("targets/bounded_fraction", (whole.abs() >= self.args.max_target).float(), real)
            for column in SELF_PLAY_LOSSES[loss].columns:
                sums.add_mean(_metric_name(column), batch[column], real)

    def _self_play(self) -> list[tuple[str, float]]:
        return [(name, weight) for name, weight in self._weighted_losses() if name != SFT]


def _metric_name(column: str) -> str:
    """Return the metric's name of a column: `chosen_win_prob` -> `win_prob/chosen`."""
    if column == WIN_PROBABILITIES[2]:
        return "win_prob/chosen_over_rejected"
    side, _, what = column.partition("_")
    return f"{what}/{side}"


def check_self_play_columns(dataset: Dataset, losses: Sequence[str], name: str) -> None:
    """Check the columns that the self-play losses among `losses` read.

    Raises:
        ValueError: a column is missing or holds an invalid value; the message names the command that makes it, or the
            row.
    """
    for loss in losses:
        for column in SELF_PLAY_LOSSES[loss].columns if loss in SELF_PLAY_LOSSES else ():
            if column not in dataset.column_names:
                hint = "--policy gpo" if column in _SCORES else "--policy sppo"
                raise ValueError(
                    f"`loss_type: {loss}` reads the column {column!r}, which the {name} data does not have; `prefopt "
                    f"build-pairs {hint}` makes it (`sppo_hard` needs none)."
                )
            _check_values(dataset, column, name)


def _check_values(dataset: Dataset, column: str, name: str) -> None:
    """Raise a ValueError that names the row for a missing or non-finite value, or a probability outside [0, 1]."""
    for row, value in enumerate(dataset[column]):
        wrong = "missing" if value is None else f"{value}, which is not finite" if not math.isfinite(value) else None
        if wrong is None and column in WIN_PROBABILITIES and not 0 <= value <= 1:
            wrong = f"{value}, which is no probability"
        if wrong is not None:
            raise ValueError(
                f"The {name} data, row {dataset[row]['row_id']!r} (number {row}): `{column}` is {wrong}. Build the "
                "pairs again, or leave the row out."
            )
