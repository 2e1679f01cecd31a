"""From texts and messages to token ids: prompt and prompt + completion are rendered whole, then split.

Pairs, comparisons and bare prompts (for generation) all go through `encode_groups`, so that a prompt has the same ids
everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import transformers
from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from prefopt.data.messages import EMPTY_PROMPT, REFUSED_BY_TEMPLATE, TOO_LONG, BadRow, Message, Text
from prefopt.files import content_hash

# what a chat template raises by itself, and what its filters raise on content that they do not expect
TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, KeyError, AttributeError)


@dataclass(frozen=True)
class Group:
    """A prompt and its R >= 0 completions, as texts or as messages."""

    prompt: Text
    completions: list[Text] = field(default_factory=list)
    tools: list[Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


@dataclass(frozen=True)
class EncodedGroup:
    """The ids of a group; `prompt_is_prefix` is False where the prompt alone had other last tokens than in context."""

    prompt_ids: list[int]
    completion_ids: list[list[int]]
    prompt_is_prefix: bool = True


def with_pad_token(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Give `tokenizer` a pad token where it has none: its end token, as TRL does. Changes it in place and returns it.

    Padding is masked by position and never by id, so that an end token that is scored stays scored.

    Raises:
        ValueError: there is neither a pad token nor an end token.
    """
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ValueError("The tokenizer has neither a pad token nor an end token; set `tokenizer.pad_token`.")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Check that `tokenizer` has an end token, which plain text needs, and give it a pad token (`with_pad_token`).

    Raises:
        ValueError: there is no end token.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(f"The tokenizer of {_name(tokenizer)} has no end token; set `tokenizer.eos_token`.")
    return with_pad_token(tokenizer)


def check_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that cannot render messages."""
    if not tokenizer.chat_template:
        raise ValueError(
            f"The rows are lists of messages, but the tokenizer of {_name(tokenizer)} has no chat template: use that "
            "of an "
            "instruction-tuned model, set `tokenizer.chat_template`, or give the rows as plain strings."
        )


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of everything that decides which ids a text or a conversation gets; the same before and after use."""
    if tokenizer.is_fast:
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        state: Any = {key: value for key, value in backend.items() if key not in ("padding", "truncation")}
    else:
        state = [sorted(tokenizer.get_vocab().items()), repr(sorted(tokenizer.init_kwargs.items(), key=str))]
    names = {key: str(value) for key, value in tokenizer.special_tokens_map.items() if key != "pad_token"}
    return content_hash(type(tokenizer).__name__, state, names, tokenizer.chat_template, transformers.__version__)


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return repr(tokenizer.name_or_path) if tokenizer.name_or_path else "this model"


