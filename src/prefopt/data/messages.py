"""Texts and message lists: one clean form for both, and where an implicit prompt ends."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Sequence
from enum import StrEnum
from typing import Any, Literal, TypeAlias

from transformers import PreTrainedTokenizerBase

OnBadRow = Literal["drop", "raise"]
Message: TypeAlias = dict[str, Any]
TextOrMessages: TypeAlias = "str | list[Message]"

HH_TURN, HH_QUESTION = "\n\nAssistant:", "\n\nHuman:"
ASSISTANT = "assistant"
# a list of messages written as text, such as a cell of a CSV file: JSON, or what Python or numpy print
MESSAGES_AS_TEXT = re.compile(
    r"""\s*(array\()?\s*\[\s*\{(?=.*['"](role|from)['"]\s*:)(?=.*['"](content|value|tool_calls)['"]\s*:)""", re.DOTALL
)
# parameters of the tokenizer's function, which are none of the template
RESERVED_SETTINGS = frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) | {"messages"}
# what a row gives its template: rows are data, and a template may repeat a text or count up to a number
MOST_SETTING_BYTES, MOST_SETTING_DEPTH, LARGEST_SETTING = 65_536, 16, 10_000_000
# names that other forms of data have for a role; most templates write any name into a header that no model has seen
OTHER_ROLES = {"human": "user", "gpt": ASSISTANT, "bot": ASSISTANT, "chatbot": ASSISTANT}
KNOWN_ROLES = ("system", "user", ASSISTANT, "tool", "developer")
# a string prompt this long at the beginning of all completions is no accident
REPEATED_CHARACTERS = 20


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
    BAD_NUMBER = "number not finite"
    NO_ANSWER = "completion does not end with an assistant turn"
    REPEATS_PROMPT = "completion repeats the prompt"
    FORBIDDEN_SETTING = "template setting that a row may not make"
    LARGE_SETTING = "template setting that is too large"
    TEXT_LOST = "text lost in the chat template"
    PROMPT_LOST = "prompt that is in no turn"
    PROMPT_CHANGES = "prompt that the chat template changes once an answer follows"
    TEMPLATED = "templated already"
    NOT_JSON = "conversation that is a string"


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
    """Remove the None entries of dictionaries at any depth, which Arrow adds where rows have different keys.

    The arguments of a tool call are left as they are: a null among them may be what the model said.
    """
    if isinstance(value, dict):
        return {
            key: item if key == "arguments" else without_none(item) for key, item in value.items() if item is not None
        }
    if isinstance(value, list):
        return [without_none(item) for item in value]
    return value


def clean_text(value: Any, field: str, tools: Sequence[Any] | None = None) -> TextOrMessages:
    """Return a string unchanged, and a message list without None entries and with its text parts joined.

    Args:
        value: a string, a list of messages, or such a list as JSON.
        field: names it in errors.
        tools: the row's tools; a null argument that the called tool does not declare was put there by Arrow and goes.

    Raises:
        BadRow: the value is missing, is neither a string nor a list of messages, or is a list that was written as text
            and is not JSON.
        ValueError: a message holds an image, audio or video part.
    """
    if value is None:
        raise BadRow(Fault.MISSING_FIELD, f"`{field}` is missing")
    if isinstance(value, str):
        if not MESSAGES_AS_TEXT.match(value):
            return value
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            found = f"`{field}` looks like a list of messages and is not JSON: {_short(value)}"
            raise BadRow(Fault.NOT_JSON, found) from error
    if isinstance(value, list) and all(isinstance(item, dict) and isinstance(item.get("role"), str) for item in value):
        return [_clean_message(message, field, tools or []) for message in value]
    raise BadRow(
        Fault.WRONG_TYPE, f"`{field}` is neither a string nor a list of messages with a role: {_short(value)}"
    )


def _clean_message(message: Message, field: str, tools: Sequence[Any]) -> Message:
    cleaned: Message = without_none(message)
    content, role = cleaned.get("content"), cleaned["role"]
    lowered = role.strip().lower()
    meant = OTHER_ROLES.get(lowered, lowered if lowered in KNOWN_ROLES else role)
    if meant != role:
        raise BadRow(Fault.WRONG_TYPE, f"a turn of `{field}` has the role {role!r}, which must be {meant!r}")
    if isinstance(cleaned.get("tool_calls"), list):
        cleaned["tool_calls"] = [_clean_call(call, tools) for call in cleaned["tool_calls"]]
    if isinstance(content, list):
        cleaned["content"] = _join_parts(content, field)
    elif content is None and not cleaned.get("tool_calls"):
        raise BadRow(Fault.MISSING_FIELD, f"a message of `{field}` has no content")
    elif content is not None and not isinstance(content, str):
        raise BadRow(Fault.WRONG_TYPE, f"the content of a message of `{field}` is not text: {_short(content)}")
    return cleaned


def _clean_call(call: Any, tools: Sequence[Any]) -> Any:
    """Drop null arguments that the called tool does not declare; keep all where its declaration is not at hand."""
    function: Any = call.get("function", call) if isinstance(call, dict) else None
    arguments = function.get("arguments") if isinstance(function, dict) else None
    if not isinstance(arguments, dict):
        return call
    for tool in tools:
        declared = tool.get("function", tool) if isinstance(tool, dict) else None
        if isinstance(declared, dict) and declared.get("name") == function.get("name"):
            known = (declared.get("parameters") or {}).get("properties")
            if isinstance(known, dict):
                kept = {key: item for key, item in arguments.items() if item is not None or key in known}
                function = {**function, "arguments": kept}
                return {**call, "function": function} if "function" in call else function
    return call


def _join_parts(parts: list[Any], field: str) -> str:
    kinds = {part.get("type") if isinstance(part, dict) else type(part).__name__ for part in parts} - {"text"}
    if kinds:
        raise ValueError(
            f"A message of `{field}` holds a part of type {sorted(map(str, kinds))}: only text is supported."
        )
    for part in parts:
        if not isinstance(part.get("text", ""), str):
            raise BadRow(Fault.WRONG_TYPE, f"a text part of `{field}` is not text: {_short(part['text'])}")
    return "".join(part.get("text", "") for part in parts)


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
    """Read the `chat_template_kwargs` of a row (a mapping or JSON) without None entries; None where there are none.

    Raises:
        BadRow: it is no mapping, it sets what is not the template's (rows are data, and may not replace the template,
            pad, or return something else), or a value is too large.
    """
    if isinstance(value, str):
        value = _from_json(value, "chat_template_kwargs")
    if value is None:
        return None
    if not isinstance(value, dict):
        raise BadRow(Fault.WRONG_TYPE, f"`chat_template_kwargs` is not a mapping: {_short(value)}")
    refused = sorted(name for name in value if name in RESERVED_SETTINGS or str(name).endswith("_token"))
    if refused:
        raise BadRow(Fault.FORBIDDEN_SETTING, f"`chat_template_kwargs` of a row may not set {', '.join(refused)}")
    _check_setting_size(value)
    return without_none(value) or None


def _check_setting_size(value: dict[str, Any]) -> None:
    """Raise a BadRow for template settings that are long, deep, or hold a number that a template could count up to."""
    level: list[Any] = [value]
    size = 0
    for _ in range(MOST_SETTING_DEPTH + 1):
        if not level:
            return
        size += sum(len(item) if isinstance(item, str) else 8 for item in level)
        if size > MOST_SETTING_BYTES:
            raise BadRow(Fault.LARGE_SETTING, f"`chat_template_kwargs` holds more than {MOST_SETTING_BYTES} bytes")
        for item in level:
            if isinstance(item, (int, float)) and not -LARGEST_SETTING <= item <= LARGEST_SETTING:
                raise BadRow(
                    Fault.LARGE_SETTING, f"`chat_template_kwargs` holds {item!r:.40}, beyond {LARGEST_SETTING}"
                )
        inner = [[*item.keys(), *item.values()] if isinstance(item, dict) else item for item in level]
        level = [each for item in inner if isinstance(item, (list, tuple)) for each in item]
    raise BadRow(Fault.LARGE_SETTING, f"`chat_template_kwargs` is nested more than {MOST_SETTING_DEPTH} deep")


def _from_json(text: str, field: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # too many digits, too deep
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
        implied, answers = _implied(responses)
        _check_same_prompt(prompt, as_messages(implied))
        return implied, answers
    if not prompt:
        raise BadRow(Fault.EMPTY_PROMPT, "`prompt` is an empty list of messages")
    if all(strings):
        return prompt, [[{"role": "assistant", "content": response}] for response in responses]
    if all(len(response) > len(prompt) and response[: len(prompt)] == prompt for response in responses):
        return prompt, [response[len(prompt) :] for response in responses]
    return prompt, list(responses)


def check_answers(prompt: TextOrMessages, responses: Sequence[TextOrMessages]) -> None:
    """Check that what is scored are answers to the prompt.

    Raises:
        BadRow: a completion does not end with an assistant turn, has an empty one, or has turns of its prompt, in the
            same words or in others: a system turn, or a user turn that does not follow an answer.
    """
    if isinstance(prompt, str):
        written = prompt.strip()
        if len(written) >= REPEATED_CHARACTERS and all(str(each).lstrip().startswith(written) for each in responses):
            raise BadRow(
                Fault.REPEATS_PROMPT, f"all completions begin with the prompt {_short(written)}; leave it out of them"
            )
        for each in map(str, responses):
            if HH_TURN.strip() in prompt and each.rfind(HH_QUESTION) > each.rfind(HH_TURN):
                raise BadRow(Fault.NO_ANSWER, f"it ends with a turn of the human: {_short(each[-60:])}")
        return
    for turns in responses:
        roles = [turn["role"] for turn in turns]  # type: ignore[index]
        if ASSISTANT not in roles or roles[-1] != ASSISTANT:
            raise BadRow(Fault.NO_ANSWER, f"its turns are those of {', '.join(roles)}")
        if any(is_blank([turn]) for turn in turns if turn["role"] == ASSISTANT):  # type: ignore[index, list-item]
            raise BadRow(Fault.EMPTY_COMPLETION, "one of its assistant turns is empty")
        before = [turn["role"] for turn in prompt][-1:]
        if "system" in roles or (roles[0] == "user" and before != [ASSISTANT]):
            raise BadRow(Fault.REPEATS_PROMPT, f"it begins with a {roles[0]} turn after the prompt's {before[0]} turn")


def _check_same_prompt(prompt: str, turns: list[Message]) -> None:
    """Raise a BadRow for a string beside conversations that share no turn with it: it would not be read."""
    written, texts = plain_words(prompt), [plain_words(str(turn.get("content") or "")) for turn in turns]
    if turns and not any(text and (text in written or written in text) for text in texts):
        raise BadRow(
            Fault.PROMPT_LOST,
            f"`prompt` {_short(prompt)} is in no turn of the conversations: map it (`columns: {{system: prompt}}`) or "
            "leave it out",
        )


def plain_words(text: str) -> str:
    """Return a text for comparisons, whatever its white space and letter case."""
    return " ".join(text.split()).casefold()


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
