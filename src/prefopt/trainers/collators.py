"""From rows of the tokenised data set to the tensors of a micro-batch.

Letters: B pairs of a micro-batch, T tokens of a padded row, S scored tokens, K references.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch.utils.data import DataLoader

from prefopt.data.rows import METHOD_COLUMNS, REFERENCE_COLUMNS
from prefopt.scoring.layouts import Group, Layout
from prefopt.scoring.plan import BatchPlan, GroupLengths, MicroBatch

PAIR_COLUMNS = (*METHOD_COLUMNS, "chosen_bytes", "rejected_bytes")


def token_counts(dataset: Dataset, columns: Sequence[str]) -> list[list[int]]:
    """Count the token ids of every row in each of these columns, without a Python number for each id."""
    counts: list[list[int]] = [[] for _ in columns]
    for table in dataset.select_columns(list(columns)).with_format("arrow").iter(batch_size=10_000):
        for found, name in zip(counts, columns):
            found.extend(pc.list_value_length(table[name]).to_pylist())
    return counts


@dataclass(frozen=True)
class PairCollator:
    """Collates pairs: chosen and rejected in the given layout, and the columns that losses read.

    Beside the layout's keys and those of `step_columns`, a batch has each of `PAIR_COLUMNS` that the data set has as
    (B,) float32, and each of `REFERENCE_COLUMNS` that it has as (K, B) float32. With `ld_alpha`, `score_weights` (S,)
    weighs the tokens of a completion beyond the shorter one's length.
    """

    ld_alpha: float | None = None

    def lengths(self, dataset: Dataset, *, share_prompt: bool) -> list[GroupLengths]:
        """Count the tokens of every pair of `dataset`, for the plan."""
        columns = token_counts(dataset, ("prompt_ids", "chosen_ids", "rejected_ids"))
        skipped = dataset["chosen_skipped"] if "chosen_skipped" in dataset.column_names else repeat(())
        return [
            GroupLengths(
                packed=(p if share_prompt else 2 * p) + c + r,
                longest=p + max(c, r),
                completions=2,
                first_scored=c - sum(end - begin for begin, end in ranges),
            )
            for p, c, r, ranges in zip(*columns, skipped)
        ]

    def __call__(
        self, examples: Sequence[Mapping[str, Any]], micro_batch: MicroBatch, layout: Layout
    ) -> dict[str, Any]:
        """Collate `examples`, which are in the order of `micro_batch.indices`."""
        groups = [Group.of_pair(example) for example in examples]
        batch: dict[str, Any] = layout.collate(in_rows(groups, micro_batch))
        if self.ld_alpha is not None:
            batch["score_weights"] = _length_desensitised(groups, self.ld_alpha)
        return batch | step_columns(examples, micro_batch) | _pair_columns(examples)


@dataclass(frozen=True)
class CustomCollator:
    """Turns the batches of a user's collator in TRL's form into batches of the padded layout.

    TRL's form is `input_ids`, `attention_mask` and `completion_mask`, (2B, T) each: chosen rows, then rejected ones.
    """

    collate: Callable[[list[Mapping[str, Any]]], Mapping[str, torch.Tensor]]

    def lengths(self, dataset: Dataset, *, share_prompt: bool) -> list[GroupLengths]:
        """See `PairCollator.lengths`."""
        return PairCollator().lengths(dataset, share_prompt=share_prompt)

    def __call__(
        self, examples: Sequence[Mapping[str, Any]], micro_batch: MicroBatch, layout: Layout
    ) -> dict[str, Any]:
        """Collate `examples` with the user's function; the layout is always the padded one."""
        made = self.collate(list(examples))
        if missing := {"input_ids", "attention_mask", "completion_mask"} - set(made):
            raise ValueError(f"`data_collator` must return {', '.join(sorted(missing))} as TRL's does.")
        # pairs are neighbours here, halves in TRL's batches
        pairs = len(examples)
        order = torch.arange(2 * pairs).reshape(2, pairs).T.flatten()
        input_ids, mask, scored = (made[name][order] for name in ("input_ids", "attention_mask", "completion_mask"))
        mask, scored = mask.bool(), scored.clone()
        skipped = [ranges for example in examples for ranges in Group.of_pair(example).skipped or ((), ())]
        for number, (begin, ranges) in enumerate(zip(scored.long().argmax(1).tolist(), skipped)):
            for start, stop in ranges:  # a collator that cuts keeps the beginning, as TRL's does
                scored[number, begin + start : begin + stop] = 0
        row, position = scored.bool().nonzero(as_tuple=True)
        length = input_ids.shape[1]
        # positions in the flattened (2B * T) outputs; a token is predicted from the one before it
        begins = torch.arange(2 * pairs) * length
        first = begins + scored.argmax(1)
        batch = {
            "input_ids": input_ids,
            "position_ids": (mask.cumsum(1) - 1).clamp_min(0),
            "attention_mask": mask,
            "token_weights": mask.float(),
            "score_index": row * length + position - 1,
            "score_targets": input_ids[row, position],
            "score_completions": row,
            "first_index": first,
            "prompt_index": first - 1,
            "last_index": begins + length - 1 - scored.flip(1).argmax(1),
        }
        return batch | step_columns(examples, micro_batch) | _pair_columns(examples)


