"""A preference model whose preferences may be cyclic, and Bradley-Terry as its baseline on the same data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from datasets import Dataset
from torch import Tensor

from prefopt.arguments import setting
from prefopt.evaluation.preference_metrics import RowPrediction, transitivity
from prefopt.losses.reward import general_preference_loss, general_preference_score
from prefopt.models.general_preference import GeneralPreferenceModel, preference_table
from prefopt.models.heads import HeadedModel
from prefopt.models.reward import RewardModel
from prefopt.scoring.layouts import Layout
from prefopt.scoring.plan import MicroBatch
from prefopt.trainers.comparison import ComparisonCollator, ComparisonConfig, as_table
from prefopt.trainers.metrics import MetricSums
from prefopt.trainers.reward import HeadConfig, HeadTrainer, best_and_worst

_HEAD_FIELDS = ("dim", "normalize", "scale_gate", "temperature")


@dataclass
class GeneralPreferenceConfig(HeadConfig):
    """Settings of `GeneralPreferenceTrainer`. Head fields left at None: `GeneralPreferenceModel.defaults`."""

    loss_type: str = setting(
        "general_preference",
        "'general_preference', or 'bradley_terry' for a scalar model on the same data.",
        choices=("general_preference", "bradley_terry"),
    )
    dim: int | None = setting(None, "Width d of the embeddings, even (default 2).")
    normalize: bool | None = setting(None, "Divide embeddings by their norm (default false).")
    scale_gate: str | None = setting(None, "Prompt head: 'softmax', 'scaled_softmax', or null for none (default).")
    temperature: float | None = setting(
        None, "tau (default 0.1; 1 for bradley_terry). Saved with a general preference model.", above=0
    )
    sft_coeff: float = setting(
        0.0,
        "Share c of the supervised term: (1 - c) * preference + c * supervised (0.1 in the released code).",
        at_least=0,
    )
    sft_beta: float = setting(2.0, "Factor on the log-probability inside the supervised term's sigmoid.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sft_coeff < 1:
            raise ValueError(f"sft_coeff is {self.sft_coeff}; it must be below 1.")
        if self.loss_type == "bradley_terry":
            unused = [name for name in ("dim", "normalize", "scale_gate") if getattr(self, name) is not None]
            if unused or self.sft_coeff:
                raise ValueError(
                    f"`{(unused or ['sft_coeff'])[0]}` has no meaning for loss_type 'bradley_terry'; leave it out."
                )


@dataclass(frozen=True)
class _SequenceCollator(ComparisonCollator):
    """Adds where every token of each row's best sequence, prompt and response, is predicted (`sft_*`)."""

    def __call__(
        self, examples: Sequence[Mapping[str, Any]], micro_batch: MicroBatch, layout: Layout
    ) -> dict[str, Any]:
        """See `ComparisonCollator`."""
        batch = super().__call__(examples, micro_batch, layout)
        scored = torch.isin(batch["score_completions"], batch["best"])
        index, completions = [batch["score_index"][scored]], [batch["score_completions"][scored]]
        targets = [batch["score_targets"][scored]]
        for example, best in zip(examples, batch["best"]):
            prompt = torch.tensor(example["prompt_ids"])
            end = batch["prompt_index"][best]
            index.append(torch.arange(end - len(prompt) + 1, end))  # each prompt token but the last predicts the next
            targets.append(prompt[1:])
            completions.append(best.repeat(len(prompt) - 1))
        return batch | {
            "sft_index": torch.cat(index),
            "sft_targets": torch.cat(targets),
            "sft_completions": torch.cat(completions),
        }


