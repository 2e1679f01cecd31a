"""Batch layouts: how groups (a prompt and its completions) become rows of tokens.

Two layouts share one small interface, `collate(rows) -> batch`, where `rows` lists the groups that share a row:

- `PaddedLayout`: every completion has its own row, prompt repeated before it, padded on the right to a common length.
- `PackedLayout`: the groups of a row stand one after the other, each as prompt, completion 0, completion 1, ...; every
  completion restarts its positions after the prompt, and `scoring.attention` keeps it from seeing any other completion
  or group.

The scoring forward and pooling heads use only the keys documented at `Layout.collate`, so nothing after this module
knows which layout made a batch.

Letters: N rows, T tokens of a row, C completions of the batch (in group order), S scored tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from prefopt.scoring.attention import PackedRows


@dataclass(frozen=True)
class Group:
    """A prompt and the completions that share it, as token ids; a preference pair has two, chosen first.

    Attributes:
        prompt: at least one id.
        completions: at least one, of at least one id.
        skipped: of each completion the ranges [begin, end) of its ids that are read and not scored (turns of others);
            () where all are scored.
    """

    prompt: Sequence[int]
    completions: Sequence[Sequence[int]]
    skipped: Sequence[Sequence[Sequence[int]]] = ()

    @classmethod
    def of_pair(cls, row: Mapping[str, Any], sides: Sequence[str] = ("chosen", "rejected")) -> Group:
        """Return the group of a tokenised pair, or of some of its sides."""
        skipped = [row.get(f"{side}_skipped") or () for side in sides]
        return cls(row["prompt_ids"], [row[f"{side}_ids"] for side in sides], skipped if any(skipped) else ())

    @property
    def scored(self) -> list[Sequence[int]]:
        """Places of each completion's scored tokens among its tokens."""
        whole = [range(len(completion)) for completion in self.completions]
        return _without(whole, self.skipped) if self.skipped else [*whole]

    @property
    def shared_length(self) -> int:
        """Tokens of the group with the prompt counted once."""
        return len(self.prompt) + sum(len(completion) for completion in self.completions)


def _without(places: Sequence[range], skipped: Sequence[Sequence[Sequence[int]]]) -> list[Sequence[int]]:
    left_out = [{place for begin, end in ranges for place in range(begin, end)} for ranges in skipped]
    return [[place for place in each if place not in out] for each, out in zip(places, left_out)]


class Layout(Protocol):
    """Turns groups into tensors; see the module's docstring."""

    @property
    def name(self) -> str:
        """Return "padded" or "packed"."""
        ...

    def collate(self, rows: Sequence[Sequence[Group]]) -> dict[str, Any]:
        """Return the batch of one forward pass over the groups of `rows`.

        Args:
            rows: for each row, the groups that it holds (the padded layout ignores the division into rows).

        Returns:
            - `input_ids`, `position_ids` (N, T) long;
            - `attention_mask`: (N, T) bool, padded layout; `PackedRows`, packed layout;
            - `token_weights` (N, T) float: in how many completions' sequences a token stands (0 for padding);
            - `score_index` (S,) long: position in the flattened (N*T) outputs that predicts the scored token
              `score_targets` (S,);
            - `score_completions` (S,) long: the completion that owns it, 0..C-1;
            - `first_index`, `last_index` (C,) long: flattened positions of each completion's first and last token;
            - `prompt_index` (C,) long: flattened position of the last prompt token before each completion.
        """
        ...


