"""Batch layouts: how groups (a prompt and its completions) become rows of tokens.

Two layouts share one small interface, `collate(rows) -> dict of tensors`, where `rows` lists the groups that share a
row:

- `PaddedLayout`: every completion has its own row, prompt repeated before it, padded on the right to a common
  length.
- `PackedLayout`: the groups of a row stand one after the other, each as prompt, completion 0, completion 1, ...; every
  completion restarts its positions after the prompt, and `scoring.attention` keeps it from seeing any other completion
  or group.

The scoring forward and pooling heads use only the keys documented at `Layout.collate`, so nothing after this module
knows which layout made a batch.

Letters: N rows, T tokens of a row, C completions of the batch (in group order), S scored tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from transformers import PretrainedConfig

from prefopt._transformers import attention_of
from prefopt.scoring.attention import why_not_packed


@dataclass(frozen=True)
class Group:
    """A prompt and the completions that share it, as token ids; a preference pair has two, chosen first."""

    prompt: Sequence[int]
    completions: Sequence[Sequence[int]]

    @property
    def shared_length(self) -> int:
        """Tokens of the group with the prompt counted once."""
        return len(self.prompt) + sum(len(completion) for completion in self.completions)


class Layout(Protocol):
    """Turns groups into tensors; see the module's docstring."""

    @property
    def name(self) -> str:
        """Return "padded" or "packed"."""
        ...

    def collate(self, rows: Sequence[Sequence[Group]], *, row_length: int | None = None) -> dict[str, torch.Tensor]:
        """Return the tensors for one forward pass over the groups of `rows`.

        Args:
            rows: for each row, the groups that it holds (the padded layout ignores the division into rows).
            row_length: pad rows to this many tokens; default: the longest row.

        Returns:
            - `input_ids`, `position_ids` (N, T) long;
            - `attention_mask` (N, T) bool, padded layout; `group_ids` and `branch_ids` (N, T) int, packed layout
              (group -1: padding; branch 0: prompt, r + 1: completion r);
            - `token_weights` (N, T) float: in how many completions' sequences a token stands (0 for padding);
            - `score_index` (S,) long: position in the flattened (N*T) outputs that predicts the scored token
            `score_targets` (S,);
            - `score_completions` (S,) long: the completion that owns it, 0..C-1;
            - `first_index`, `last_index` (C,) long: flattened positions of each completion's first and last token;
            - `prompt_index` (C,) long: flattened position of the last prompt token before each completion.
        """
        ...


class _Rows:
    """Lists that grow while groups are laid out, and become the tensors of `Layout.collate`."""

    def __init__(self) -> None:
        self.input_ids: list[list[int]] = []
        self.position_ids: list[list[int]] = []
        self.group_ids: list[list[int]] = []
        self.branch_ids: list[list[int]] = []
        self.weights: list[list[int]] = []
        # (row, position) pairs stay unflattened until T is known
        self.score: list[tuple[int, int, int, int]] = []  # row, predicting position, target, completion
        self.first: list[tuple[int, int]] = []
        self.last: list[tuple[int, int]] = []
        self.prompt: list[tuple[int, int]] = []

    def open_row(self) -> None:
        for columns in (self.input_ids, self.position_ids, self.group_ids, self.branch_ids, self.weights):
            columns.append([])

    def add_tokens(self, tokens: Sequence[int], *, start: int, group: int, branch: int, weight: int) -> int:
        """Append `tokens` with positions from `start` to the open row; returns where in the row they begin."""
        begin = len(self.input_ids[-1])
        self.input_ids[-1].extend(tokens)
        self.position_ids[-1].extend(range(start, start + len(tokens)))
        self.group_ids[-1].extend([group] * len(tokens))
        self.branch_ids[-1].extend([branch] * len(tokens))
        self.weights[-1].extend([weight] * len(tokens))
        return begin

    def add_completion(self, tokens: Sequence[int], *, begin: int, prompt_end: int) -> None:
        """Record that `tokens`, at `begin` in the open row, are scored, the first of them from `prompt_end`."""
        row, completion = len(self.input_ids) - 1, len(self.first)
        self.score.append((row, prompt_end, tokens[0], completion))
        self.score.extend((row, begin + i, token, completion) for i, token in enumerate(tokens[1:]))
        self.first.append((row, begin))
        self.last.append((row, begin + len(tokens) - 1))
        self.prompt.append((row, prompt_end))

    def tensors(self, *, pad_token_id: int, row_length: int | None, packed: bool) -> dict[str, torch.Tensor]:
        longest = max(len(row) for row in self.input_ids)
        length = row_length or longest
        if longest > length:
            raise ValueError(
                f"A row of {longest} tokens does not fit in rows of {length}; raise `max_tokens_per_row`."
            )

        def pad(rows: list[list[int]], value: int) -> torch.Tensor:
            return torch.tensor([row + [value] * (length - len(row)) for row in rows], dtype=torch.long)

        def flat(places: list[tuple[int, int]]) -> torch.Tensor:
            return torch.tensor([row * length + position for row, position in places], dtype=torch.long)

        batch = {
            "input_ids": pad(self.input_ids, pad_token_id),
            "position_ids": pad(self.position_ids, 0),
            "token_weights": pad(self.weights, 0).float(),
            "score_index": flat([(row, position) for row, position, _, _ in self.score]),
            "score_targets": torch.tensor([target for _, _, target, _ in self.score], dtype=torch.long),
            "score_completions": torch.tensor([completion for _, _, _, completion in self.score], dtype=torch.long),
            "first_index": flat(self.first),
            "last_index": flat(self.last),
            "prompt_index": flat(self.prompt),
        }
        group_ids = pad(self.group_ids, -1)
        if packed:
            batch |= {"group_ids": group_ids, "branch_ids": pad(self.branch_ids, 0)}
        else:
            batch["attention_mask"] = group_ids >= 0
        return batch


