"""The spine of trainers on scored responses: a prompt, R >= 2 responses with scores, and which is better than which.

Letters: B rows, R responses of the longest row of a batch, C responses of the batch in row order, P ranked pairs.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed
from transformers.trainer_utils import EvalPrediction
from trl import RewardConfig as TRLRewardConfig  # type: ignore[attr-defined]

from prefopt._trl import disable_dropout_in_model
from prefopt.arguments import setting
from prefopt.data.encoding import with_pad_token
from prefopt.data.tokenization import TokenizationReport, tokenize_comparisons
from prefopt.progress import library_bars
from prefopt.scoring.layouts import Group, Layout
from prefopt.scoring.plan import GroupLengths, MicroBatch
from prefopt.trainers.base import EVALUATION, TRAINING, BaseTrainer, evaluated
from prefopt.trainers.collators import in_rows, step_columns
from prefopt.trainers.config import BatchConfig, before_transformers, check_unset
from prefopt.trainers.data_tables import show_report
from prefopt.trainers.policy import add_adapter, check_trainable, load_tokenizer

# TRL settings that would change a result here and have no counterpart: field, value that means "off", what to do
_REFUSED = (
    ("center_rewards_coefficient", None, "Rewards are not centred here."),
    ("activation_offloading", False, "Use `checkpointing` to save activation memory."),
    ("chat_template_path", None, "Set the tokenizer's `chat_template`."),
    ("eos_token", None, "Set the tokenizer's `eos_token`."),
    ("pad_token", None, "Set the tokenizer's `pad_token`."),
)


@dataclass
class ComparisonConfig(BatchConfig, TRLRewardConfig):  # type: ignore[misc]  # liger_kernel_config
    """Settings that all trainers on scored responses share: TRL's `RewardConfig`, and how batches are laid out.

    `center_rewards_coefficient`, `activation_offloading`, `chat_template_path`, `eos_token` and `pad_token` raise
    when set.
    """

    truncation_mode: str = setting(
        "keep_end", "What a row longer than `max_length` keeps: 'keep_end' (a head reads the end) or 'keep_start'."
    )

    def __post_init__(self) -> None:
        before_transformers(self)
        super().__post_init__()
        self.check_batching()
        check_unset(self, _REFUSED)


@dataclass(frozen=True)
class ComparisonCollator:
    """Turns comparison rows into the tensors of a batch.

    Beside the layout's keys and those of `step_columns`, a batch has:

    - `ranks` (B, R) long: 0 for the lowest score of a row, equal for equal scores;
    - `mask` (B, R) bool: a response is there;
    - `slots` (C,) long: place of each response in the flattened (B, R) table;
    - `better`, `worse`, `pair_rows` (P,) long: for each ranked pair, the two responses and their row;
    - `best` (B,) long: each row's best response, the first of equals;
    - `lengths` (B, R) long: tokens of each response;
    - `is_adversarial` (B,) bool, and `margin` (B,) float32 where the data has it.
    """

    def lengths(self, dataset: Dataset, *, share_prompt: bool) -> list[GroupLengths]:
        """Count the tokens and ranked pairs of every row of `dataset`, for the plan."""
        counts = []
        for prompt, responses, scores in zip(dataset["prompt_ids"], dataset["response_ids"], dataset["scores"]):
            sizes = [len(response) for response in responses]
            copies = 1 if share_prompt else len(responses)
            counts.append(
                GroupLengths(
                    packed=copies * len(prompt) + sum(sizes),
                    longest=len(prompt) + max(sizes),
                    completions=len(responses),
                    first_scored=sizes[scores.index(max(scores))],
                    ranked_pairs=len(ranked(scores)),
                )
            )
        return counts

    def __call__(
        self, examples: Sequence[Mapping[str, Any]], micro_batch: MicroBatch, layout: Layout
    ) -> dict[str, Any]:
        """Collate `examples`, which are in the order of `micro_batch.indices`."""
        groups = [Group(e["prompt_ids"], e["response_ids"]) for e in examples]
        batch: dict[str, Any] = layout.collate(in_rows(groups, micro_batch))
        batch |= step_columns(examples, micro_batch)
        scores = [e["scores"] for e in examples]
        width = max(map(len, scores))
        levels = [[sorted(set(row)).index(score) for score in row] for row in scores]
        starts = [sum(map(len, scores[:number])) for number in range(len(scores))]
        pairs = [
            (number, start + i, start + j)
            for number, (start, row) in enumerate(zip(starts, scores))
            for i, j in ranked(row)
        ]

        def table(rows: Sequence[Sequence[Any]], filler: Any) -> Tensor:
            return torch.tensor([[*row, *[filler] * (width - len(row))] for row in rows])

        batch |= {
            "ranks": table(levels, 0),
            "mask": table([[True] * len(row) for row in scores], False),
            "slots": torch.tensor([number * width + r for number, row in enumerate(scores) for r in range(len(row))]),
            "pair_rows": torch.tensor([number for number, _, _ in pairs]),
            "better": torch.tensor([better for _, better, _ in pairs]),
            "worse": torch.tensor([worse for _, _, worse in pairs]),
            "best": torch.tensor([start + row.index(max(row)) for start, row in zip(starts, levels)]),
            "lengths": table([[len(ids) for ids in e["response_ids"]] for e in examples], 0),
            "is_adversarial": torch.tensor([bool(e["is_adversarial"]) for e in examples]),
        }
        if "margin" in examples[0]:
            batch["margin"] = torch.tensor([e["margin"] for e in examples], dtype=torch.float32)
        return batch


def ranked(scores: Sequence[float]) -> list[tuple[int, int]]:
    """Return all (better, worse) pairs of one row's responses."""
    return [(i, j) for i, first in enumerate(scores) for j, second in enumerate(scores) if first > second]


