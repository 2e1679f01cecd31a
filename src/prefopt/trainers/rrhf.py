"""RRHF: a policy learns to rank scored responses as their scores do, and to write the best one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed

from prefopt._trl import disable_dropout_in_model
from prefopt.data.encoding import with_pad_token
from prefopt.losses.reward import rrhf_loss
from prefopt.scoring.logprobs import install_scoring, score_completions
from prefopt.trainers.base import BaseTrainer
from prefopt.trainers.comparison import (
    ComparisonCollator,
    ComparisonConfig,
    ComparisonData,
    as_table,
    with_whole_margins,
)
from prefopt.trainers.metrics import MetricSums
from prefopt.trainers.policy import add_adapter, base_model_of, load_model, load_tokenizer


@dataclass
class RRHFConfig(ComparisonConfig):
    """Settings of `RRHFTrainer`."""

    learning_rate: float = field(default=1e-6, metadata={"help": "Peak learning rate."})
    truncation_mode: str = field(
        default="keep_start",
        metadata={"help": "What a row longer than `max_length` keeps: 'keep_start' or 'keep_end'."},
    )
    sft_coeff: float = field(default=1.0, metadata={"help": "Weight of the log-likelihood of the best response."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sft_coeff >= 0:
            raise ValueError(f"`sft_coeff` must not be negative, not {self.sft_coeff}.")


class RRHFTrainer(BaseTrainer):
    """Rank responses to align with human feedback: no reference model, no reward model in the loop.

        L = sum over score_i < score_j of max(0, p_i - p_j) - sft_coeff * log pi(best response),

    the mean over the prompts of the optimizer step; p is the log-probability per completion token, and the best
    response is the first of
    those with the highest score. Rows have R >= 2 scored responses; in packed rows each prompt is computed once for
    all of them.

    Args:
        model: hub name or folder of a causal LM, one in memory, or a `PeftModel`.
        args: `RRHFConfig`; default: its defaults.
        train_dataset, eval_dataset: comparison rows in any form that `prefopt.data` reads, or tokenised ones;
            `eval_dataset` may be a dict.
        processing_class: the tokenizer; default: the one saved with the model.
        compute_metrics: called after an evaluation; `predictions` is (rows, 1), the loss of each row's ranking term.
        callbacks, optimizers, quantization_config, peft_config: as in the other trainers.

    Example:
    ```python
    trainer = RRHFTrainer("Qwen/Qwen2.5-0.5B-Instruct", args=RRHFConfig("out"), train_dataset=scored_candidates)
    trainer.train()
    ```

    Reference: arXiv 2304.05302.
    """

    _name = "RRHF"
    _tag_names = ("prefopt", "rrhf")
    _paper = {  # noqa: RUF012
        "title": "RRHF: Rank Responses to Align Language Models with Human Feedback without tears",
        "id": "2304.05302",
    }

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: RRHFConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics=None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers=(None, None),
        quantization_config=None,
        peft_config: PeftConfig | None = None,
    ) -> None:
        if args is None:
            args = RRHFConfig("trainer_output")
        set_seed(args.seed)  # a new adapter's weights are drawn before Trainer sets it
        policy = load_model(model, args, quantization_config)
        processing_class = with_pad_token(processing_class or load_tokenizer(policy, args))
        self.data = ComparisonData(args, processing_class, _check_rows)
        train_dataset = self.data.prepare(train_dataset, "train")
        eval_dataset = self.data.prepare(eval_dataset, "eval")
        install_scoring(base_model_of(policy))
        if peft_config is not None:
            policy = add_adapter(policy, args, peft_config)
        if args.disable_dropout:
            disable_dropout_in_model(policy)
        super().__init__(
            model=policy,
            args=args,
            collate=ComparisonCollator(),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )

    @classmethod
    def check_data(cls, dataset: Dataset, args: RRHFConfig, name: str) -> None:
        """See `BaseTrainer.check_data`."""
        _check_rows(with_whole_margins(dataset, name), args, name)

    def step_loss(self, model, batch: dict[str, Any], sums: MetricSums) -> tuple[Tensor, Tensor]:
        """See `BaseTrainer.step_loss`; predictions are the (B, 1) ranking losses."""
        scores = score_completions(model, batch)
        mean_logps = scores.logps / scores.counts  # (C,)
        ranking = rrhf_loss(as_table(mean_logps, batch), batch["ranks"], mask=batch["mask"])  # (B,)
        best_logps = scores.logps[batch["best"]]
        losses = ranking - self.args.sft_coeff * best_logps
        self.watch_finite(losses, batch, sums)
        real = batch["real"]
        self.record(losses, ranking, mean_logps, best_logps, batch, sums)
        return self.reduce(torch.where(real, losses, 0.0).sum(), batch), ranking.detach()[:, None]

    def record(
        self,
        losses: Tensor,
        ranking: Tensor,
        mean_logps: Tensor,
        best_logps: Tensor,
        batch: dict[str, Any],
        sums: MetricSums,
    ) -> None:
        """Add this micro-batch's metrics: both terms, and how often the policy orders a pair as its scores do."""
        real = batch["real"]
        ordered = mean_logps[batch["better"]] > mean_logps[batch["worse"]]
        sums.add_mean("accuracy", ordered.float(), real[batch["pair_rows"]])
        sums.add_mean("ranking_loss", ranking, real)
        sums.add_mean("logps/best", best_logps, real)
        if not self.model.training:
            sums.add_mean("loss", losses, real)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Evaluate; a data set given here is tokenised like the one of the constructor."""
        if not isinstance(eval_dataset, str):
            eval_dataset = self.data.prepare(eval_dataset, metric_key_prefix)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)


def _check_rows(dataset: Dataset, args: RRHFConfig, name: str) -> None:
    if "margin" in dataset.column_names:
        raise ValueError(f"The {name} set has margins, which RRHF does not read; remove the column.")
    if any(dataset["is_adversarial"]):
        raise ValueError(
            f"The {name} set has adversarial rows (`type: apo`), which are for reward models; leave them out."
        )