def common_prefix_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Number of leading ids that both sequences have."""
    shorter = min(len(first), len(second))
    return next((index for index in range(shorter) if first[index] != second[index]), shorter)


def _leading_special_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What plain encoding puts before a text: a BOS for some tokenizers, nothing for others."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return list(full[:start])
    raise AssertionError("plain encoding does not contain the encoding without special tokens")


def encode_groups(groups: Sequence[Group], tokenizer: PreTrainedTokenizerBase) -> list[EncodedGroup | BadRow]:
    """Token ids of the prompt and of each completion of every group, uncut; a fault in place of a group that has one.

    Messages: the prompt is rendered with the generation prompt, prompt + completion as one conversation; special
    tokens
    are the template's. Strings: prompt and prompt + completion are encoded as one text behind the tokenizer's own
    leading
    tokens, and one end token is added. The completion starts where the sequences part.
    """
    encoded: list[EncodedGroup | BadRow] = [BadRow(EMPTY_PROMPT, "unset")] * len(groups)
    for is_messages, encode in ((False, _encode_strings), (True, _encode_conversations)):
        places = [place for place, group in enumerate(groups) if isinstance(group.prompt, list) == is_messages]
        if places:
            for place, result in zip(places, encode([groups[place] for place in places], tokenizer)):
                encoded[place] = result
    return encoded


def _encode_strings(groups: Sequence[Group], tokenizer: PreTrainedTokenizerBase) -> list[EncodedGroup | BadRow]:
    eos = tokenizer.eos_token_id
    if eos is None and any(group.completions for group in groups):
        raise ValueError(f"The tokenizer of {_name(tokenizer)} has no end token; set `tokenizer.eos_token`.")
    texts: list[str] = []
    for group in groups:
        assert isinstance(group.prompt, str)
        texts += [group.prompt, *(group.prompt + completion for completion in group.completions)]  # type: ignore[operator]
    leading = _leading_special_ids(tokenizer)
    ids = iter(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])
    encoded: list[EncodedGroup | BadRow] = []
    for group in groups:
        prompt = [*leading, *next(ids)]
        wholes = [[*leading, *next(ids)] for _ in group.completions]
        encoded.append(
            _split(prompt, [whole if whole[-1:] == [eos] else [*whole, eos] for whole in wholes], tokenizer)
        )
    return encoded


def _encode_conversations(groups: Sequence[Group], tokenizer: PreTrainedTokenizerBase) -> list[EncodedGroup | BadRow]:
    check_chat_template(tokenizer)
    prompts = _render([(group, group.prompt) for group in groups], tokenizer, add_generation_prompt=True)  # type: ignore[misc]
    wholes = iter(
        _render(
            [(group, group.prompt + completion) for group in groups for completion in group.completions],  # type: ignore
            tokenizer,
            add_generation_prompt=False,
        )
    )
    encoded: list[EncodedGroup | BadRow] = []
    for group, prompt in zip(groups, prompts):
        parts = [next(wholes) for _ in group.completions]
        fault = next((part for part in (prompt, *parts) if isinstance(part, BadRow)), None)
        encoded.append(fault or _split(prompt, parts, tokenizer))  # type: ignore[arg-type]
    return encoded


def _render(
    conversations: Sequence[tuple[Group, list[Message]]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    add_generation_prompt: bool,
) -> list[list[int] | BadRow]:
    """Ids of each conversation under the chat template, in one call where no row has tools or settings of its own."""
    plain = all(group.tools is None and group.chat_template_kwargs is None for group, _ in conversations)
    if plain and conversations:
        try:
            encoded: Any = tokenizer.apply_chat_template(
                [messages for _, messages in conversations],
                add_generation_prompt=add_generation_prompt,
                tokenizer_kwargs={"verbose": False},
            )
            return list(encoded["input_ids"])
        except TEMPLATE_ERRORS:
            pass  # one by one, to find out which
    return [_render_one(group, messages, tokenizer, add_generation_prompt) for group, messages in conversations]


def _render_one(
    group: Group, messages: list[Message], tokenizer: PreTrainedTokenizerBase, add_generation_prompt: bool
) -> list[int] | BadRow:
    try:
        encoded: Any = tokenizer.apply_chat_template(
            messages,
            tools=group.tools,
            add_generation_prompt=add_generation_prompt,
            tokenizer_kwargs={"verbose": False},
            **(group.chat_template_kwargs or {}),
        )
        return list(encoded["input_ids"])
    except TEMPLATE_ERRORS as error:
        return BadRow(REFUSED_BY_TEMPLATE, f"{type(error).__name__}: {error}")


def _split(prompt: list[int], wholes: list[list[int]], tokenizer: PreTrainedTokenizerBase) -> EncodedGroup | BadRow:
    """Split each whole sequence at the beginning that the prompt and all of them share."""
    prompt, wholes = _one_bos(prompt, tokenizer), [_one_bos(whole, tokenizer) for whole in wholes]
    length = min((common_prefix_length(prompt, whole) for whole in wholes), default=len(prompt))
    if length == 0:
        return BadRow(EMPTY_PROMPT, "no token of the prompt is left before the completion")
    return EncodedGroup(prompt[:length], [whole[length:] for whole in wholes], prompt_is_prefix=length == len(prompt))


def _one_bos(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """`ids` without a doubled BOS, as a text that brings its own gets from a tokenizer that adds one."""
    bos = tokenizer.bos_token_id
    start = 0
    while bos is not None and ids[start : start + 2] == [bos, bos]:
        start += 1
    return ids[start:]


@dataclass(frozen=True)
class Truncation:
    """How a prompt and its R >= 1 completions are made to fit `max_length`.

    With `max_prompt_length`: nothing is cut while the prompt and the longest completion fit; otherwise the prompt
    keeps its last `max_prompt_length` tokens and then each completion its first `max_length - len(prompt)`.
    Without: "keep_start" keeps the first `max_length` tokens of prompt + completion, so a prompt of `max_length`
    tokens
    leaves no room; "keep_end" cuts the prompt's beginning until the longest completion fits, and a completion that is
    too long by itself keeps its last `max_length - 1` tokens behind one prompt token. A prompt that loses its
    beginning keeps its BOS, which counts. "drop" cuts nothing: a row that does not fit cannot be used.

    Args:
        max_length: tokens of prompt and completion together; None cuts nothing.
        max_prompt_length: tokens of a cut prompt.
        mode: "keep_start", "keep_end" (both read only without `max_prompt_length`) or "drop".
    """

    max_length: int | None = None
    max_prompt_length: int | None = None
    mode: str = "keep_start"

    def __post_init__(self) -> None:
        if self.mode not in ("keep_start", "keep_end", "drop"):
            raise ValueError(f'truncation_mode must be "keep_start", "keep_end" or "drop", not {self.mode!r}.')
        if self.mode == "drop" and self.max_prompt_length is not None:
            raise ValueError(
                'max_prompt_length says how to cut a prompt, and truncation_mode "drop" cuts none: set one of them.'
            )
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(
                f"max_length must be at least 2 (a prompt token and a completion token), not {self.max_length}."
            )
        if self.max_prompt_length is None:
            return
        if self.max_prompt_length < 1:
            raise ValueError(f"max_prompt_length must be at least 1, not {self.max_prompt_length}.")
        if self.max_length is None:
            raise ValueError("max_prompt_length needs max_length: without it nothing is cut. Set both, or neither.")
        if self.max_prompt_length >= self.max_length:
            raise ValueError(
                f"max_prompt_length ({self.max_prompt_length}) must be smaller than max_length ({self.max_length}), "
                "or no "
                "room is left for completions."
            )

    def cut(
        self, prompt: Sequence[int], completions: Sequence[Sequence[int]], bos_token_id: int | None
    ) -> tuple[list[int], list[list[int]]]:
        """The kept ids of the prompt and of each completion; a completion may come out empty ("keep_start" only).

        Raises:
            BadRow: the row does not fit and must not be cut.
        """
        longest = max((len(completion) for completion in completions), default=0)
        if self.max_length is None or len(prompt) + longest <= self.max_length:
            return list(prompt), [list(completion) for completion in completions]
        if self.mode == "drop":
            raise BadRow(TOO_LONG, f"{len(prompt) + longest} tokens, max_length {self.max_length}")
        if self.max_prompt_length is None and self.mode == "keep_end":
            room = self.max_length - 1
            completions = [completion[max(len(completion) - room, 0) :] for completion in completions]
            kept = keep_last(prompt, self.max_length - min(longest, room), bos_token_id)
            return kept, [list(completion) for completion in completions]
        limit = len(prompt) if self.max_prompt_length is None else self.max_prompt_length
        kept = keep_last(prompt, limit, bos_token_id)
        room = max(self.max_length - len(kept), 0)
        return kept, [list(completion[:room]) for completion in completions]


def keep_last(ids: Sequence[int], limit: int, bos_token_id: int | None) -> list[int]:
    """The last `limit` ids; a BOS in first place stays there and counts."""
    assert limit >= 1
    if len(ids) <= limit:
        return list(ids)
    if bos_token_id is not None and ids[0] == bos_token_id:
        return [ids[0], *ids[len(ids) - (limit - 1) :]]
    return list(ids[len(ids) - limit :])