class _Rows:
    """Lists that grow while groups are laid out, and become the tensors of `Layout.collate`.

    Places are (row, position), since positions among all tokens are known only once T is.
    """

    def __init__(self) -> None:
        self.input_ids: list[list[int]] = []
        self.position_ids: list[list[int]] = []
        self.weights: list[list[int]] = []
        self.score: list[tuple[int, int, int, int]] = []  # row, predicting position, target, completion
        self.first: list[tuple[int, int]] = []
        self.last: list[tuple[int, int]] = []
        self.prompt_end: list[tuple[int, int]] = []
        self.segments: list[tuple[int, int, int]] = []  # row, begin, end
        self.prompts: list[tuple[int, int, int, int]] = []  # row, begin and end of a prompt, end of its completions
        self.longest = 0

    def open_row(self) -> None:
        for columns in (self.input_ids, self.position_ids, self.weights):
            columns.append([])

    def add_segment(self, *parts: Sequence[int], start: int = 0, weight: int = 1) -> int:
        """Append tokens that attend to one another, with positions from `start`; return the last part's place."""
        begin, row = len(self.input_ids[-1]), len(self.input_ids) - 1
        for part in parts:
            last = len(self.input_ids[-1])
            self.input_ids[-1].extend(part)
        end = len(self.input_ids[-1])
        self.position_ids[-1].extend(range(start, start + end - begin))
        self.weights[-1].extend([weight] * (end - begin))
        self.segments.append((row, begin, end))
        self.longest = max(self.longest, start + end - begin)
        return last

    def score_completion(self, tokens: Sequence[int], scored: Sequence[int], *, begin: int, prompt_end: int) -> None:
        """Record which of `tokens`, at `begin` in the open row, are scored, the first of them from `prompt_end`."""
        row, completion = len(self.input_ids) - 1, len(self.first)
        self.score.extend((row, begin + i - 1 if i else prompt_end, tokens[i], completion) for i in scored)
        self.first.append((row, begin))
        self.last.append((row, begin + len(tokens) - 1))
        self.prompt_end.append((row, prompt_end))

    def batch(self, *, pad_token_id: int, packed: bool, pad_to_multiple_of: int = 1) -> dict[str, Any]:
        longest = max(len(row) for row in self.input_ids)
        length = -(-longest // pad_to_multiple_of) * pad_to_multiple_of

        def pad(rows: list[list[int]], value: int) -> torch.Tensor:
            return torch.tensor([row + [value] * (length - len(row)) for row in rows], dtype=torch.long)

        def flat(places: list[tuple[int, int]]) -> torch.Tensor:
            return torch.tensor([row * length + position for row, position in places], dtype=torch.long)

        weights = pad(self.weights, 0)
        return {
            "input_ids": pad(self.input_ids, pad_token_id),
            "position_ids": pad(self.position_ids, 0),
            "attention_mask": self._packed_rows(length) if packed else weights > 0,
            "token_weights": weights.float(),
            "score_index": flat([(row, position) for row, position, _, _ in self.score]),
            "score_targets": torch.tensor([target for _, _, target, _ in self.score], dtype=torch.long),
            "score_completions": torch.tensor([completion for _, _, _, completion in self.score], dtype=torch.long),
            "first_index": flat(self.first),
            "last_index": flat(self.last),
            "prompt_index": flat(self.prompt_end),
        }

    def _packed_rows(self, length: int) -> PackedRows:
        segments = [(row * length + begin, row * length + end) for row, begin, end in self.segments]
        prompts = [
            ((row * length + begin, row * length + end), (row * length + end, row * length + last))
            for row, begin, end, last in self.prompts
        ]
        return PackedRows.of(len(self.input_ids), length, segments, prompts, self.longest)


def _check(group: Group) -> None:
    assert group.prompt, "a group needs at least one prompt token: the first completion token is predicted from it"
    assert group.completions and all(group.scored), "every completion needs at least one token to score"


@dataclass(frozen=True)
class PaddedLayout:
    """One completion a row, prompt repeated, padded on the right."""

    pad_token_id: int
    pad_to_multiple_of: int = 1
    name: str = "padded"

    def collate(self, rows: Sequence[Sequence[Group]]) -> dict[str, Any]:
        """See `Layout.collate`."""
        built = _Rows()
        for group in (group for row in rows for group in row):
            _check(group)
            for completion, scored in zip(group.completions, group.scored):
                built.open_row()
                begin = built.add_segment(group.prompt, completion)
                built.score_completion(completion, scored, begin=begin, prompt_end=begin - 1)
        return built.batch(pad_token_id=self.pad_token_id, packed=False, pad_to_multiple_of=self.pad_to_multiple_of)


@dataclass(frozen=True)
class PackedLayout:
    """Several groups a row; with `share_prompt`, each prompt once before all of its completions."""

    pad_token_id: int
    share_prompt: bool = True
    name: str = "packed"

    def collate(self, rows: Sequence[Sequence[Group]]) -> dict[str, Any]:
        """See `Layout.collate`."""
        built = _Rows()
        for row in rows:
            built.open_row()
            for group in row:
                _check(group)
                if self.share_prompt:
                    self._add_shared(built, group)
                else:
                    self._add_repeated(built, group)
        return built.batch(pad_token_id=self.pad_token_id, packed=True)

    @staticmethod
    def _add_shared(built: _Rows, group: Group) -> None:
        start = len(group.prompt)
        prompt = built.add_segment(group.prompt, weight=len(group.completions))
        for completion, scored in zip(group.completions, group.scored):
            begin = built.add_segment(completion, start=start)
            built.score_completion(completion, scored, begin=begin, prompt_end=prompt + start - 1)
        # what the row holds since the prompt's end attends to the prompt
        built.prompts.append((len(built.input_ids) - 1, prompt, prompt + start, len(built.input_ids[-1])))

    @staticmethod
    def _add_repeated(built: _Rows, group: Group) -> None:
        for completion, scored in zip(group.completions, group.scored):
            begin = built.add_segment(group.prompt, completion)
            built.score_completion(completion, scored, begin=begin, prompt_end=begin - 1)
