"""Texts and message lists: one clean form for both, and where an implicit prompt ends."""

from __future__ import annotations

import json
from collections.abc import Sequence
from enum import StrEnum
from typing import Any, Literal, TypeAlias

OnBadRow = Literal["drop", "raise"]
Message: TypeAlias = dict[str, Any]
TextOrMessages: TypeAlias = "str | list[Message]"

HH_TURN = "\n\nAssistant:"


class Fault(StrEnum):
    """Why a row cannot be used: the names under which dropped rows are counted."""

    MISSING_FIELD = "missing field"
    WRONG_TYPE = "wrong type"
    EMPTY_PROMPT = "empty prompt"
    EMPTY_COMPLETION = "empty completion"
    IDENTICAL_COMPLETIONS = "identical completions"
    IDENTICAL_AFTER_CUT = "identical after cutting"
    NO_ROOM = "prompt leaves no room for a completion"
    PROMPT_TOO_LONG = "prompt too long"
    TOO_LONG = "too long for max_length"
    REFUSED_BY_TEMPLATE = "refused by the chat template"
    NOT_A_PREFIX = "prompt is not a token prefix"
    SINGLE_RESPONSE = "fewer than two responses"
    LENGTH_MISMATCH = "unequal numbers of responses and scores"
    BAD_SEPARATOR = "not exactly one <sep>"
    DIFFERENT_PROMPTS = "responses to different prompts"
    ALL_TIED = "all scores tied"
    EMPTY_RESPONSE = "empty response"
    BAD_SCORE = "score not finite"


class BadRow(ValueError):
    """Raised for one row that cannot be used; `reason` is a `Fault` (or its name), `detail` says what was found."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = str(reason)
        self.detail = detail


def check_on_bad_row(value: str) -> None:
    """Raise a ValueError unless `on_bad_row` is "drop" or "raise"."""
    if value not in ("drop", "raise"):
        raise ValueError(f'on_bad_row must be "drop" or "raise", not {value!r}.')


def without_none(value: Any) -> Any:
    """Remove the None entries of dictionaries at any depth, which Arrow adds where rows have different keys."""
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_none(item) for item in value]
    return value


def clean_text(value: Any, field: str) -> TextOrMessages:
    """Return a string unchanged, and a message list without None entries and with its text parts joined.

    Raises:
        BadRow: the value is missing or is neither a string nor a list of messages.
        ValueError: a message holds an image, audio or video part.
    """
    if value is None:
        raise BadRow(Fault.MISSING_FIELD, f"`{field}` is missing")
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(item, dict) and isinstance(item.get("role"), str) for item in value):
        return [_clean_message(message, field) for message in value]
    raise BadRow(
        Fault.WRONG_TYPE, f"`{field}` is neither a string nor a list of messages with a role: {_short(value)}"
    )


def _clean_message(message: Message, field: str) -> Message:
    cleaned: Message = without_none(message)
    content = cleaned.get("content")
    if isinstance(content, list):
        cleaned["content"] = _join_parts(content, field)
    elif content is None and not cleaned.get("tool_calls"):
        raise BadRow(Fault.MISSING_FIELD, f"a message of `{field}` has no content")
    elif content is not None and not isinstance(content, str):
        raise BadRow(Fault.WRONG_TYPE, f"the content of a message of `{field}` is not text: {_short(content)}")
    return cleaned


def _join_parts(parts: list[Any], field: str) -> str:
    kinds = {part.get("type") if isinstance(part, dict) else type(part).__name__ for part in parts} - {"text"}
    if kinds:
        raise ValueError(
            f"A message of `{field}` holds a part of type {sorted(map(str, kinds))}: only text is supported."
        )
    return "".join(part.get("text") or "" for part in parts)


def clean_tools(value: Any) -> list[Any] | None:
    """Read the tools of a row: a list (of mappings or of JSON strings) or a JSON string; None where there are none."""
    if isinstance(value, str):
        value = _from_json(value, "tools") if value.strip() else None
    if not value:
        return None
    if not isinstance(value, list):
        raise BadRow(Fault.WRONG_TYPE, f"`tools` is not a list: {_short(value)}")
    return without_none([_from_json(tool, "tools") if isinstance(tool, str) else tool for tool in value])


def clean_template_kwargs(value: Any) -> dict[str, Any] | None:
    """Read the `chat_template_kwargs` of a row (a mapping or JSON) without None entries; None where there are none."""
    if isinstance(value, str):
        value = _from_json(value, "chat_template_kwargs")
    if value is None:
        return None
    if not isinstance(value, dict):
        raise BadRow(Fault.WRONG_TYPE, f"`chat_template_kwargs` is not a mapping: {_short(value)}")
    return without_none(value) or None


def _from_json(text: str, field: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise BadRow(Fault.WRONG_TYPE, f"`{field}` is not JSON ({error})") from error


def as_messages(prompt: TextOrMessages) -> list[Message]:
    """Return `prompt` as messages; a string becomes one user turn."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def is_blank(text: TextOrMessages) -> bool:
    """Return True where nothing but white space would be scored."""
    if isinstance(text, str):
        return not text.strip()
    return all(not (message.get("content") or "").strip() and not message.get("tool_calls") for message in text)