def _check(group: Group) -> None:
    assert group.prompt, "a group needs at least one prompt token: the first completion token is predicted from it"
    assert group.completions and all(group.completions), "every completion needs at least one token"


@dataclass(frozen=True)
class PaddedLayout:
    """One completion a row, prompt repeated, padded on the right."""

    pad_token_id: int
    pad_to_multiple_of: int = 1
    name: str = "padded"

    def collate(self, rows: Sequence[Sequence[Group]], *, row_length: int | None = None) -> dict[str, torch.Tensor]:
        """See `Layout.collate`."""
        built = _Rows()
        for number, group in enumerate(group for row in rows for group in row):
            _check(group)
            for branch, completion in enumerate(group.completions, start=1):
                built.open_row()
                built.add_tokens(group.prompt, start=0, group=number, branch=0, weight=1)
                begin = built.add_tokens(completion, start=len(group.prompt), group=number, branch=branch, weight=1)
                built.add_completion(completion, begin=begin, prompt_end=begin - 1)
        if row_length is None:
            longest = max(len(row) for row in built.input_ids)
            row_length = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        return built.tensors(pad_token_id=self.pad_token_id, row_length=row_length, packed=False)


@dataclass(frozen=True)
class PackedLayout:
    """Several groups a row; with `share_prompt`, each prompt once before all of its completions."""

    pad_token_id: int
    share_prompt: bool = True
    name: str = "packed"

    def collate(self, rows: Sequence[Sequence[Group]], *, row_length: int | None = None) -> dict[str, torch.Tensor]:
        """See `Layout.collate`."""
        built = _Rows()
        for row in rows:
            built.open_row()
            for number, group in enumerate(row):
                _check(group)
                if self.share_prompt:
                    self._add_shared(built, group, number)
                else:
                    self._add_repeated(built, group, number)
        return built.tensors(pad_token_id=self.pad_token_id, row_length=row_length, packed=True)

    @staticmethod
    def _add_shared(built: _Rows, group: Group, number: int) -> None:
        sharing = len(group.completions)
        start = len(group.prompt)
        prompt_end = built.add_tokens(group.prompt, start=0, group=number, branch=0, weight=sharing) + start - 1
        for branch, completion in enumerate(group.completions, start=1):
            begin = built.add_tokens(completion, start=start, group=number, branch=branch, weight=1)
            built.add_completion(completion, begin=begin, prompt_end=prompt_end)

    @staticmethod
    def _add_repeated(built: _Rows, group: Group, number: int) -> None:
        # a repeated prompt belongs to its completion's branch, so that the two copies do not see each other
        for branch, completion in enumerate(group.completions, start=1):
            built.add_tokens(group.prompt, start=0, group=number, branch=branch, weight=1)
            begin = built.add_tokens(completion, start=len(group.prompt), group=number, branch=branch, weight=1)
            built.add_completion(completion, begin=begin, prompt_end=begin - 1)


def choose_layout(
    batch_layout: str,
    config: PretrainedConfig,
    *,
    pad_token_id: int,
    longest_sequence: int,
    pad_to_multiple_of: int = 1,
    share_prompt: bool = True,
    against_packing: str | None = None,
) -> tuple[Layout, str | None]:
    """Choose the layout of a model's batches: packed where that is exact, unless the padded one is asked for.

    Args:
        batch_layout: "auto", "packed" or "padded".
        config: the model's config, with its attention implementation.
        pad_token_id, pad_to_multiple_of: of the padded layout.
        longest_sequence: longest prompt + completion of the data, in tokens.
        share_prompt: of the packed layout.
        against_packing: a reason that only the caller knows.

    Returns:
        The layout, and why it is padded where packing would have been tried.

    Raises:
        ValueError: "packed" is asked for and cannot be exact.
    """
    padded = PaddedLayout(pad_token_id, pad_to_multiple_of=pad_to_multiple_of)
    if batch_layout == "padded":
        return padded, None
    reason = against_packing or why_not_packed(
        config, implementation=attention_of(config), longest_sequence=longest_sequence
    )
    if reason is None:
        return PackedLayout(pad_token_id, share_prompt=share_prompt), None
    if batch_layout == "packed":
        raise ValueError(
            f"`batch_layout: packed` cannot be exact for this model: {reason}. Use `batch_layout: padded`."
        )
    return padded, reason