def as_table(values: Tensor, batch: dict[str, Any]) -> Tensor:
    """Spread one value per response (C,) over a (B, R) table, 0 where a row has fewer responses."""
    ranks = batch["ranks"]
    return values.new_zeros(ranks.numel()).index_copy(0, batch["slots"], values).reshape(ranks.shape)


class ComparisonData:
    """Turns the data sets that a trainer is given into tokenised comparisons, as its config says.

    Args:
        args: the trainer's config.
        tokenizer: the tokenizer.
        check: called with every tokenised data set, `args` and its name; raises on rows that the method cannot use.
    """

    def __init__(self, args: ComparisonConfig, tokenizer: Any, check: Callable[[Dataset, Any, str], None]) -> None:
        self.args = args
        self.tokenizer = tokenizer
        self.check = check
        self.reports: dict[str, TokenizationReport] = {}
        self.given: dict[str, Dataset] = {}
        self._made: list[Any] = []

    def prepare(self, dataset: Any, name: str) -> Any:
        """Tokenise a data set or a dict of them. None and what an earlier call returned are returned unchanged."""
        if dataset is None or any(dataset is made for made in self._made):
            return dataset
        if isinstance(dataset, dict):
            prepared: Any = {key: self.prepare(each, evaluated(key)) for key, each in dataset.items()}
        else:
            self.given[name] = dataset
            prepared, self.reports[name] = tokenize_comparisons(
                dataset,
                self.tokenizer,
                max_length=self.args.max_length,
                max_prompt_length=self.args.max_prompt_length,
                truncation_mode=self.args.truncation_mode,
                on_bad_row=self.args.on_bad_row,  # type: ignore[arg-type]  # checked by the config
                num_proc=self.args.dataset_num_proc,
                name=name,
            )
            show_report(self.reports[name], self.args.max_length)
            prepared = with_whole_margins(prepared, name)
            self.check(prepared, self.args, name)
        self._made.append(prepared)
        return prepared