class GeneralPreferenceTrainer(HeadTrainer):
    """General preference model: -log sigmoid((s(better > worse) - m) / tau), the mean over the step's ranked pairs.

    s is a skew-symmetric product of two embeddings (`models.general_preference`), so preferences may be cyclic; m is
    the row's `margin` where the data has one. With `sft_coeff` c, the loss is (1 - c) * preference + c * supervised,
    where the supervised term of a row is -log sigmoid(sft_beta * log pi(prompt and best response)), the mean over
    rows; the LM head is then kept and trained.

    Evaluation reports the accuracy by the sign of s and calibration as the reward trainers do, and, where the rows of
    a set compare at least three responses of one prompt, how far the model's preferences are from a ranking
    (`evaluation.preference_metrics.transitivity`).

    Example:
    ```python
    args = GeneralPreferenceConfig("out", dim=6, temperature=0.1)
    trainer = GeneralPreferenceTrainer("google/gemma-2b-it", args=args, train_dataset=pairs)
    trainer.train()
    ```

    Reference: arXiv 2410.02197 and its released code.
    """

    config_class: ClassVar[type[ComparisonConfig]] = GeneralPreferenceConfig
    _name = "general preference modelling"
    _tag_names = ("prefopt", "general-preference-trainer")
    _paper = {  # noqa: RUF012
        "title": "Beyond Bradley-Terry Models: A General Preference Model for Language Model Alignment",
        "id": "2410.02197",
    }

    def head_settings(self, args: Any) -> tuple[type[HeadedModel], dict[str, Any]]:
        """See `HeadTrainer.head_settings`."""
        if args.loss_type == "bradley_terry":
            return RewardModel, {"pooling": args.pooling}
        kept = {"lm_head": True} if args.sft_coeff else {}
        return GeneralPreferenceModel, {
            "pooling": args.pooling,
            **{name: getattr(args, name) for name in _HEAD_FIELDS},
            **kept,
        }

    def make_collator(self, args: Any) -> ComparisonCollator:
        """See `HeadTrainer.make_collator`."""
        return _SequenceCollator() if args.sft_coeff else ComparisonCollator()

    @property
    def is_scalar(self) -> bool:
        """Bradley-Terry: one reward per response instead of an embedding."""
        return self.args.loss_type == "bradley_terry"

    @property
    def temperature(self) -> float:
        """Tau of P(i beats j) = sigmoid(s / tau)."""
        return self.args.temperature or 1.0 if self.is_scalar else self.headed.temperature

    def step_loss(self, model: Any, batch: dict[str, Any], sums: MetricSums) -> tuple[Tensor, Tensor]:
        """See `BaseTrainer.step_loss`; predictions are (B, 2): the logit of best over worst response, and 0."""
        values, scales, sequence_logps = self._forward(model, batch)
        scores = self._scores(values, scales, batch["better"], batch["worse"])  # (P,)
        margin = batch["margin"][batch["pair_rows"]] if "margin" in batch else None
        losses = general_preference_loss(scores, tau=self.temperature, margin=margin)
        real = batch["real"][batch["pair_rows"]]
        of_rows = losses.new_zeros(len(batch["real"])).index_add(0, batch["pair_rows"], losses)
        total = torch.where(real, losses, 0.0).sum()
        logits = scores.detach() / self.temperature
        self.record_pairs(total.detach(), logits, batch, sums)
        self._keep(values.detach(), scales, batch)
        loss = self.reduce_pairs(total, batch)
        if sequence_logps is not None:
            best_logps = sequence_logps[batch["best"]]
            of_rows = of_rows + best_logps
            loss = self._with_supervision(loss, best_logps, batch, sums)
        self.watch_finite(of_rows, batch, sums)
        return loss, self._best_over_worst(values.detach(), scales, batch)

    def _forward(self, model: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return embeddings (C, d) or rewards (C, 1), scales, and log-probabilities of sequences (C,)."""
        if self.is_scalar:
            return self.run_model(model, batch).logits, None, None
        inputs = {name: batch[name] for name in ("sft_index", "sft_targets", "sft_completions") if name in batch}
        output = self.run_model(model, batch, prompt_index=batch["prompt_index"], **inputs)
        return output.embeddings, output.scales, output.logps

    def _scores(self, values: Tensor, scales: Tensor | None, better: Tensor, worse: Tensor) -> Tensor:
        if self.is_scalar:
            return values[better, 0] - values[worse, 0]
        return general_preference_score(values[better], values[worse], None if scales is None else scales[better])

    def _with_supervision(self, loss: Tensor, logps: Tensor, batch: dict[str, Any], sums: MetricSums) -> Tensor:
        """Compute (1 - c) * loss + c * mean over the step's rows of -log sigmoid(beta * logps)."""
        coeff, real = self.args.sft_coeff, batch["real"]
        supervised = -torch.nn.functional.logsigmoid(self.args.sft_beta * logps)
        sums.add_mean("sft_loss", supervised, real)
        return (1 - coeff) * loss + coeff * self.reduce(torch.where(real, supervised, 0.0).sum(), batch)

    def _best_over_worst(self, values: Tensor, scales: Tensor | None, batch: dict[str, Any]) -> Tensor:
        numbers = as_table(torch.arange(len(values), device=values.device), batch)
        best, worst = best_and_worst(numbers, batch).unbind(1)
        logits = self._scores(values, None if scales is None else scales.detach(), best, worst) / self.temperature
        return torch.stack([logits, torch.zeros_like(logits)], dim=1)

    # ---- evaluation

    def _keep(self, values: Tensor, scales: Tensor | None, batch: dict[str, Any]) -> None:
        """Keep each row's table of logits, and the vectors that other rows of its prompt can be compared with."""
        if self._predictions_of_rows is None:
            return
        sizes = batch["mask"].sum(1).tolist()
        rows = values.split(sizes)
        gates = [None] * len(sizes) if scales is None else [gate[0] for gate in scales.detach().split(sizes)]
        tables = [self._table(row, gate) for row, gate in zip(rows, gates)]
        rewards = as_table(values[:, 0], batch) if self.is_scalar else None
        self.keep_predictions(tables, batch, rewards, vectors=list(zip(rows, gates)))

    def _table(self, values: Tensor, scales: Tensor | None) -> Tensor:
        if self.is_scalar:
            return (values - values.T) / self.temperature
        return preference_table(values, scales, temperature=self.temperature)

    def more_metrics(self, rows: list[RowPrediction], dataset: Dataset) -> dict[str, float]:
        """Measure how far the preferences among all responses of each prompt, over all rows, are from a ranking."""
        vectors = {row.row_id: row.vectors for row in rows}
        prompts: dict[tuple[int, ...], dict[tuple[int, ...], Tensor]] = {}
        gates: dict[tuple[int, ...], Tensor | None] = {}
        for row_id, prompt_ids, responses in zip(dataset["row_id"], dataset["prompt_ids"], dataset["response_ids"]):
            values, scales = vectors[row_id]
            gates[tuple(prompt_ids)] = scales
            known = prompts.setdefault(tuple(prompt_ids), {})
            known.update({tuple(ids): value for ids, value in zip(responses, values)})
        tables = (self._table(torch.stack(list(known.values())), gates[key]) for key, known in prompts.items())
        statistics = transitivity(table.double().numpy() for table in tables)
        return {f"transitivity/{name}": value for name, value in statistics.items()}
