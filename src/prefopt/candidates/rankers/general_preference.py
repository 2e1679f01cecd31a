"""General preference models: R forward passes give the whole R x R table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PretrainedConfig

from prefopt.arguments import setting
from prefopt.candidates.pairs import Array
from prefopt.candidates.rankers.base import (
    Answer,
    LengthOptions,
    Ranker,
    Request,
    Tally,
    encode_answers,
    form_of_model,
    load_tokenizer,
    longest_input,
    pad,
    positions_of,
    score_answers,
)
from prefopt.data.encoding import common_prefix_length
from prefopt.data.messages import as_messages
from prefopt.models.general_preference import GeneralPreferenceModel, preference_table
from prefopt.models.heads import RECORD

TRAINED, EXAMPLE, FORK = "trained", "example", "fork"


@dataclass
class GeneralPreferenceOptions(LengthOptions):
    """Options of general preference models."""

    released_format: str = setting(
        TRAINED,
        "general-preference: ids of a checkpoint in the authors' layout. trained: as in their training, with one BOS; "
        "example: as their usage example, with a second BOS; fork: as their fork that ranked the published data, "
        "without BOS and with the template's own last token.",
        choices=(TRAINED, EXAMPLE, FORK),
    )


class GeneralPreferenceRanker(Ranker):
    """Tables (R, R) of s(i beats j) / tau from the embeddings of the answers.

    A checkpoint of the released code reads what it was trained on: the last token of a conversation is replaced by
    the EOS (Gemma's template ends with a line break), and the prompt head stands at the end of the first user turn,
    before the header of the assistant's. `released_format` repeats what two other places of that code read instead.

    Reference: arXiv 2410.02197.
    """

    options: ClassVar[type] = GeneralPreferenceOptions

    def __init__(self, options: Any) -> None:
        path, self.device, self.tokens_per_batch = options.path, options.device, options.tokens_per_batch
        self.tokenizer = load_tokenizer(path)
        model: Any = GeneralPreferenceModel.from_pretrained(path, dtype=options.torch_dtype)
        self.model = model.to(self.device).eval()
        self.form = form_of_model(model, self.tokenizer, path)
        self.dim = int(model.head_record["dim"])
        self.max_length = longest_input(path, options.max_length, positions_of(model.config))
        known = Path(path, "adapter_config.json").is_file() or RECORD in PretrainedConfig.get_config_dict(path)[0]
        self.as_released = not known and bool(self.tokenizer.chat_template)
        self.format = options.released_format
        if self.format != TRAINED and not self.as_released:
            raise ValueError(
                f"released_format is {self.format!r}, and {path} is no checkpoint in the authors' layout with a chat "
                "template: set released_format: trained."
            )

    def rank(self, requests: Sequence[Request], tally: Tally) -> list[Array]:
        """See `Ranker.rank`."""
        answers = self.encode(requests, tally)
        rows = score_answers(answers, self._forward, tokens_per_batch=self.tokens_per_batch, tally=tally)
        return [self._table(row.double()).numpy() for row in rows]

    def encode(self, requests: Sequence[Request], tally: Tally) -> list[list[Answer]]:
        """Return the token ids that the model reads."""
        if self.format != TRAINED:
            return [self._as_their_code(request, tally) for request in requests]
        answers = encode_answers(requests, self.tokenizer, self.max_length, tally, form=self.form)
        if not self.as_released:
            return answers
        return [self._released_row(request, row) for request, row in zip(requests, answers)]

    def _released_row(self, request: Request, row: list[Answer]) -> list[Answer]:
        messages = as_messages(request.prompt)
        first = next((n for n, message in enumerate(messages) if message["role"] == "user"), len(messages) - 1)
        turn, prompt = (
            self.tokenizer.apply_chat_template(part, add_generation_prompt=opens)["input_ids"]
            for part, opens in ((messages[: first + 1], False), (messages, True))
        )
        end = common_prefix_length(turn, prompt)
        eos = self.tokenizer.eos_token_id
        return [replace(a, ids=[*a.ids[:-1], eos], prompt_length=max(end - a.prompt_cut, 1)) for a in row]

    def _as_their_code(self, request: Request, tally: Tally) -> list[Answer]:
        """Encode as the authors' example or fork: the rendered text is encoded again, and cut at its end if at all."""
        messages, row = as_messages(request.prompt), []
        prompt = self._encode_again(messages[:1])
        for text in request.candidates:
            whole = self._encode_again([*messages, {"role": "assistant", "content": text}])
            ids = whole[: self.max_length] if self.format == EXAMPLE else whole
            tally.count("truncated answers", len(ids) < len(whole))
            if self.format == EXAMPLE:
                ids = [*ids[:-1], self.tokenizer.eos_token_id]
            row.append(Answer(ids, min(len(prompt), len(ids))))
        tally.count("answers", len(row))
        tally.count("prompts")
        return row

    def _encode_again(self, messages: list[dict[str, Any]]) -> list[int]:
        text = self.tokenizer.apply_chat_template(messages, tokenize=False)
        if self.format == FORK:
            return self.tokenizer(text.replace(self.tokenizer.bos_token, ""), add_special_tokens=False)["input_ids"]
        return self.tokenizer(text)["input_ids"]  # puts another BOS before that of the template

    def _forward(self, answers: list[Answer]) -> Tensor:
        """Return (N, d) embeddings, followed by (N, d/2) scales where the model has a prompt head."""
        input_ids, mask = pad([answer.ids for answer in answers], 0, self.device)
        lengths = torch.tensor([answer.prompt_length for answer in answers], device=self.device)
        embeddings, scales = self.model.embeddings(input_ids, mask, lengths)
        return embeddings if scales is None else torch.cat([embeddings, scales], dim=-1)

    def _table(self, row: Tensor) -> Tensor:
        embeddings, scales = row[:, : self.dim], row[:, self.dim :]
        # a cut prompt may begin elsewhere for a longer answer, but it ends at the same token: one scale for all
        return preference_table(embeddings, scales[0] if scales.numel() else None, temperature=self.model.temperature)
