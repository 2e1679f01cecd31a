"""PairRM as a ranker: all ordered pairs of all prompts, batched by length."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from prefopt.candidates.pairs import Array
from prefopt.candidates.rankers.base import Request, Tally, length_batches, pad, plain_text
from prefopt.models.pair_ranker import EncodedPrompt, PairRanker


class PairRMRanker:
    """Tables (R, R) of logits that the first candidate of an ordered pair beats the second; both orders are run.

    Args:
        path: folder in one of the two published layouts.
        dtype, device: of the model.
        tokens_per_batch: padded tokens in a batch.
    """

    def __init__(self, path: str, *, dtype: torch.dtype, device: torch.device, tokens_per_batch: int) -> None:
        self.model = PairRanker.from_pretrained(path, dtype=dtype).to(device)
        self.device = device
        self.tokens_per_batch = tokens_per_batch

    def rank(self, requests: Sequence[Request], tally: Tally) -> list[Array]:
        """See `Ranker.rank`."""
        prompts = [self._encode(request, tally) for request in requests]
        tables = [np.zeros((len(request.candidates),) * 2) for request in requests]
        pairs = [
            (row, first, second)
            for row, request in enumerate(requests)
            for first in range(len(request.candidates))
            for second in range(len(request.candidates))
            if first != second
        ]
        lengths = [
            len(prompts[row].source) + len(prompts[row].candidates[first]) + len(prompts[row].candidates[second])
            for row, first, second in pairs
        ]
        for batch in length_batches(lengths, self.tokens_per_batch):
            inputs = [
                self.model.pair_ids(prompts[row], first, second)
                for row, first, second in (pairs[index] for index in batch)
            ]
            input_ids, mask = pad([ids for ids, _ in inputs], self.model.tokenizer.pad_token_id, self.device)
            markers = torch.tensor([positions for _, positions in inputs], device=self.device)
            with torch.inference_mode():
                logits = self.model(input_ids, mask, markers).double().cpu().tolist()
            for index, logit in zip(batch, logits, strict=True):
                row, first, second = pairs[index]
                tables[row][first, second] = logit
            tokens = sum(len(ids) for ids, _ in inputs)
            tally.count("tokens", tokens)
            tally.advance(rows=len(batch) * len(requests) / len(pairs), tokens=tokens)
        return tables

    def _encode(self, request: Request, tally: Tally) -> EncodedPrompt:
        prompt = self.model.encode(plain_text(request.prompt), request.candidates)
        tally.count("prompts")
        tally.count("answers", len(request.candidates))
        tally.count("truncated prompts", int(prompt.source_cut))
        tally.count("truncated answers", sum(prompt.candidates_cut))
        return prompt
