"""Generation with transformers in this process: batched by length, or batched continuously."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
)

from prefopt.candidates.backends import AnswerRequest, Completion, OnDone, Sampling, completion_of


class TransformersBackend:
    """Draws with `model.generate` in left-padded batches of like length, or with `model.generate_batch`.

    Args:
        model: on its device.
        tokenizer: decodes the answers.
        sampling: how tokens are drawn.
        batch_size: answers in one batch; samples depend on it, since a batch shares one random stream.
        continuous: hand all answers over at once and let transformers replace a finished one by the next.

    Raises:
        ValueError: continuous batching with a repetition penalty, which transformers would leave out.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        *,
        batch_size: int,
        continuous: bool = False,
    ) -> None:
        if continuous and sampling.repetition_penalty != 1:
            raise ValueError(
                "continuous_batching leaves out repetition_penalty: set it to 1, or turn continuous_batching off."
            )
        self.model = model.eval()
        # generate() fills settings that are not given from the model's own generation config
        self.model.generation_config = GenerationConfig()
        self.tokenizer = tokenizer
        self.sampling = sampling
        self.batch_size = batch_size
        self.continuous = continuous
        # masked wherever it pads, so any id will do
        self.pad_id = 0 if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)

    def complete(self, requests: Sequence[AnswerRequest], seed: int, on_done: OnDone) -> list[Completion]:
        """See `Backend.complete`."""
        done: dict[int, Completion] = {}
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            torch.manual_seed(seed)
            for places in self._batches(requests):
                batch = [requests[place] for place in places]
                rows = self._continuous(batch, seed) if self.continuous else self._padded(batch)
                for place, ids in zip(places, rows):
                    done[place] = completion_of(ids, self.sampling.stop_token_ids, self.tokenizer)
                on_done(len(places), sum(done[place].num_tokens for place in places))
        return [done[place] for place in range(len(requests))]

    def _batches(self, requests: Sequence[AnswerRequest]) -> Iterator[list[int]]:
        """Batch requests of one token limit, longest prompts first so that memory runs out early if at all."""
        order = sorted(
            range(len(requests)), key=lambda r: (-requests[r].max_new_tokens, -len(requests[r].prompt_ids), r)
        )
        for _, group in groupby(order, key=lambda r: requests[r].max_new_tokens):
            places = list(group)
            size = len(places) if self.continuous else self.batch_size
            yield from (places[start : start + size] for start in range(0, len(places), size))

    def _config(self, max_new_tokens: int) -> GenerationConfig:
        settings: dict[str, Any] = {"do_sample": self.sampling.temperature > 0}
        if settings["do_sample"]:
            settings |= {
                "temperature": self.sampling.temperature,
                "top_p": self.sampling.top_p,
                "top_k": self.sampling.top_k,
            }
        return GenerationConfig(
            max_new_tokens=max_new_tokens,
            eos_token_id=list(self.sampling.stop_token_ids) or None,
            pad_token_id=self.pad_id,
            **settings,
        )

    def _padded(self, batch: Sequence[AnswerRequest]) -> list[list[int]]:
        width = max(len(request.prompt_ids) for request in batch)
        input_ids = torch.full((len(batch), width), self.pad_id)
        mask = torch.zeros_like(input_ids)
        for row, request in enumerate(batch):
            input_ids[row, width - len(request.prompt_ids) :] = torch.tensor(request.prompt_ids)
            mask[row, width - len(request.prompt_ids) :] = 1
        mask = mask.to(self.model.device)
        processors = LogitsProcessorList()
        if self.sampling.repetition_penalty != 1:
            processors.append(PenaltyWithoutPadding(self.sampling.repetition_penalty, mask))
        try:
            output = self.model.generate(
                input_ids.to(self.model.device),
                attention_mask=mask,
                generation_config=self._config(batch[0].max_new_tokens),
                logits_processor=processors,
            )
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"Out of memory with batch_size {self.batch_size} and prompts of up to {width} tokens; set a smaller "
                "batch_size."
            ) from error
        return output[:, width:].tolist()

    def _continuous(self, batch: Sequence[AnswerRequest], seed: int) -> list[list[int]]:
        # by default the cache takes most of the memory, which a CPU shares with everything else
        memory = 0.05 if self.model.device.type == "cpu" else None
        results = self.model.generate_batch(
            [request.prompt_ids for request in batch],
            generation_config=self._config(batch[0].max_new_tokens),
            continuous_batching_config=ContinuousBatchingConfig(seed=seed, max_memory_percent=memory),
        )
        failed = next((result.error for result in results.values() if result.error), None)
        if failed is not None or len(results) < len(batch):
            raise RuntimeError(f"continuous batching returned {len(results)} of {len(batch)} answers ({failed}).")
        numbered = sorted(results.items(), key=lambda item: int(item[0].rpartition("_")[2]))
        return [list(result.generated_tokens) for _, result in numbered]


class PenaltyWithoutPadding(LogitsProcessor):
    """Repetition penalty on the tokens of a left-padded row, without its padding.

    transformers' own also penalises the id of the padding, which is often the end token's.

    Args:
        penalty: see `Sampling.repetition_penalty`.
        mask: (rows, width) of the prompts, 1 on tokens.
    """

    def __init__(self, penalty: float, mask: torch.Tensor) -> None:
        self.inner = RepetitionPenaltyLogitsProcessor(penalty)
        self.mask = mask.bool()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Apply the penalty to scores (rows, vocabulary); the last prompt token stands in for padding."""
        width = self.mask.shape[1]
        seen = input_ids.clone()
        seen[:, :width] = torch.where(self.mask, input_ids[:, :width], input_ids[:, width - 1 : width])
        return self.inner(seen, scores)
