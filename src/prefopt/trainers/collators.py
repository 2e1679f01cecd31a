"""From rows of the tokenised data set to the tensors of a micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset

from prefopt.scoring.layouts import Group, Layout
from prefopt.scoring.plan import GroupLengths, MicroBatch

PAIR_COLUMNS = (
    "chosen_win_prob",
    "rejected_win_prob",
    "chosen_over_rejected_prob",
    "chosen_score",
    "rejected_score",
    "margin",
    "chosen_bytes",
    "rejected_bytes",
)
REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps", "ref_chosen_counts", "ref_rejected_counts")


@dataclass(frozen=True)
class PairCollator:
    """Pairs to tensors: what the layout makes of chosen and rejected, and the columns that losses need.

    Beside the layout's keys a batch has `row_ids` (list of str), `real` (B,) bool (False: fills a micro-batch, weighs
    zero),
    `step_groups` and `step_first_tokens` (of the whole optimizer step), each of `PAIR_COLUMNS` that the data set has
    as (B,) float32, and
    each of `REFERENCE_COLUMNS` that it has as (K, B) float32. With `ld_alpha`, `score_weights` (S,) weighs the tokens
    of a completion
    beyond the shorter one's length.
    """

    ld_alpha: float | None = None

    def lengths(self, dataset: Dataset, *, share_prompt: bool) -> list[GroupLengths]:
        """Token counts of every pair of `dataset`, for the plan."""
        columns = (_lengths(dataset, f"{name}_ids") for name in ("prompt", "chosen", "rejected"))
        return [
            GroupLengths(
                packed=(p if share_prompt else 2 * p) + c + r, longest=p + max(c, r), completions=2, first_scored=c
            )
            for p, c, r in zip(*columns)
        ]

    def __call__(
        self, examples: Sequence[Mapping[str, Any]], micro_batch: MicroBatch, layout: Layout
    ) -> dict[str, Any]:
        """Collate `examples`, which are in the order of `micro_batch.indices`."""
        groups = [Group(e["prompt_ids"], (e["chosen_ids"], e["rejected_ids"])) for e in examples]
        batch: dict[str, Any] = layout.collate(in_rows(groups, micro_batch), row_length=micro_batch.row_length)
        batch |= step_columns(examples, micro_batch)
        batch |= _pair_columns(examples)
        if self.ld_alpha is not None:
            batch["score_weights"] = self._length_desensitised(groups)
        return batch

    def _length_desensitised(self, groups: Sequence[Group]) -> torch.Tensor:
        weights: list[float] = []
        for group in groups:
            shared = min(len(completion) for completion in group.completions)
            for completion in group.completions:
                weights += [1.0] * shared + [self.ld_alpha] * (len(completion) - shared)
        return torch.tensor(weights)


@dataclass(frozen=True)
class CustomCollator:
    """A user's collator in TRL's form (`input_ids`, `attention_mask`, `completion_mask`; chosen rows, then rejected), as a batch of ours."""

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
        mask = mask.bool()
        row, position = scored.bool().nonzero(as_tuple=True)
        length = input_ids.shape[1]
        first = scored.argmax(1)
        rows = torch.arange(2 * pairs)
        batch = {
            "input_ids": input_ids,
            "position_ids": (mask.cumsum(1) - 1).clamp_min(0),
            "attention_mask": mask,
            "token_weights": mask.float(),
            "score_index": row * length + position - 1,
            "score_targets": input_ids[row, position],
            "score_completions": row,
            "first_index": rows * length + first,
            "prompt_index": rows * length + first - 1,
            "last_index": rows * length + length - 1 - scored.flip(1).argmax(1),
        }
        return batch | step_columns(examples, micro_batch) | _pair_columns(examples)


def _pair_columns(examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    present = examples[0]
    columns = {
        name: torch.tensor([e[name] for e in examples], dtype=torch.float32)
        for name in PAIR_COLUMNS
        if name in present
    }
    for name in REFERENCE_COLUMNS:
        if name in present:
            values = torch.tensor([e[name] for e in examples], dtype=torch.float32)
            columns[name] = values.reshape(len(examples), -1).T
    return columns


def step_columns(examples: Sequence[Mapping[str, Any]], micro_batch: MicroBatch) -> dict[str, Any]:
    """What every batch says of its rows and of its optimizer step."""
    return {
        "row_ids": [str(e.get("row_id", index)) for e, index in zip(examples, micro_batch.indices)],
        "real": torch.full((len(examples),), not micro_batch.is_filler),
        "step_groups": micro_batch.step_groups,
        "step_first_tokens": micro_batch.step_first_tokens,
        "step_ranked_pairs": micro_batch.step_ranked_pairs,
    }


def in_rows(groups: Sequence[Group], micro_batch: MicroBatch) -> list[list[Group]]:
    """The groups, in the order of `micro_batch.indices`, row by row."""
    taken = iter(groups)
    return [[next(taken) for _ in row] for row in micro_batch.rows]


def _lengths(dataset: Dataset, column: str) -> list[int]:
    return [len(ids) for ids in dataset[column]]


class PlannedBatches(torch.utils.data.Dataset):
    """A data set whose items are whole micro-batches: `self[micro_batch]` is its collated batch."""

    def __init__(self, dataset: Dataset, collate: Callable[..., dict[str, Any]], layout: Layout) -> None:
        self.dataset = dataset
        self.collate = collate
        self.layout = layout

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, micro_batch: MicroBatch) -> dict[str, Any]:
        indices = micro_batch.indices
        columns = self.dataset[indices]
        examples = [{name: values[i] for name, values in columns.items()} for i in range(len(indices))]
        return self.collate(examples, micro_batch, self.layout)


def only(batches: list[dict[str, Any]]) -> dict[str, Any]:
    """The one batch of a data loader's list."""
    (batch,) = batches
    return batch