def split_prompt(
    prompt: TextOrMessages | None, responses: Sequence[TextOrMessages]
) -> tuple[TextOrMessages, list[TextOrMessages]]:
    """Separate the prompt from the responses, where it is given, partly given, or only implied.

    - No prompt: the longest common beginning of the responses is the prompt; see `common_beginning`.
    - String prompt, message responses: responses that hold the whole conversation imply their prompt; responses that
      start with the assistant's turn answer the string as a user turn.
    - Message prompt, string responses: each string is the assistant's turn.
    - Message prompt that every response repeats: it is taken off the responses.
    """
    strings = [isinstance(response, str) for response in responses]
    if any(strings) and not all(strings):
        raise BadRow(Fault.WRONG_TYPE, "one completion is a string, another a list of messages")
    if not all(strings) and not all(responses):
        raise BadRow(Fault.MISSING_FIELD, "a completion is an empty list of messages")
    if prompt is None:
        return _implied(responses)
    if isinstance(prompt, str):
        if all(strings):
            return prompt, list(responses)
        if all(response[0]["role"] == "assistant" for response in responses):  # type: ignore[index]
            return as_messages(prompt), list(responses)
        return _implied(responses)
    if not prompt:
        raise BadRow(Fault.EMPTY_PROMPT, "`prompt` is an empty list of messages")
    if all(strings):
        return prompt, [[{"role": "assistant", "content": response}] for response in responses]
    if all(len(response) > len(prompt) and response[: len(prompt)] == prompt for response in responses):
        return prompt, [response[len(prompt) :] for response in responses]
    return prompt, list(responses)


def _implied(responses: Sequence[TextOrMessages]) -> tuple[TextOrMessages, list[TextOrMessages]]:
    length = common_beginning(responses)
    return responses[0][:length], [response[length:] for response in responses]


def common_beginning(responses: Sequence[TextOrMessages]) -> int:
    """Count the leading units (turns of messages, characters of strings) that belong to the implied prompt.

    The longest common beginning, but never the whole of the shortest response. In strings, a space before the
    difference goes to the completions; in dialogues of HH's form the prompt ends with the last shared "Assistant:",
    even where the answers begin with the same words.
    """
    shortest = min(len(response) for response in responses)
    if shortest == 0:
        return 0
    first = responses[0]
    length = next(
        (index for index in range(shortest) if any(other[index] != first[index] for other in responses)), None
    )
    if isinstance(first, str):
        if first.lstrip().startswith("Human:"):
            turn = first.rfind(HH_TURN, 0, shortest if length is None else length)
            if turn >= 0:
                return min(turn + len(HH_TURN), shortest)
        if length and first[length - 1] == " ":
            length -= 1
    return shortest - 1 if length is None else length


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
