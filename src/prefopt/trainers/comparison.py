"""Comparisons as batches: a prompt, R >= 2 responses with scores, and which response of a row is better than which.

Letters: B rows, R responses of the longest row of a batch, C responses of the batch in row order, P ranked pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from trl import RewardConfig as TRLRewardConfig

from prefopt.data.tokenization import TokenizationReport, tokenize_comparisons
from prefopt.scoring.layouts import Group, Layout
from prefopt.scoring.plan import GroupLengths, MicroBatch
from prefopt.trainers.collators import in_rows, step_columns
from prefopt.trainers.config import BatchConfig, check_unset, choose_precision

# TRL settings that would change a result here and have no counterpart: (field, value that means "off", what to do
# instead)
_REFUSED = (
    ("center_rewards_coefficient", None, "Rewards are not centred here."),
    ("activation_offloading", False, "Use `gradient_checkpointing` to save activation memory."),
    ("chat_template_path", None, "Set the tokenizer's `chat_template`."),
    ("eos_token", None, "Set the tokenizer's `eos_token`."),
    ("pad_token", None, "Set the tokenizer's `pad_token`."),
)


@dataclass
class ComparisonConfig(BatchConfig, TRLRewardConfig):
    """Settings that all trainers on scored responses share: TRL's `RewardConfig`, and how batches are laid out.

    `center_rewards_coefficient`, `activation_offloading`, `chat_template_path`, `eos_token` and `pad_token` are
    refused when set.
    """

    truncation_mode: str = field(
        default="keep_end",
        metadata={
            "help": "What a row longer than `max_length` keeps: 'keep_end' (a head reads the end) or 'keep_start'."
        },
    )

    def __post_init__(self) -> None:
        choose_precision(self)
        super().__post_init__()
        self.check_batching()
        check_unset(self, _REFUSED)


@dataclass(frozen=True)
class ComparisonCollator:
    """Comparison rows to tensors: what the layout makes of prompt and responses, and how the responses of each row rank.

    Beside the layout's keys and those of `step_columns`, a batch has `ranks` (B, R) long (0 for the lowest score of a
    row, equal for equal
    scores), `mask` (B, R) bool (a response is there), `slots` (C,) long (place of each response in the flattened (B,
    R) table), `better`,
    `worse`, `pair_rows` (P,) long (for each ranked pair, the two responses and their row), `best` (B,) long (each
    row's best response,
    the first of equals), `lengths` (B, R) long (tokens of each response), `is_adversarial` (B,) bool, and `margin`
    (B,) float32 where the data has it.
    """

    def lengths(self, dataset: Dataset, *, share_prompt: bool) -> list[GroupLengths]:
        """Token counts and ranked pairs of every row of `dataset`, for the plan."""
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
        width = max(len(e["scores"]) for e in examples)
        levels = [[sorted(set(e["scores"])).index(score) for score in e["scores"]] for e in examples]
        starts = [sum(len(e["scores"]) for e in examples[:row]) for row in range(len(examples))]
        pairs = [
            (row, starts[row] + i, starts[row] + j) for row, e in enumerate(examples) for i, j in ranked(e["scores"])
        ]
        batch |= {
            "ranks": torch.tensor([row + [0] * (width - len(row)) for row in levels]),
            "mask": torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in levels]),
            "slots": torch.tensor(
                [row * width + r for row, e in enumerate(examples) for r in range(len(e["scores"]))]
            ),
            "pair_rows": torch.tensor([row for row, _, _ in pairs]),
            "better": torch.tensor([better for _, better, _ in pairs]),
            "worse": torch.tensor([worse for _, _, worse in pairs]),
            "best": torch.tensor([start + row.index(max(row)) for start, row in zip(starts, levels)]),
            "lengths": torch.tensor(
                [[len(ids) for ids in e["response_ids"]] + [0] * (width - len(e["scores"])) for e in examples]
            ),
            "is_adversarial": torch.tensor([bool(e["is_adversarial"]) for e in examples]),
        }
        if "margin" in examples[0]:
            batch["margin"] = torch.tensor([e["margin"] for e in examples], dtype=torch.float32)
        return batch


def ranked(scores: Sequence[float]) -> list[tuple[int, int]]:
    """All (better, worse) pairs of one row's responses."""
    return [(i, j) for i, first in enumerate(scores) for j, second in enumerate(scores) if first > second]


def as_table(values: Tensor, batch: dict[str, Any]) -> Tensor:
    """One value per response (C,) as a (B, R) table, 0 where a row has fewer responses."""
    ranks = batch["ranks"]
    return values.new_zeros(ranks.numel()).index_copy(0, batch["slots"], values).reshape(ranks.shape)


class ComparisonData:
    """Turns the data sets that a trainer is given into tokenised comparisons, as its config says.

    Args:
        args: the trainer's config.
        tokenizer: the tokenizer.
        check: called with every tokenised data set, `args` and its name, to refuse rows that the method cannot use.
    """

    def __init__(self, args: ComparisonConfig, tokenizer: Any, check: Callable[[Dataset, Any, str], None]) -> None:
        self.args = args
        self.tokenizer = tokenizer
        self.check = check
        self.reports: dict[str, TokenizationReport] = {}
        self._made: list[Any] = []

    def prepare(self, dataset: Any, name: str) -> Any:
        """Tokenised rows of a data set, of each of a dict of them, or None; what was made here before stays as it is."""
        if dataset is None or any(dataset is made for made in self._made):
            return dataset
        if isinstance(dataset, dict):
            prepared: Any = {key: self.prepare(each, key) for key, each in dataset.items()}
        else:
            prepared, self.reports[name] = tokenize_comparisons(
                dataset,
                self.tokenizer,
                max_length=self.args.max_length,
                max_prompt_length=self.args.max_prompt_length,
                truncation_mode=self.args.truncation_mode,
                on_bad_row=self.args.on_bad_row,
                num_proc=self.args.dataset_num_proc,
                name=name,
            )
            prepared = with_whole_margins(prepared, name)
            self.check(prepared, self.args, name)
        self._made.append(prepared)
        return prepared


def with_whole_margins(dataset: Dataset, name: str) -> Dataset:
    """The data set, without its margins where no row has one."""
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
