"""Reward models from scored responses: the base of all trainers of models with a head, and the scalar ones.

`RewardTrainer` ranks all pairs of a prompt's responses; `AdversarialRewardTrainer` weighs golden-against-sampled pairs
beside human ones.
"""

from __future__ import annotations

import copy
import functools
import math
from abc import abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import Tensor
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput

from prefopt.arguments import setting
from prefopt.evaluation.calibration import reliability_diagram
from prefopt.evaluation.preference_metrics import RowPrediction, preference_metrics
from prefopt.files import write_json
from prefopt.losses.reward import adversarial_reward_loss, bradley_terry_loss, ranked_pairs, ranking_loss
from prefopt.models.heads import ADAPTER_RECORD, HeadedModel
from prefopt.models.reward import RewardModel
from prefopt.scoring.logprobs import attention_mask_of
from prefopt.trainers.base import TRAINING
from prefopt.trainers.comparison import ComparisonConfig, ComparisonTrainer, as_table, ranked
from prefopt.trainers.metrics import MetricSums
from prefopt.trainers.policy import base_model_of, load_model


@dataclass
class HeadConfig(ComparisonConfig):
    """Settings of the trainers of reward and preference models."""

    pooling: str | None = setting(
        None,
        "Where a new head reads: 'eos' (last token), 'last' (the token before a closing EOS), 'mean' or 'max' over "
        "all tokens. None: 'eos', or what a given reward model was trained with.",
    )
    calibration_bins: list[int] = field(
        default_factory=lambda: [10],
        metadata={"help": "Numbers of bins to compute calibration errors for; may be empty."},
    )
    reliability_diagram: bool = setting(
        False, "Draw a reliability diagram of each evaluated set into the output folder."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(bins < 1 for bins in self.calibration_bins):
            raise ValueError(f"`calibration_bins` must be positive, not {self.calibration_bins}.")
        if self.reliability_diagram and not self.calibration_bins:
            raise ValueError("`reliability_diagram` needs `calibration_bins`.")


class HeadTrainer(ComparisonTrainer):
    """Base of the reward and preference model trainers.

    Arguments as for `ComparisonTrainer`, except that `model` may be a causal LM, which gets a new head, or a model
    with a trained one; an adapter trains the heads in full beside it. `compute_metrics` gets (rows, 2), the model's
    values of the best and the worst response.
    """

    config_class: ClassVar[type[ComparisonConfig]] = HeadConfig
    metric_minima = ("min_reward",)
    metric_maxima = ("max_reward",)
    _predictions_of_rows: list[RowPrediction] | None = None  # a list during an evaluation

    # ---- the model

    @abstractmethod
    def head_settings(self, args: Any) -> tuple[type[HeadedModel], dict[str, Any]]:
        """Return the model's class, and the head's settings in `args` (None: the checkpoint's, else the default)."""

    def load(self, model: Any, args: Any, quantization_config: Any) -> Any:
        """Load the model, or take it as it is, or put a new head on the backbone of a causal LM in memory.

        Raises:
            ValueError: settings that contradict a trained head; a `PeftModel` around another kind of model.
        """
        model_class, settings = self.head_settings(args)

        def from_path(path: str, **init: Any) -> HeadedModel:
            init.setdefault("dtype", "float32")  # master weights, as TRL's trainers load them
            return model_class.from_pretrained(path, new_head=True, **settings, **init)

        loaded = load_model(model, args, quantization_config, loader=from_path)
        base = base_model_of(loaded)
        if not isinstance(base, HeadedModel):
            if isinstance(loaded, PeftModel):
                raise ValueError(
                    f"The adapter is around a {type(base).__name__}; wrap a {model_class.__name__} instead, or pass "
                    "`peft_config`."
                )
            return model_class.from_module(base, **settings)
        if not isinstance(base, model_class):
            raise ValueError(
                f"`model` is a {type(base).__name__}; this trainer and its settings need a {model_class.__name__}."
            )
        for name, value in settings.items():
            if value is not None and (stored := base.head_record[name]) != value:
                raise ValueError(
                    f"`{name}={value!r}` contradicts the given model, which has {stored!r}; leave it out."
                )
        return loaded

    def check_text(self, model: Any, tokenizer: Any) -> None:
        """Record in the model how the training texts become ids; check every other data set against that.

        Raises:
            ValueError: strings beside messages, or either for a model that was trained on the other.
        """
        headed: Any = base_model_of(model)
        for name, report in self.data.reports.items():
            if report.form is not None:
                headed.record_text(tokenizer, report.form, where=f"The {name} set")

    def adapter_config(self, peft_config: PeftConfig, model: Any) -> PeftConfig:
        """Have the heads trained in full, and no task, as a task's wrapper would not run the head's forward."""
        changed: Any = copy.deepcopy(peft_config)
        present = [name for name in model.head_names if getattr(model, name, None) is not None]
        changed.modules_to_save = sorted({*(changed.modules_to_save or []), *present})
        changed.task_type = None
        return changed

    @classmethod
    def check_rows(cls, dataset: Dataset, args: Any, name: str) -> None:
        """Raise on adversarial rows, which would weigh as much as human ones."""
        adversarial = sum(dataset["is_adversarial"])
        if adversarial:
            raise ValueError(
                f"{adversarial} of {len(dataset)} rows of the {name} set are adversarial (`type: apo`) and would "
                "weigh as much as human comparisons here; use AdversarialRewardTrainer "
                "(`prefopt adversarial-reward-model`), or leave them out."
            )

    @property
    def headed(self) -> Any:
        """The model under any wrapper."""
        return base_model_of(self.accelerator.unwrap_model(self.model))

    def run_model(self, model: Any, batch: dict[str, Any], **inputs: Tensor) -> Any:
        """Run one forward over the batch's responses, through whatever wraps the model."""
        shared = {name: batch[name] for name in ("input_ids", "position_ids", "last_index")}
        return model(attention_mask=attention_mask_of(model, batch), **shared, **inputs)

    def why_not_packed(self) -> str | None:
        """Give each sequence a separate row for heads that read every token of it."""
        pooling = self.headed.head_record["pooling"]
        return f"pooling {pooling!r} reads whole rows" if pooling in ("mean", "max") else None

    def after_model_saved(self, folder: Path) -> None:
        """Save the head's record beside an adapter, whose folder has no config.json for it."""
        super().after_model_saved(folder)
        if isinstance(self.accelerator.unwrap_model(self.model), PeftModel) and self.is_world_process_zero():
            write_json(folder / ADAPTER_RECORD, self.headed.head_record)

    # ---- losses and metrics

    def reduce_pairs(self, total: Tensor, batch: dict[str, Any]) -> Tensor:
        """Scale a micro-batch sum over ranked pairs to the mean over the ranked pairs of the optimizer step."""
        return total * (self.args.world_size / batch["step_ranked_pairs"])

    def record_pairs(self, total: Tensor, pair_logits: Tensor, batch: dict[str, Any], sums: MetricSums) -> None:
        """Add loss and accuracy of the ranked pairs."""
        real = batch["real"][batch["pair_rows"]]
        sums.add_mean("accuracy", (pair_logits > 0).float(), real)
        sums.add_mean("margin", pair_logits, real)
        if not self.model.training:
            count = real.sum()
            sums.add_mean("loss", (total / count.clamp(min=1))[None], count[None])

    def keep_predictions(
        self,
        logits: list[Tensor],
        batch: dict[str, Any],
        rewards: Tensor | None = None,
        vectors: list[tuple[Tensor | None, ...]] | None = None,
    ) -> None:
        """Keep the model's predictions for each row, in an evaluation.

        Args:
            logits: for each row, (R, R) logits that response i beats j.
            batch: the batch.
            rewards: (B, R), where there is one score per response.
            vectors: for each row, tensors kept in `RowPrediction.vectors`.
        """
        if self._predictions_of_rows is None:
            return
        masks, ranks, lengths = (batch[name].cpu().numpy() for name in ("mask", "ranks", "lengths"))
        scores = None if rewards is None else rewards.float().cpu().numpy()
        for row, there in enumerate(masks):
            if batch["real"][row]:
                prediction = RowPrediction(
                    row_id=batch["row_ids"][row],
                    ranks=ranks[row][there],
                    lengths=lengths[row][there],
                    logits=logits[row].float().cpu().numpy(),
                    rewards=None if scores is None else scores[row][there],
                    vectors=vectors and tuple(None if each is None else each.cpu() for each in vectors[row]),
                )
                self._predictions_of_rows.append(prediction)

    def more_metrics(self, rows: list[RowPrediction], dataset: Dataset) -> dict[str, float]:
        """Return further metrics of one evaluated set."""
        return {}

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate; adds the metrics of `evaluation.preference_metrics` over all ranks' rows."""
        self._predictions_of_rows = []
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        rows, self._predictions_of_rows = gather_object(self._predictions_of_rows), None
        rows.sort(key=lambda row: row.row_id)  # sums in one order, whatever the number of ranks
        metrics, errors = preference_metrics(rows, calibration_bins=self.args.calibration_bins)
        planned: Any = dataloader.dataset
        metrics |= self.more_metrics(rows, planned.dataset)
        assert output.metrics is not None
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        if self.args.reliability_diagram and self.is_world_process_zero():
            name = metric_key_prefix.removeprefix("eval_")
            path = Path(self.args.output_dir) / f"reliability_{name.replace('/', '_')}.png"
            reliability_diagram(errors[self.args.calibration_bins[0]], path, title=name)
        return output


def best_and_worst(values: Tensor, batch: dict[str, Any]) -> Tensor:
    """Pick the entries (B, 2) of (B, R) `values` at each row's best and worst response, the first of equals."""
    ranks, mask = batch["ranks"], batch["mask"]
    worst = ranks.masked_fill(~mask, torch.iinfo(ranks.dtype).max).argmin(1, keepdim=True)
    best = ranks.masked_fill(~mask, -1).argmax(1, keepdim=True)
    return torch.cat([values.gather(1, best), values.gather(1, worst)], dim=1)


@dataclass
class RewardConfig(HeadConfig):
    """Settings of `RewardTrainer`: TRL's `RewardConfig`, batch layout, pooling, and what an evaluation reports."""


class RewardTrainer(HeadTrainer):
    """Reward model r(x, y): -log sigmoid(r(better) - r(worse)), the mean over all ranked pairs of the optimizer step.

    Rows have any number R >= 2 of scored responses; each response is computed once, and in packed rows its prompt once
    for all of them. Ties rank neither way. Rows of two responses may have a `margin` m:
    -log sigmoid(r(better) - r(worse) - m).

    Example:
    ```python
    trainer = RewardTrainer("Qwen/Qwen2.5-0.5B", args=RewardConfig("out"), train_dataset=dataset)
    trainer.train()
    ```

    Reference: arXiv 2203.02155 (all pairs of a prompt), as averaged in arXiv 2311.08045's released code.
    """

    config_class: ClassVar[type[ComparisonConfig]] = RewardConfig
    _name = "reward modelling"
    _tag_names = ("prefopt", "reward-trainer")
    _paper: dict[str, str] = {  # noqa: RUF012
        "title": "Training language models to follow instructions with human feedback",
        "id": "2203.02155",
    }

    def head_settings(self, args: Any) -> tuple[type[HeadedModel], dict[str, Any]]:
        """See `HeadTrainer.head_settings`."""
        return RewardModel, {"pooling": args.pooling}

    def step_loss(self, model: Any, batch: dict[str, Any], sums: MetricSums) -> tuple[Tensor, Tensor]:
        """See `BaseTrainer.step_loss`; predictions are the (B, 2) rewards of each row's best and worst response."""
        rewards = as_table(self.run_model(model, batch).logits[:, 0], batch)  # (B, R)
        # a row's loss is finite where its rewards and its margin are
        self.watch_finite(rewards.sum(1) + batch.get("margin", 0.0), batch, sums)
        mask = batch["mask"] & batch["real"][:, None]
        total = self.total_loss(rewards, mask, batch)
        self.record(total, rewards.detach(), mask, batch, sums)
        return self.reduce_pairs(total, batch), best_and_worst(rewards.detach(), batch)

    def total_loss(self, rewards: Tensor, mask: Tensor, batch: dict[str, Any]) -> Tensor:
        """Sum the loss over the batch's ranked pairs.

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


@dataclass
class AdversarialRewardConfig(RewardConfig):
    """Settings of `AdversarialRewardTrainer`."""

    adversarial_coeff: float = setting(
        0.1, "Weight of the adversarial pairs of one golden answer together (0.1 in the authors' recipe).", at_least=0
    )
    num_samples: int = setting(
        4, "Sampled answers per golden one; divides `adversarial_coeff` (4 in the authors' recipe).", at_least=1
    )
    human_coeff: float = setting(1.0, "Weight of a human pair; 0 leaves the human comparisons out.", at_least=0)
    adversarial_loss: str = setting(
        "logistic",
        "Form of the adversarial term: 'logistic' (ranking) or 'difference' (unbounded, WGAN-like).",
        choices=("logistic", "difference"),
    )


class AdversarialRewardTrainer(RewardTrainer):
    """Reward model against a policy: rows marked `type: apo` pair a golden with a sampled answer, others are human.

        L = human_coeff * L_rank(human) + adversarial_coeff / num_samples * L_kind(adversarial)

    Both terms divide by the number of ranked pairs of the whole optimizer step, human and adversarial together, so
    that the gradient is the same for any micro-batch size and any mixture within a micro-batch. `effective_ratio` says
    how much all adversarial pairs of the data weigh against all human ones; it is printed before training.

    Example:
    ```python
    rows = concatenate_datasets([human, adversarial])
    args = AdversarialRewardConfig("out", pooling="last")
    trainer = AdversarialRewardTrainer("base-reward-model", args=args, train_dataset=rows)
    trainer.train()
    ```

    Reference: arXiv 2311.08045, as computed by its released code.
    """

    config_class: ClassVar[type[ComparisonConfig]] = AdversarialRewardConfig
    _name = "adversarial preference optimization (reward model)"
    _tag_names = ("prefopt", "adversarial-reward-trainer")
    _paper = {  # noqa: RUF012
        "title": "Adversarial Preference Optimization: Enhancing Your Alignment via RM-LLM Game",
        "id": "2311.08045",
    }

    @classmethod
    def check_rows(cls, dataset: Dataset, args: Any, name: str) -> None:
        """Raise on margins, and on training rows that are all of one kind."""
        if "margin" in dataset.column_names:
            raise ValueError(
                f"The {name} set has margins, which the adversarial loss does not read; remove the column."
            )
        if name != TRAINING:
            return
        adversarial = sum(dataset["is_adversarial"])
        if not adversarial:
            raise ValueError(
                "No training row is adversarial (`type: apo`); train on human comparisons with RewardTrainer."
            )
        if adversarial == len(dataset) and args.human_coeff > 0:
            raise ValueError(
                "Every training row is adversarial; add human comparisons (without them the reward model degrades), "
                "or set `human_coeff: 0` if that is meant."
            )

    @functools.cached_property
    def effective_ratio(self) -> float:
        """The weight of all adversarial pairs of the training rows over that of all human ones."""
        human, adversarial = self._count_pairs()
        against = self.args.adversarial_coeff / self.args.num_samples * adversarial
        return against / (self.args.human_coeff * human) if human and self.args.human_coeff else math.inf

    def _count_pairs(self) -> tuple[int, int]:
        """Count the ranked pairs of the training rows: human and adversarial."""
        counts = {True: 0, False: 0}
        for scores, adversarial in zip(self.train_dataset["scores"], self.train_dataset["is_adversarial"]):
            counts[adversarial] += len(ranked(scores))
        return counts[False], counts[True]

    def get_train_dataloader(self) -> DataLoader:
        """Print how the two terms weigh; return the planned micro-batches of this rank."""
        if self.train_dataset is not None and self.is_world_process_zero():
            args, (human, adversarial) = self.args, self._count_pairs()
            print(
                f"{human} human pairs of weight {args.human_coeff:g}, {adversarial} adversarial pairs of weight "
                f"{args.adversarial_coeff / args.num_samples:g} ({args.adversarial_coeff:g} / {args.num_samples}): "
                f"adversarial to human = {self.effective_ratio:.3g}."
            )
        return super().get_train_dataloader()

    def total_loss(self, rewards: Tensor, mask: Tensor, batch: dict[str, Any]) -> Tensor:
        """See `RewardTrainer.total_loss`."""
        loss = adversarial_reward_loss(
            rewards,
            batch["ranks"],
            batch["is_adversarial"],
            adversarial_coeff=self.args.adversarial_coeff,
            num_samples=self.args.num_samples,
            human_coeff=self.args.human_coeff,
            mask=mask,
            kind=self.args.adversarial_loss,
        )
        return loss * ranked_pairs(batch["ranks"], mask).sum()

    def record(self, total: Tensor, rewards: Tensor, mask: Tensor, batch: dict[str, Any], sums: MetricSums) -> None:
        """Add the metrics of `RewardTrainer`, and accuracy and margin of each kind of pair."""
        super().record(total, rewards, mask, batch, sums)
        values = rewards.reshape(-1)[batch["slots"]]
        margins = values[batch["better"]] - values[batch["worse"]]
        real, adversarial = batch["real"][batch["pair_rows"]], batch["is_adversarial"][batch["pair_rows"]]
        for kind, chosen in (("human", ~adversarial), ("adversarial", adversarial)):
            sums.add_mean(f"accuracy/{kind}", (margins > 0).float(), real & chosen)
            sums.add_mean(f"margin/{kind}", margins, real & chosen)
        sums.add_mean("adversarial_fraction", adversarial.float(), real)
