"""SPPO and GPO: regress each log-ratio onto how often its completion wins against the policy's own samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset

from prefopt import losses as pure
from prefopt.launch import print_on_main
from prefopt.trainers.config import PreferenceConfig
from prefopt.trainers.metrics import MetricSums
from prefopt.trainers.pair_losses import PAIR_LOSSES, SFT, PairLoss, PairScores
from prefopt.trainers.preference import PreferenceTrainer

QUANTILES = (5, 25, 50, 75, 95)
WIN_PROBABILITIES = ("chosen_win_prob", "rejected_win_prob", "chosen_over_rejected_prob")


@dataclass
class SPPOConfig(PreferenceConfig):
    """Settings of `SPPOTrainer`: the papers' `beta` is far below DPO's, since it divides targets and scales no reward."""

    beta: float = field(
        default=0.001,
        metadata={
            "help": "1 / eta. Targets are (win probability - 1/2) / beta nats, so a SMALLER beta moves the policy "
            "further (0.001 in the papers, for "
            "whole answers of 7B models)."
        },
    )
    loss_type: list[str] = field(
        default_factory=lambda: ["sppo"],
        metadata={
            "help": "'sppo' (soft win probabilities), 'sppo_single' (one probability for both sides), 'sppo_hard' "
            "(plain pairs), 'gpo' "
            "(scores of a general preference model); 'sft' may be added."
        },
    )
    max_target: float | None = field(
        default=None,
        metadata={
            "help": "gpo: largest size of a target in nats; null: no bound. Scores of 2 to 8 make targets of "
            "thousands of nats at beta 0.001."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_target is not None and "gpo" not in self.loss_type:
            raise ValueError("`max_target` bounds the targets of `loss_type: gpo`; remove it.")
        if self.max_target is not None and not self.max_target > 0:
            raise ValueError(f"`max_target` must be above 0 nats, not {self.max_target}.")
        if self.label_smoothing:
            raise ValueError("`label_smoothing` plays no part here: uncertain pairs have win probabilities near 1/2.")


class SelfPlayLoss(NamedTuple):
    """A self-play loss: which columns it reads, the loss, and its targets (chosen, rejected) in nats."""

    columns: tuple[str, ...]
    loss: PairLoss
    targets: Callable[[Any, dict[str, torch.Tensor]], tuple[torch.Tensor | float, torch.Tensor | float]]


def _reading(loss: Callable[..., torch.Tensor], columns: tuple[str, ...], *settings: str) -> PairLoss:
    """A loss of log-ratios and `columns` that reads `settings` from the config."""

    def apply(pair: PairScores, config: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        keywords = {name: getattr(config, name) for name in settings}
        values = [batch[name] for name in columns]
        return loss(pair.chosen_logratios, pair.rejected_logratios, *values, beta=config.beta, **keywords)

    return apply


def _bounded(scores: torch.Tensor, config: Any) -> torch.Tensor:
    targets = scores / config.beta
    return targets if config.max_target is None else targets.clamp(-config.max_target, config.max_target)


_SOFT, _SINGLE, _SCORES = WIN_PROBABILITIES[:2], WIN_PROBABILITIES[2:], ("chosen_score", "rejected_score")
SELF_PLAY_LOSSES: dict[str, SelfPlayLoss] = {
    "sppo": SelfPlayLoss(
        _SOFT,
        _reading(pure.sppo_loss, _SOFT),
        lambda config, batch: tuple((batch[name] - 0.5) / config.beta for name in _SOFT),
    ),
    "sppo_single": SelfPlayLoss(
        _SINGLE,
        _reading(pure.sppo_single_loss, _SINGLE),
        lambda config, batch: ((batch[_SINGLE[0]] - 0.5) / config.beta, (0.5 - batch[_SINGLE[0]]) / config.beta),
    ),
    "sppo_hard": SelfPlayLoss(
        (), PAIR_LOSSES["sppo_hard"], lambda config, batch: (0.5 / config.beta, -0.5 / config.beta)
    ),
    "gpo": SelfPlayLoss(
        _SCORES,
        _reading(pure.gpo_loss, _SCORES, "max_target"),
        lambda config, batch: tuple(_bounded(batch[name], config) for name in _SCORES),
    ),
}


class SPPOTrainer(PreferenceTrainer):
    """Self-play preference optimization, and GPO: one iteration on pairs of the policy's own samples.

    The reference is the policy at the start of the iteration. The loss is a square of nats, about 1e5 at first with
    beta 0.001; watch
    `loss_normalized` (beta^2 times it, in squared probabilities) instead. `prefopt pipeline` runs whole iterations.

    Example:
    ```python
    trainer = SPPOTrainer("Qwen/Qwen2.5-0.5B-Instruct", args=SPPOConfig("out"),
    train_dataset=pairs_with_win_probabilities)
    trainer.train()
    ```

    Reference: arXiv 2405.00675 (SPPO), 2410.02197 (GPO).
    """

    config_class = SPPOConfig
    _described = False
    pair_loss_table = {name: entry.loss for name, entry in SELF_PLAY_LOSSES.items()}  # noqa: RUF012
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
    def check_columns(cls, dataset: Dataset, args: SPPOConfig, name: str) -> None:
        """Refuse data without the columns that the losses read, or with a value in them that is none."""
        super().check_columns(dataset, args, name)
        check_self_play_columns(dataset, args.loss_type, name)

    def train(self, *arguments: Any, **keywords: Any) -> Any:
        """Train; says first where the loss will start, and why that high."""
        if self._self_play() and self.train_dataset is not None:
            start = self.expected_initial_loss(self.train_dataset)
            print_on_main(
                f"The loss is in nats squared: it starts near {start:.3g} by design, where policy and reference "
                "agree, and its gradient is as "
                f"large. `loss_normalized` is beta^2 times it, and starts near {start * self.args.beta**2:.3g}."
            )
        return super().train(*arguments, **keywords)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """See `Trainer.log`; before the first loss, the quantiles of the columns that the losses read."""
        if "loss" in logs and not self._described:
            self._described = True
            quantiles = self.quantiles(self.train_dataset)
            if quantiles:
                super().log(quantiles)
        super().log(logs, start_time)

    def quantiles(self, dataset: Dataset) -> dict[str, float]:
        """How win probabilities (or scores) are spread over all pairs: `win_prob/chosen_p05` to `_p95`."""
        found: dict[str, float] = {}
        for column in dict.fromkeys(c for loss, _ in self._self_play() for c in SELF_PLAY_LOSSES[loss].columns):
            values = np.percentile(dataset[column], QUANTILES)
            found |= {f"{_group(column)}_p{q:02d}": float(value) for q, value in zip(QUANTILES, values)}
        return found

    def expected_initial_loss(self, dataset: Dataset) -> float:
        """The mean loss of a policy that still is its reference (before WPO's weights)."""
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

    def record(self, losses, pair: PairScores, scores, batch: dict[str, Any], sums: MetricSums) -> None:
        """Add the metrics of self-play to the usual ones."""
        super().record(losses, pair, scores, batch, sums)
        real = batch["real"]
        sums.add_mean("loss_normalized", losses * self.args.beta**2, real)
        sums.add_mean("logratios/chosen", pair.chosen_logratios, real)
        sums.add_mean("logratios/rejected", pair.rejected_logratios, real)
        for loss, _ in self._self_play():
            suffix = "" if len(self._self_play()) == 1 else f"_{loss}"
            targets = SELF_PLAY_LOSSES[loss].targets(self.args, batch)
            for side, target in zip(("chosen", "rejected"), targets):
                whole = torch.broadcast_to(torch.as_tensor(target, device=real.device), real.shape)
                sums.add_mean(f"targets/{side}{suffix}", whole, real)
                if loss == "gpo" and self.args.max_target is not None:
                    sums.add_mean("targets/bounded_fraction", (whole.abs() >= self.args.max_target).float(), real)
            for column in SELF_PLAY_LOSSES[loss].columns:
                sums.add_mean(_group(column), batch[column], real)

    def _self_play(self) -> list[tuple[str, float]]:
        return [(name, weight) for name, weight in self._weighted_losses() if name != SFT]


def _group(column: str) -> str:
    """The metric of a column: `chosen_win_prob` -> `win_prob/chosen`."""
    if column == WIN_PROBABILITIES[2]:
        return "win_prob/chosen_over_rejected"
    side, _, what = column.partition("_")
    return f"{what}/{side}"


def check_self_play_columns(dataset: Dataset, losses: Sequence[str], name: str) -> None:
    """Refuse data without the columns that self-play losses among `losses` read, or with a value in them that is none.

    Raises:
        ValueError: names the column and what makes it, or the row.
    """
    for loss in losses:
        for column in SELF_PLAY_LOSSES[loss].columns if loss in SELF_PLAY_LOSSES else ():
            if column not in dataset.column_names:
                hint = "--policy gpo" if column in _SCORES else "--policy sppo"
                raise ValueError(
                    f"`loss_type: {loss}` reads the column {column!r}, which the {name} data does not have; `prefopt "
                    f"build-pairs {hint}` "
                    "makes it (`sppo_hard` needs none)."
                )
            _check_values(dataset, column, name)


def _check_values(dataset: Dataset, column: str, name: str) -> None:
    """Refuse a missing value, one that is not finite, and a probability outside [0, 1], naming the row."""
    for row, value in enumerate(dataset[column]):
        wrong = "missing" if value is None else f"{value}, which is not finite" if not math.isfinite(value) else None
        if wrong is None and column in WIN_PROBABILITIES and not 0 <= value <= 1:
            wrong = f"{value}, which is no probability"
        if wrong is not None:
            raise ValueError(
                f"The {name} data, row {dataset[row]['row_id']!r} (number {row}): `{column}` is {wrong}. Build the "
                "pairs again, or leave the row out."
            )
