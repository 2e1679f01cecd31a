"""What the trainers of models with heads of ours share: the model, its forward, and the evaluation of ranked pairs."""

from __future__ import annotations

import copy
from abc import abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed

from prefopt._trl import disable_dropout_in_model
from prefopt.evaluation.calibration import reliability_diagram
from prefopt.evaluation.preference_metrics import RowPrediction, preference_metrics
from prefopt.files import write_json
from prefopt.models.heads import ADAPTER_RECORD, HeadedModel
from prefopt.scoring.logprobs import attention_mask_of
from prefopt.trainers.base import BaseTrainer
from prefopt.trainers.comparison import ComparisonCollator, ComparisonConfig, ComparisonData, with_whole_margins
from prefopt.trainers.metrics import MetricSums
from prefopt.trainers.policy import add_adapter, base_model_of, load_model, load_tokenizer, with_pad_token


@dataclass
class HeadConfig(ComparisonConfig):
    """Settings of the trainers of models with heads of ours."""

    pooling: str | None = field(
        default=None,
        metadata={
            "help": "Where a new head reads: 'eos' (last token), 'last' (the token before a closing EOS), 'mean' or 'max' over all tokens. "
            "None: 'eos', or what a given reward model was trained with."
        },
    )
    calibration_bins: list[int] = field(
        default_factory=lambda: [10],
        metadata={"help": "Numbers of bins to compute calibration errors for; may be empty."},
    )
    reliability_diagram: bool = field(
        default=False, metadata={"help": "Draw a reliability diagram of each evaluated set into the output folder."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(bins < 1 for bins in self.calibration_bins):
            raise ValueError(f"`calibration_bins` must be positive, not {self.calibration_bins}.")
        if self.reliability_diagram and not self.calibration_bins:
            raise ValueError("`reliability_diagram` needs `calibration_bins`.")


class HeadTrainer(BaseTrainer):
    """Base of the reward and preference model trainers.

    Args:
        model: hub name or folder (of a causal LM, which gets a new head, or of a model with a trained one), or such a model in memory, or a
            `PeftModel` around a model with a head.
        args: the method's config; default: its defaults.
        train_dataset, eval_dataset: comparison rows in any form that `prefopt.data` reads (R >= 2 scored responses, or chosen and
            rejected, with `margin` if wanted), or tokenised ones; `eval_dataset` may be a dict of data sets.
        processing_class: the tokenizer; default: the one saved with the model.
        compute_metrics: called after an evaluation; `predictions` is (rows, 2), what the model gives the best and the worst response.
        callbacks, optimizers: as for `transformers.Trainer`.
        quantization_config: how to quantise a model that is loaded by name (QLoRA).
        peft_config: the adapter to train; the heads are trained in full beside it.

    Raises:
        ValueError: something in the arguments cannot work; the message says what and how to mend it.
    """

    config_class: type[HeadConfig] = HeadConfig
    metric_minima = ("min_reward",)
    metric_maxima = ("max_reward",)

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: HeadConfig | None = None,
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
            args = self.config_class("trainer_output")
        model_class, settings = self.head_settings(args)
        set_seed(args.seed)  # a new head's weights are drawn before Trainer sets it
        headed = load_headed(model, model_class, settings, args, quantization_config)
        processing_class = with_pad_token(processing_class or load_tokenizer(headed, args))
        self.data = ComparisonData(args, processing_class, self.check_rows)
        train_dataset = self.data.prepare(train_dataset, "train")
        eval_dataset = self.data.prepare(eval_dataset, "eval")
        if peft_config is not None:
            headed = add_adapter(headed, args, _with_heads(peft_config, headed))
        if args.disable_dropout:
            disable_dropout_in_model(headed)
        self._predictions_of_rows: list[RowPrediction] | None = None
        super().__init__(
            model=headed,
            args=args,
            collate=self.make_collator(args),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )

    # ---- what a method defines -------------------------------------------------------------------------------------------------

    @abstractmethod
    def head_settings(self, args: HeadConfig) -> tuple[type[HeadedModel], dict[str, Any]]:
        """The class of the model, and the settings of its head as `args` has them (None: the checkpoint's, else the default)."""

    @classmethod
    def check_data(cls, dataset: Dataset, args: HeadConfig, name: str) -> None:
        """See `BaseTrainer.check_data`."""
        cls.check_rows(with_whole_margins(dataset, name), args, name)

    @classmethod
    def check_rows(cls, dataset: Dataset, args: HeadConfig, name: str) -> None:
        """Refuse tokenised rows that this method cannot use; here adversarial ones, which would weigh as much as human ones."""
        adversarial = sum(dataset["is_adversarial"])
        if adversarial:
            raise ValueError(
                f"{adversarial} of {len(dataset)} rows of the {name} set are adversarial (`type: apo`) and would weigh as much as human "
                "comparisons here; use AdversarialRewardTrainer (`prefopt adversarial-reward-model`), or leave them out."
            )

    def make_collator(self, args: HeadConfig) -> ComparisonCollator:
        """What makes batches of rows."""
        return ComparisonCollator()

    # ---- the model -------------------------------------------------------------------------------------------------------------

    @property
    def headed(self) -> HeadedModel:
        """The model under any wrapper."""
        return base_model_of(self.accelerator.unwrap_model(self.model))

    def run_model(self, model, batch: dict[str, Any], **inputs: Tensor):
        """One forward over the batch's responses, through whatever wraps the model."""
        mask = attention_mask_of(model, batch, attn_implementation=self.attn_implementation, dtype=self.model.dtype)
        return model(
            input_ids=batch["input_ids"],
            attention_mask=mask,
            position_ids=batch["position_ids"],
            last_index=batch["last_index"],
            **inputs,
        )

    def why_not_packed(self) -> str | None:
        """Heads that read every token of a sequence need it in a row of its own."""
        pooling = self.headed.head_record["pooling"]
        return f"pooling {pooling!r} reads whole rows" if pooling in ("mean", "max") else None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model; beside an adapter also the head's record, which its folder has no config.json for."""
        super().save_model(output_dir, _internal_call)
        if isinstance(self.accelerator.unwrap_model(self.model), PeftModel) and self.is_world_process_zero():
            write_json(Path(output_dir or self.args.output_dir) / ADAPTER_RECORD, self.headed.head_record)

    # ---- losses and metrics ----------------------------------------------------------------------------------------------------

    def reduce_pairs(self, total: Tensor, batch: dict[str, Any]) -> Tensor:
        """A sum over this micro-batch's ranked pairs as its share of the mean over those of the whole optimizer step."""
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
        """In an evaluation, keep what the model says of each row.

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
        for row, is_real in enumerate(batch["real"].tolist()):
            if not is_real:
                continue
            there = masks[row]
            kept = None if vectors is None else tuple(None if each is None else each.cpu() for each in vectors[row])
            self._predictions_of_rows.append(
                RowPrediction(
                    row_id=batch["row_ids"][row],
                    ranks=ranks[row][there],
                    lengths=lengths[row][there],
                    logits=logits[row].float().cpu().numpy(),
                    rewards=None if scores is None else scores[row][there],
                    vectors=kept,
                )
            )

    def more_metrics(self, rows: list[RowPrediction], dataset: Dataset) -> dict[str, float]:
        """Further metrics of one evaluated set."""
        return {}

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Evaluate; a data set given here is tokenised like the one of the constructor."""
        if not isinstance(eval_dataset, str):
            eval_dataset = self.data.prepare(eval_dataset, metric_key_prefix)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        """Evaluate; adds the metrics of `evaluation.preference_metrics` over all ranks' rows."""
        self._predictions_of_rows = []
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        rows, self._predictions_of_rows = gather_object(self._predictions_of_rows), None
        rows.sort(key=lambda row: row.row_id)  # sums in one order, whatever the number of ranks
        metrics, errors = preference_metrics(rows, calibration_bins=self.args.calibration_bins)
        metrics |= self.more_metrics(rows, dataloader.dataset.dataset)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        if self.args.reliability_diagram and self.is_world_process_zero():
            name = metric_key_prefix.removeprefix("eval_")
            path = Path(self.args.output_dir) / f"reliability_{name.replace('/', '_')}.png"
            reliability_diagram(errors[self.args.calibration_bins[0]], path, title=name)
        return output


def load_headed(
    model: str | PreTrainedModel | PeftModel,
    model_class: type[HeadedModel],
    settings: dict[str, Any],
    args: HeadConfig,
    quantization_config: Any,
):
    """The model to train: loaded, taken as it is, or a new head on the backbone of a causal LM in memory.

    Raises:
        ValueError: settings that contradict a trained head; a `PeftModel` around another kind of model.
    """

    def load(path: str, **init: Any) -> HeadedModel:
        init.setdefault("dtype", "float32")  # master weights, as TRL's trainers load them
        return model_class.from_pretrained(path, new_head=True, **settings, **init)

    loaded = load_model(model, args, quantization_config, loader=load)
    base = base_model_of(loaded)
    if not isinstance(base, HeadedModel):
        if isinstance(loaded, PeftModel):
            raise ValueError(
                f"The adapter is around a {type(base).__name__}; wrap a {model_class.__name__} instead, or pass `peft_config`."
            )
        return model_class.from_module(base, **settings)
    if not isinstance(base, model_class):
        raise ValueError(
            f"`model` is a {type(base).__name__}; this trainer and its settings need a {model_class.__name__}."
        )
    for name, value in settings.items():
        if value is not None and base.head_record[name] != value:
            raise ValueError(
                f"`{name}={value!r}` contradicts the given model, which has {base.head_record[name]!r}; leave it out."
            )
    return loaded


def _with_heads(peft_config: PeftConfig, model: HeadedModel) -> PeftConfig:
    """The adapter's config with our heads trained in full, and without a task whose wrapper has a forward of its own."""
    peft_config = copy.deepcopy(peft_config)
    present = [name for name in model.head_names if getattr(model, name, None) is not None]
    peft_config.modules_to_save = sorted({*(peft_config.modules_to_save or []), *present})
    peft_config.task_type = None
    return peft_config


def best_and_worst(values: Tensor, batch: dict[str, Any]) -> Tensor:
    """(B, 2): the entries of (B, R) `values` at each row's best and worst response, the first of equals."""
    ranks, mask = batch["ranks"], batch["mask"]
    worst = ranks.masked_fill(~mask, torch.iinfo(ranks.dtype).max).argmin(1, keepdim=True)
    best = ranks.masked_fill(~mask, -1).argmax(1, keepdim=True)
    return torch.cat([values.gather(1, best), values.gather(1, worst)], dim=1)
