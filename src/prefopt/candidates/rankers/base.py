"""The interface of a ranker, and what several of them share: checks of the scores, batches, answers as token ids."""

from __future__ import annotations

import importlib.util
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from prefopt.arguments import setting
from prefopt.candidates.pairs import Array
from prefopt.data.encoding import MESSAGES, STRINGS, TextGroup, Truncation, encode_groups, prepare_tokenizer
from prefopt.data.messages import BadRow, TextOrMessages, as_messages
from prefopt.models.heads import HeadedModel, head_kind

logger = logging.get_logger(__name__)

UNLIMITED = 10**9  # tokenizers without a limit have a model_max_length of 10**30


class Tally(Protocol):
    """Collects counters and progress of the work; a `Shard` is one."""

    def count(self, name: str, number: int = 1) -> None:
        """Add `number` to the counter `name`."""

    def advance(self, *, rows: float = 0, tokens: int = 0) -> None:
        """Report work done."""


@dataclass(frozen=True)
class Request:
    """One prompt and its R candidates to be ranked."""

    row: str
    prompt: TextOrMessages
    candidates: list[str]


@dataclass
class NoOptions:
    """The options of a ranker that has none."""


@dataclass
class ModelOptions:
    """Options that all rankers whose weights are loaded here share."""

    model_revision: str | None = setting(None, "Revision of a ranker on the hub.")
    dtype: str = setting(
        "auto",
        "Of the ranker's weights: auto, float32, bfloat16, float16. auto: float32 on a CPU; on a GPU float16 for "
        "PairRM, as published, and bfloat16 for others.",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    tokens_per_batch: int = setting(
        16384, "Padded tokens in a batch; answers are batched by length.", at_least=1, decides_result=False
    )


@dataclass
class LengthOptions(ModelOptions):
    """Options of the rankers that read prompt and answer as one sequence."""

    max_length: int | None = setting(
        None,
        "reward-model, general-preference: tokens of prompt and answer; by default the model's own limit. The end is "
        "kept.",
        at_least=1,
    )


class Ranker(ABC):
    """Scores the candidates of prompts.

    Args:
        options: `path`, `device` and `torch_dtype`, and the fields of the class that `options` names.
    """

    options: ClassVar[type] = NoOptions
    accelerated_dtype: ClassVar[torch.dtype] = torch.bfloat16  # of "auto" weights on a GPU

    @abstractmethod
    def __init__(self, options: Any) -> None: ...

    @abstractmethod
    def rank(self, requests: Sequence[Request], tally: Tally) -> list[Array]:
        """Return per request (R,) scores, or an (R, R) table of logits that i (shown first) beats j; in nats.

        Counts in `tally`: `answers`, and of these `truncated answers`; `prompts`, and of these `truncated prompts`.
        """

    @classmethod
    def source_file(cls, path: str, options: Any) -> Path | None:
        """Return the file whose text decides the scores, for a ranker that is no model's folder; None without one."""
        return None


def check_scores(request: Request, values: Any, *, ranker: str) -> Array:
    """Return the scores of one request as float64.

    Raises:
        ValueError: a shape that is neither (R,) nor (R, R), or a value that is not finite; the message names the row.
    """
    try:
        scores = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"Row {request.row!r}: {ranker} returned {type(values).__name__}, not numbers.") from None
    count = len(request.candidates)
    if scores.shape not in ((count,), (count, count)):
        raise ValueError(
            f"Row {request.row!r}: {ranker} returned shape {scores.shape} for {count} candidates; ({count},) or "
            f"({count}, {count}) is needed."
        )
    if not np.isfinite(scores).all():
        where = tuple(int(index) for index in np.argwhere(~np.isfinite(scores))[0])
        raise ValueError(
            f"Row {request.row!r}: {ranker} gave candidate {where[0]} the score {scores[where]}; scores must be "
            "finite. Try --dtype float32, or remove the row."
        )
    return scores


