"""RRHF: a policy learns to rank scored responses as their scores do, and to write the best one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from datasets import Dataset
from torch import Tensor

from prefopt.arguments import setting
from prefopt.losses.reward import rrhf_loss
from prefopt.scoring.logprobs import install_scoring, score_completions
from prefopt.trainers.comparison import ComparisonConfig, ComparisonTrainer, as_table
from prefopt.trainers.metrics import MetricSums
from prefopt.trainers.policy import base_model_of, load_model


@dataclass
class RRHFConfig(ComparisonConfig):
    """Settings of `RRHFTrainer`."""

    learning_rate: float = setting(1e-6, "Peak learning rate.")
    truncation_mode: str = setting(
        "keep_start", "What a row longer than `max_length` keeps: 'keep_start' or 'keep_end'."
    )
    sft_coeff: float = setting(1.0, "Weight of the log-likelihood of the best response.", at_least=0)


class RRHFTrainer(ComparisonTrainer):
    """Rank responses to align with human feedback: no reference model, no reward model in the loop.

        L = sum over score_i < score_j of max(0, p_i - p_j) - sft_coeff * log pi(best response),

    the mean over the prompts of the optimizer step; p is the log-probability per completion token, and the best
    response is the first of those with the highest score. Rows have R >= 2 scored responses; in packed rows each
    prompt is computed once for all of them. Arguments as for `ComparisonTrainer`; `compute_metrics` gets (rows, 1),
    the loss of each row's ranking term.

    Example:
    ```python
    trainer = RRHFTrainer("Qwen/Qwen2.5-0.5B-Instruct", args=RRHFConfig("out"), train_dataset=scored_candidates)
    trainer.train()
    ```

    Reference: arXiv 2304.05302.
    """

    config_class: ClassVar[type[ComparisonConfig]] = RRHFConfig
    _name = "RRHF"
    _tag_names = ("prefopt", "rrhf")
    _paper = {  # noqa: RUF012
        "title": "RRHF: Rank Responses to Align Language Models with Human Feedback without tears",
        "id": "2304.05302",
    }

    def load(self, model: Any, args: Any, quantization_config: Any) -> Any:
        """See `ComparisonTrainer.load`."""
        policy = load_model(model, args, quantization_config)
        install_scoring(base_model_of(policy))
        return policy

    @classmethod
    def check_rows(cls, dataset: Dataset, args: Any, name: str) -> None:
        """See `ComparisonTrainer.check_rows`."""
        if "margin" in dataset.column_names:
            raise ValueError(f"The {name} set has margins, which RRHF does not read; remove the column.")
        if any(dataset["is_adversarial"]):
            raise ValueError(
                f"The {name} set has adversarial rows (`type: apo`), which are for reward models; leave them out."
            )

    def step_loss(self, model: Any, batch: dict[str, Any], sums: MetricSums) -> tuple[Tensor, Tensor]:
        """See `BaseTrainer.step_loss`; predictions are the (B, 1) ranking losses."""
        scores = score_completions(model, batch)
        mean_logps = scores.logps / scores.counts  # (C,)
        ranking = rrhf_loss(as_table(mean_logps, batch), batch["ranks"], mask=batch["mask"])  # (B,)
        best_logps = scores.logps[batch["best"]]
        losses = ranking - self.args.sft_coeff * best_logps
        self.watch_finite(losses, batch, sums)
        real = batch["real"]
        ordered = mean_logps[batch["better"]] > mean_logps[batch["worse"]]  # as the scores order them
        sums.add_mean("accuracy", ordered.float(), real[batch["pair_rows"]])
        sums.add_mean("ranking_loss", ranking, real)
        sums.add_mean("logps/best", best_logps, real)
        if not self.model.training:
            sums.add_mean("loss", losses, real)
        return self.reduce(torch.where(real, losses, 0.0).sum(), batch), ranking.detach()[:, None]