def with_whole_margins(dataset: Dataset, name: str) -> Dataset:
    """Return the data set, without its margins where no row has one.

    Raises:
        ValueError: only some rows have a margin, or rows of more than two responses have one.
    """
    if "margin" not in dataset.column_names:
        return dataset
    missing = sum(margin is None for margin in dataset["margin"])
    if missing == len(dataset):
        return dataset.remove_columns("margin")
    if missing:
        raise ValueError(
            f"{missing} of {len(dataset)} rows of the {name} set have no margin; give all of them one, or none."
        )
    if any(len(scores) != 2 for scores in dataset["scores"]):
        raise ValueError(
            f"The {name} set has margins and rows of more than two responses; a margin belongs to one pair."
        )
    return dataset


class ComparisonTrainer(BaseTrainer):
    """Base of the trainers on scored responses.

    Args:
        model: hub name or folder, a model in memory, or a `PeftModel`.
        args: the method's config; default: its defaults.
        train_dataset: comparison rows in any form that `prefopt.data` reads (R >= 2 scored responses, or chosen and
            rejected, with `margin` if wanted), or tokenised ones.
        eval_dataset: the same, or a dict of data sets.
        processing_class: the tokenizer; default: the one saved with the model.
        compute_metrics: called after an evaluation with the predictions of `step_loss`.
        callbacks: as for `transformers.Trainer`.
        optimizers: as for `transformers.Trainer`.
        quantization_config: how to quantise a model that is loaded by name (QLoRA).
        peft_config: the adapter to train.

    Raises:
        ValueError: something in the arguments cannot work; the message says what and how to fix it.
    """

    args: Any
    model: Any
    train_dataset: Any
    config_class: ClassVar[type[ComparisonConfig]] = ComparisonConfig

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: Any = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: PeftConfig | None = None,
    ) -> None:
        if model is None:
            raise ValueError("`model` is None: give a hub name, a folder, or a model in memory.")
        args = args if args is not None else self.config_class("trainer_output")
        set_seed(args.seed)  # the weights of a new head or adapter are drawn before Trainer sets it
        with library_bars(shown=not args.disable_tqdm):
            loaded = self.load(model, args, quantization_config)
            processing_class = with_pad_token(processing_class or load_tokenizer(loaded, args))
            self.data = ComparisonData(args, processing_class, self.check_rows)
            self.tokenization_reports, self.given_datasets = self.data.reports, self.data.given
            train_dataset = self.data.prepare(train_dataset, TRAINING)
            eval_dataset = self.data.prepare(eval_dataset, EVALUATION)
            self.check_text(loaded, processing_class)
            if peft_config is not None:
                loaded = add_adapter(loaded, args, self.adapter_config(peft_config, loaded))
        check_trainable(loaded)
        if args.disable_dropout:
            disable_dropout_in_model(loaded)
        super().__init__(
            model=loaded,
            args=args,
            collate=self.make_collator(args),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )

    @abstractmethod
    def load(self, model: Any, args: Any, quantization_config: Any) -> Any:
        """Return the model to train, before any new adapter."""

    def check_text(self, model: Any, tokenizer: Any) -> None:
        """Check that all data sets so far are read as the model reads texts; here nothing is known of that."""

    def adapter_config(self, peft_config: PeftConfig, model: Any) -> PeftConfig:
        """Return the config of the adapter that is put around the model; here as it was given."""
        return peft_config

    def make_collator(self, args: Any) -> ComparisonCollator:
        """Return the collator of rows."""
        return ComparisonCollator()

    @classmethod
    @abstractmethod
    def check_rows(cls, dataset: Dataset, args: Any, name: str) -> None:
        """Raise a ValueError on tokenised rows that this method cannot use."""

    @classmethod
    def check_data(cls, dataset: Dataset, args: Any, name: str) -> None:
        """See `BaseTrainer.check_data`."""
        cls.check_rows(with_whole_margins(dataset, name), args, name)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate; a data set given here is tokenised like the one of the constructor."""
        if not isinstance(eval_dataset, str):
            with library_bars(shown=not self.args.disable_tqdm):
                eval_dataset = self.data.prepare(eval_dataset, evaluated(metric_key_prefix))
            self.check_text(self.accelerator.unwrap_model(self.model), self.processing_class)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