def plain_text(prompt: TextOrMessages) -> str:
    """Return a prompt as one text: a string or single user turn as it is, a longer dialogue with the roles' names."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and prompt[0]["role"] == "user":
        return str(prompt[0]["content"])
    return "\n\n".join(f"{message['role'].capitalize()}: {message.get('content') or ''}" for message in prompt)


def length_batches(lengths: Sequence[int], tokens_per_batch: int) -> Iterator[list[int]]:
    """Yield indices in batches of similar length: longest first, rows times longest row at most `tokens_per_batch`."""
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    start = 0
    while start < len(order):
        size = max(1, tokens_per_batch // max(lengths[order[start]], 1))
        yield order[start : start + size]
        start += size


def load_tokenizer(path: str, **settings: Any) -> Any:
    """Load a ranker's tokenizer.

    Raises:
        ValueError: it cannot be read, because packages for SentencePiece models are missing or otherwise.
    """
    try:
        return AutoTokenizer.from_pretrained(path, **settings)
    except (ImportError, ValueError, OSError) as error:
        # without these transformers takes such a model for another kind, and its error names another package
        packages = {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf"}
        missing = [package for module, package in packages.items() if not _is_installed(module)]
        if missing and any(word in str(error).lower() for word in ("sentencepiece", "protobuf", "tiktoken")):
            raise ValueError(
                f"{path}: reading its SentencePiece tokenizer needs {' and '.join(missing)}: pip install "
                "'prefopt[pairrm]'."
            ) from error
        raise ValueError(f"{path}: its tokenizer cannot be read: {error}") from error


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def ordered_pairs(requests: Sequence[Request]) -> list[tuple[int, int, int]]:
    """Return every ordered pair of different candidates as (request, first, second)."""
    return [
        (row, first, second)
        for row, request in enumerate(requests)
        for first, second in itertools.permutations(range(len(request.candidates)), 2)
    ]


def pad(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return token ids and attention mask (N, T), padded on the right."""
    width = max(len(row) for row in rows)
    ids = [[*row, *[pad_id] * (width - len(row))] for row in rows]
    mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def positions_of(config: Any) -> int | None:
    """Return how many tokens a model has positions for; None where its config names no limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def longest_input(path: str, wanted: int | None, *limits: int | None) -> int | None:
    """Return the limit of prompt and answer: `wanted`, else the smallest of the ranker's limits; None without any.

    Raises:
        ValueError: more than a limit is wanted.
    """
    longest = min((limit for limit in limits if limit is not None and limit < UNLIMITED), default=None)
    if wanted and longest and wanted > longest:
        raise ValueError(f"max_length is {wanted}, but {path} reads at most {longest} tokens.")
    return wanted or longest


@dataclass(frozen=True)
class Answer:
    """Token ids of a prompt with one answer.

    Attributes:
        ids: all tokens; the first `prompt_length` are the prompt's.
        types: for encoders that tell two texts apart.
        prompt_cut: tokens that the prompt lost at its beginning.
    """

    ids: list[int]
    prompt_length: int
    types: list[int] | None = None
    prompt_cut: int = 0


def encode_answers(
    requests: Sequence[Request],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    tally: Tally,
    *,
    form: str | None = None,
) -> list[list[Answer]]:
    """Encode every answer behind its prompt.

    Texts become ids as in training, whose `form` is "strings" or "messages"; where that is unknown (None), under the
    ranker's own chat template, and as plain text where it has none. Too long a sequence loses the beginning of its
    prompt, then that of the answer: rewards are read at the end.

    Raises:
        ValueError: the chat template raises for a row (because of a system turn, say), or a ranker that was trained on
            strings gets a dialogue.
    """
    prepare_tokenizer(tokenizer)
    truncation = Truncation(max_length=max_length, mode="keep_end")
    encoded = encode_groups([_group(request, tokenizer, form) for request in requests], tokenizer)
    answers = []
    for request, group in zip(requests, encoded):
        if isinstance(group, BadRow):
            raise ValueError(f"Row {request.row!r}: the ranker's tokenizer cannot encode it ({group}).")
        row = []
        prompt_cut = False
        for completion in group.completion_ids:
            prompt, (kept,) = truncation.cut(group.prompt_ids, [completion], tokenizer.bos_token_id)
            prompt_cut |= len(prompt) < len(group.prompt_ids)
            tally.count("truncated answers", len(kept) < len(completion))
            row.append(Answer([*prompt, *kept], len(prompt), prompt_cut=len(group.prompt_ids) - len(prompt)))
        tally.count("truncated prompts", prompt_cut)
        tally.count("answers", len(row))
        tally.count("prompts")
        answers.append(row)
    return answers


def _group(request: Request, tokenizer: PreTrainedTokenizerBase, form: str | None) -> TextGroup:
    if form == MESSAGES or (form is None and tokenizer.chat_template):
        replies: list[TextOrMessages] = [[{"role": "assistant", "content": text}] for text in request.candidates]
        return TextGroup(as_messages(request.prompt), replies)
    turns = as_messages(request.prompt)
    if form == STRINGS and [turn["role"] for turn in turns] != ["user"]:
        raise ValueError(
            f"Row {request.row!r}: its prompt is a dialogue of {len(turns)} turns, and the ranker was trained on "
            "strings, which do not say how turns are joined. Train it on messages, or give the prompts as the strings "
            "that it knows."
        )
    return TextGroup(plain_text(request.prompt), list(request.candidates))


def form_of_model(model: Any, tokenizer: PreTrainedTokenizerBase, path: str) -> str | None:
    """Return the form of the texts that a ranker was trained on; None where it is not recorded.

    Raises:
        ValueError: the tokenizer gives other ids than in training.
    """
    form = model.text_form if isinstance(model, HeadedModel) else None
    if form is not None:
        model.record_text(tokenizer, form, where=f"{path}: what it ranks")
    elif isinstance(model, HeadedModel) and tokenizer.chat_template and head_kind(path) is not None:
        logger.warning(
            f"{path} does not say whether it was trained on strings or on messages; it reads messages under its chat "
            "template."
        )
    return form


def score_answers(
    answers: Sequence[Sequence[Answer]],
    forward: Callable[[list[Answer]], Tensor],
    *,
    tokens_per_batch: int,
    tally: Tally,
) -> list[Tensor]:
    """Run `forward` (N answers -> (N, ...)) on length-sorted batches; return its rows per request, on the CPU."""
    flat = [answer for row in answers for answer in row]
    results: list[Tensor | None] = [None] * len(flat)
    for batch in length_batches([len(answer.ids) for answer in flat], tokens_per_batch):
        rows = [flat[index] for index in batch]
        with torch.inference_mode():
            output = forward(rows).float().cpu()
        for index, value in zip(batch, output, strict=True):
            results[index] = value
        tally.advance(rows=len(batch) * len(answers) / len(flat), tokens=sum(len(answer.ids) for answer in rows))
        tally.count("tokens", sum(len(answer.ids) for answer in rows))
    done = iter(value for value in results if value is not None)
    return [torch.stack([next(done) for _ in row]) for row in answers]
