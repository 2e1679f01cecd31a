"""General preference models: R forward passes give the whole R x R table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from prefopt.candidates.pairs import Array
from prefopt.candidates.rankers.base import (
    Answer,
    Request,
    Tally,
    encode_answers,
    longest_input,
    pad,
    positions_of,
    score_answers,
)
from prefopt.models.general_preference import GeneralPreferenceModel, preference_table


class GeneralPreferenceRanker:
    """Tables (R, R) of s(i beats j) / tau from the embeddings of the answers.

    Args:
        path: folder, ours or in the published layout.
        dtype, device: of the model.
        max_length: tokens of prompt and answer; None for as many as the model has positions.
        tokens_per_batch: padded tokens in a batch.

    Reference: arXiv 2410.02197.
    """

    def __init__(
        self, path: str, *, dtype: torch.dtype, device: torch.device, max_length: int | None, tokens_per_batch: int
    ) -> None:
        self.device = device
        self.tokens_per_batch = tokens_per_batch
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        model: Any = GeneralPreferenceModel.from_pretrained(path, dtype=dtype)
        self.model = model.to(device).eval()
        self.dim = int(model.head_record["dim"])
        self.max_length = longest_input(path, max_length, positions_of(model.config))

    def rank(self, requests: Sequence[Request], tally: Tally) -> list[Array]:
        """See `Ranker.rank`."""
        answers = encode_answers(requests, self.tokenizer, self.max_length, tally)
        rows = score_answers(answers, self._forward, tokens_per_batch=self.tokens_per_batch, tally=tally)
        return [self._table(row.double()).numpy() for row in rows]

    def _forward(self, answers: list[Answer]) -> Tensor:
        """(N, d) embeddings, followed by (N, d/2) scales where the model has a prompt head."""
        input_ids, mask = pad([answer.ids for answer in answers], 0, self.device)
        lengths = torch.tensor([answer.prompt_length for answer in answers], device=self.device)
        embeddings, scales = self.model.embeddings(input_ids, mask, lengths)
        return embeddings if scales is None else torch.cat([embeddings, scales], dim=-1)

    def _table(self, row: Tensor) -> Tensor:
        embeddings, scales = row[:, : self.dim], row[:, self.dim :]
        # a cut prompt may begin elsewhere for a longer answer, but it ends at the same token: one scale for all answers
        return preference_table(embeddings, scales[0] if scales.numel() else None, temperature=self.model.temperature)