def _length_desensitised(groups: Sequence[Group], alpha: float) -> torch.Tensor:
    """Weigh the scored tokens (S,): 1 up to the length of a group's shorter completion, `alpha` beyond it."""
    weights: list[float] = []
    for group in groups:
        shared = min(map(len, group.scored))
        for places in group.scored:
            weights += [1.0] * shared + [alpha] * (len(places) - shared)
    return torch.tensor(weights)


def _pair_columns(examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    columns = {}
    for name in (*PAIR_COLUMNS, *REFERENCE_COLUMNS):
        if name in examples[0]:
            values = torch.tensor([e[name] for e in examples], dtype=torch.float32)
            columns[name] = values.reshape(len(examples), -1).T if name in REFERENCE_COLUMNS else values
    return columns


def step_columns(examples: Sequence[Mapping[str, Any]], micro_batch: MicroBatch) -> dict[str, Any]:
    """Return what the trainer reads of every batch, beside the tensors that the model reads.

    Returns:
        `row_ids` (list of str), `real` (B,) bool (False: the example fills a micro-batch that has none, and weighs
        zero), and of the whole optimizer step `step_groups`, `step_first_tokens` and `step_ranked_pairs`, which losses
        are divided by.
    """
    return {
        "row_ids": [str(e.get("row_id", index)) for e, index in zip(examples, micro_batch.indices)],
        "real": torch.full((len(examples),), not micro_batch.is_filler),
        "step_groups": micro_batch.step_groups,
        "step_first_tokens": micro_batch.step_first_tokens,
        "step_ranked_pairs": micro_batch.step_ranked_pairs,
    }


def in_rows(groups: Sequence[Group], micro_batch: MicroBatch) -> list[list[Group]]:
    """Divide the groups, in the order of `micro_batch.indices`, into its rows."""
    taken = iter(groups)
    return [[next(taken) for _ in row] for row in micro_batch.rows]


class PlannedBatches(torch.utils.data.Dataset):
    """A data set whose items are whole micro-batches: `self[micro_batch]` is its collated batch."""

    def __init__(self, dataset: Dataset, collate: Callable[..., dict[str, Any]], layout: Layout) -> None:
        self.dataset = dataset
        self.collate = collate
        self.layout = layout

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, micro_batch: MicroBatch) -> dict[str, Any]:
        columns = self.dataset[micro_batch.indices]
        examples = [dict(zip(columns, values)) for values in zip(*columns.values())]
        return self.collate(examples, micro_batch, self.layout)


class PlannedLoader(DataLoader):
    """Data loader that passes its epoch on to its plan.

    The Trainer calls `set_epoch` of the loader and of a sampler that wraps another, but not of a plain batch sampler.
    """

    batch_sampler: BatchPlan

    def set_epoch(self, epoch: int) -> None:
        """Have the plan draw the order of `epoch`."""
        self.batch_sampler.set_epoch(epoch)

    def use_layout(self, layout: Layout) -> None:
        """Lay out batches in another way; call it before the first one."""
        dataset: Any = self.dataset
        dataset.layout = layout
        if layout.name == "padded":
            self.batch_sampler.max_tokens_per_row = None
