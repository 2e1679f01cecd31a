"""A scalar reward model from scored responses: the ranking loss over all pairs of a prompt's responses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from prefopt.losses.reward import bradley_terry_loss, ranked_pairs, ranking_loss
from prefopt.models.heads import HeadedModel
from prefopt.models.reward import RewardModel
from prefopt.trainers.comparison import as_table
from prefopt.trainers.head import HeadConfig, HeadTrainer, best_and_worst
from prefopt.trainers.metrics import MetricSums


@dataclass
class RewardConfig(HeadConfig):
    """Settings of `RewardTrainer`: TRL's `RewardConfig`, batch layout, pooling, and what an evaluation reports."""


class RewardTrainer(HeadTrainer):
    """Reward model r(x, y): -log sigmoid(r(better) - r(worse)), the mean over all ranked pairs of the optimizer step.

    Rows have any number R >= 2 of scored responses; each response is computed once, and in packed rows its prompt once for all of them. Ties
    rank neither way. Rows of two responses may have a `margin` m: -log sigmoid(r(better) - r(worse) - m).

    Example:

    ```python
    trainer = RewardTrainer("Qwen/Qwen2.5-0.5B", args=RewardConfig("out"), train_dataset=dataset)
    trainer.train()
    ```

    Reference: arXiv 2203.02155 (all pairs of a prompt), as averaged in arXiv 2311.08045's released code.
    """

    config_class = RewardConfig
    _name = "reward modelling"
    _tag_names = ("prefopt", "reward-trainer")
    _paper: dict[str, str] = {  # noqa: RUF012
        "title": "Training language models to follow instructions with human feedback",
        "id": "2203.02155",
    }

    def head_settings(self, args: RewardConfig) -> tuple[type[HeadedModel], dict[str, Any]]:
        """See `HeadTrainer.head_settings`."""
        return RewardModel, {"pooling": args.pooling}

    @classmethod
    def check_rows(cls, dataset: Dataset, args: RewardConfig, name: str) -> None:
        """Refuse adversarial rows: here they would weigh as much as human ones."""
        adversarial = sum(dataset["is_adversarial"])
        if adversarial:
            raise ValueError(
                f"{adversarial} of {len(dataset)} rows of the {name} set are adversarial (`type: apo`) and would weigh as much as human "
                "comparisons here; use AdversarialRewardTrainer (`prefopt adversarial-reward-model`), or leave them out."
            )

    def step_loss(self, model, batch: dict[str, Any], sums: MetricSums) -> tuple[Tensor, Tensor]:
        """See `BaseTrainer.step_loss`; predictions are the (B, 2) rewards of each row's best and worst response."""
        rewards = as_table(self.run_model(model, batch).logits[:, 0], batch)  # (B, R)
        self.watch_finite(rewards.sum(1), batch, sums)
        mask = batch["mask"] & batch["real"][:, None]
        total = self.total_loss(rewards, mask, batch)
        self.record(total, rewards.detach(), mask, batch, sums)
        return self.reduce_pairs(total, batch), best_and_worst(rewards.detach(), batch)

    def total_loss(self, rewards: Tensor, mask: Tensor, batch: dict[str, Any]) -> Tensor:
        """The sum of the loss over the batch's ranked pairs.

        Args:
            rewards: (B, R).
            mask: (B, R), True for a response that is there and counts.
            batch: the batch.
        """
        if "margin" in batch:
            best_worst = best_and_worst(rewards, batch)
            losses = bradley_terry_loss(best_worst[:, 0], best_worst[:, 1], margin=batch["margin"])
            return torch.where(batch["real"], losses, 0.0).sum()
        return ranking_loss(rewards, batch["ranks"], mask=mask) * ranked_pairs(batch["ranks"], mask).sum()

    def record(self, total: Tensor, rewards: Tensor, mask: Tensor, batch: dict[str, Any], sums: MetricSums) -> None:
        """Add this micro-batch's metrics, under the names of TRL's `RewardTrainer`."""
        values = rewards.reshape(-1)[batch["slots"]]
        self.record_pairs(total.detach(), values[batch["better"]] - values[batch["worse"]], batch, sums)
        sums.add_mean("mean_reward", rewards, mask)
        sums.add_min("min_reward", rewards, mask)
        sums.add_max("max_reward", rewards, mask)
        if self._predictions_of_rows is not None:
            tables = [row[there][:, None] - row[there][None, :] for row, there in zip(rewards, batch["mask"])]
            self.keep_predictions(tables, batch, rewards)
