"""The row schema: whatever shape a preference dataset has, its rows become `prompt`, `chosen`, `rejected`.

Strings stay strings and message lists stay message lists. Columns that a loss can use are kept under one name each.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeAlias

from prefopt.data.messages import (
    ALL_TIED,
    BAD_SCORE,
    BAD_SEPARATOR,
    DIFFERENT_PROMPTS,
    EMPTY_COMPLETION,
    EMPTY_PROMPT,
    EMPTY_RESPONSE,
    IDENTICAL_COMPLETIONS,
    LENGTH_MISMATCH,
    MISSING_FIELD,
    SINGLE_RESPONSE,
    WRONG_TYPE,
    BadRow,
    Text,
    clean_template_kwargs,
    clean_text,
    clean_tools,
    is_blank,
    split_prompt,
)
from prefopt.files import content_hash

Kind: TypeAlias = Literal["pairs", "comparisons", "prompts", "any"]
Row: TypeAlias = dict[str, Any]

# numbers that losses and caches read; the references' are a number, or one number for each reference
METHOD_COLUMNS = (
    "chosen_win_prob",
    "rejected_win_prob",
    "chosen_over_rejected_prob",
    "chosen_score",
    "rejected_score",
    "margin",
)
REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps", "ref_chosen_counts", "ref_rejected_counts")
# the SPPO repository's names
COLUMN_ALIASES = {
    "chosen_probs": "chosen_over_rejected_prob",
    "chosen_probs_win": "chosen_win_prob",
    "chosen_probs_lose": "rejected_win_prob",
}
TOKENISED_PAIR_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
TOKENISED_COMPARISON_COLUMNS = ("prompt_ids", "response_ids", "scores")
CONTEXT_COLUMNS = ("tools", "chat_template_kwargs")

_PAIR_SHAPES = (
    ("prompt", "chosen", "rejected"),
    ("chosen", "rejected"),
    ("messages", "rejected_response"),
    TOKENISED_PAIR_COLUMNS,
)
ACCEPTED_SHAPES: dict[str, tuple[tuple[str, ...], ...]] = {
    "pairs": _PAIR_SHAPES,
    "comparisons": (
        ("prompt", "responses", "scores"),
        ("text", "scores"),
        TOKENISED_COMPARISON_COLUMNS,
        *_PAIR_SHAPES[:3],
    ),
    "prompts": (("prompt",), ("messages",), *_PAIR_SHAPES[1:3]),
}


def is_tokenised(columns: Iterable[str], kind: Kind = "pairs") -> bool:
    """True where the rows hold token ids already."""
    present = set(columns)
    if kind == "comparisons":
        return present.issuperset(TOKENISED_COMPARISON_COLUMNS)
    return kind == "pairs" and present.issuperset(TOKENISED_PAIR_COLUMNS)


def check_columns(columns: Iterable[str], kind: Kind, *, where: str = "The dataset") -> None:
    """Refuse a dataset whose columns cannot be read as rows of `kind`.

    Raises:
        ValueError: images, both names of one column, or no accepted set of columns; the message lists what was found.
    """
    present = set(columns)
    pictures = sorted(present & {"image", "images", "videos", "audios"})
    if pictures:
        raise ValueError(
            f"{where} has the column {pictures[0]!r}: only text is supported. If the column is not needed, leave it "
            "out "
            "with `columns`."
        )
    for alias, name in COLUMN_ALIASES.items():
        if {alias, name} <= present:
            raise ValueError(
                f"{where} has both {alias!r} and {name!r}, two names of one column; keep one with `columns`."
            )
    if kind == "any" or any(present.issuperset(shape) for shape in ACCEPTED_SHAPES[kind]):
        return
    accepted = "; ".join(" + ".join(shape) for shape in ACCEPTED_SHAPES[kind])
    raise ValueError(f"{where} has the columns {sorted(present)}. Rows of {kind} need one of: {accepted}.")


def context_of(row: Mapping[str, Any]) -> Row:
    """The cleaned `tools` and `chat_template_kwargs` of a row, each only where it has one."""
    context = {
        "tools": clean_tools(row.get("tools")),
        "chat_template_kwargs": clean_template_kwargs(row.get("chat_template_kwargs")),
    }
    return {name: value for name, value in context.items() if value is not None}


def method_values(row: Mapping[str, Any]) -> Row:
    """The method columns of a row under their own names, as floats (or lists of floats, one for each reference)."""
    values: Row = {}
    for column in (*METHOD_COLUMNS, *REFERENCE_COLUMNS, *COLUMN_ALIASES):
        if column in row:
            values[COLUMN_ALIASES.get(column, column)] = number(row[column], column)
    return values


def number(value: Any, column: str) -> float | list[float | None] | None:
    """A number, nothing, or (of references) a list of them; anything else is a fault of the row."""
    if value is None:
        return None
    if isinstance(value, list) and column in REFERENCE_COLUMNS:
        return [None if item is None else float(item) for item in value]
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise BadRow(WRONG_TYPE, f"`{column}` is not a number: {value!r}") from error


def row_id(prompt: Text, responses: list[Text], context: Mapping[str, Any]) -> str:
    """A stable name of a row: 16 hex digits of the hash of its content, whatever its place or its other columns."""
    return content_hash(prompt, responses, *([dict(context)] if context else []))[:16]


def raise_recorded_fault(row: Mapping[str, Any]) -> None:
    """Raise the fault that an earlier normalisation recorded in the row, if there is one."""
    if row.get("fault"):
        raise BadRow(str(row["fault"]), str(row.get("fault_detail") or ""))


def normalise_pair(row: Mapping[str, Any]) -> Row:
    """One preference row in the schema: `row_id`, `prompt`, `chosen`, `rejected`, its context and its method columns.

    Args:
        row: explicit (`prompt`, `chosen`, `rejected`) or implicit prompt (`chosen`, `rejected`), strings or message
            lists; or `messages` and `rejected_response`.

    Raises:
        BadRow: a field is missing, of the wrong type or empty, or both completions are the same.
    """
    raise_recorded_fault(row)
    prompt, (chosen, rejected) = _pair_texts(row)
    if is_blank(chosen) or is_blank(rejected):
        raise BadRow(EMPTY_COMPLETION, f"`{'chosen' if is_blank(chosen) else 'rejected'}` is empty")
    if chosen == rejected:
        raise BadRow(IDENTICAL_COMPLETIONS, "`chosen` and `rejected` are the same")
    if isinstance(prompt, list) and not prompt:
        raise BadRow(EMPTY_PROMPT, "`chosen` and `rejected` share no turn, and there is no `prompt`")
    context = context_of(row)
    identity = row_id(prompt, [chosen, rejected], context)
    return {
        "row_id": identity,
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
        **context,
        **method_values(row),
    }


def _pair_texts(row: Mapping[str, Any]) -> tuple[Text, list[Text]]:
    if "chosen" not in row and "messages" in row:
        return _from_conversation(row)
    chosen, rejected = clean_text(row.get("chosen"), "chosen"), clean_text(row.get("rejected"), "rejected")
    prompt = clean_text(row["prompt"], "prompt") if "prompt" in row else None
    return split_prompt(prompt, [chosen, rejected])


def _from_conversation(row: Mapping[str, Any]) -> tuple[Text, list[Text]]:
    """`messages`, a conversation that ends with the chosen answer, beside `rejected_response` (ms-swift's form)."""
    messages = clean_text(row["messages"], "messages")
    rejected = clean_text(row.get("rejected_response"), "rejected_response")
    if isinstance(messages, str) or not messages or messages[-1]["role"] != "assistant":
        raise BadRow(MISSING_FIELD, "`messages` does not end with an assistant turn, the chosen answer")
    answer: Text = [{"role": "assistant", "content": rejected}] if isinstance(rejected, str) else rejected
    return messages[:-1], [messages[-1:], answer]


def normalise_prompt(row: Mapping[str, Any]) -> Row:
    """The prompt of a row of any shape: `row_id`, `prompt` and its context; a final assistant turn of `messages` is cut.

    Raises:
        BadRow: the prompt is missing, of the wrong type or empty.
    """
    raise_recorded_fault(row)
    context = context_of(row)
    if row.get("chosen") is not None and row.get("rejected") is not None:
        prompt = _pair_texts(row)[0]
    elif "prompt" in row or "messages" not in row:
        prompt = clean_text(row.get("prompt"), "prompt")
    else:
        messages = clean_text(row["messages"], "messages")
        answered = isinstance(messages, list) and messages and messages[-1]["role"] == "assistant"
        prompt = messages[:-1] if answered else messages
    if is_blank(prompt):
        raise BadRow(EMPTY_PROMPT, "`prompt` is empty")
    return {"row_id": row_id(prompt, [], context), "prompt": prompt, **context}


SEPARATOR = "<sep>"
ADVERSARIAL_TYPE = "apo"


def normalise_comparison(row: Mapping[str, Any]) -> Row:
    """One comparison row: `row_id`, `prompt`, `responses`, `scores`, `is_adversarial`, and `margin` where it has one.

    Args:
        row: `prompt`, `responses`, `scores`; or `text` ("query<sep>response" strings) and `scores`, with
            `type: "apo"` for adversarial rows; or a preference pair, whose scores become 1 and 0.

    Raises:
        BadRow: fewer than two responses, unequal lengths, a missing separator, an empty response, scores that are
            not finite or are all the same.
    """
    raise_recorded_fault(row)
    if "responses" not in row and "text" not in row:
        return _from_pair(row)
    if row.get("responses") is not None:
        prompt, responses = _from_responses(row)
    else:
        prompt, responses = _from_separated(row)
    scores = check_scores(row.get("scores"), len(responses))
    for place, response in enumerate(responses):
        if is_blank(response):
            raise BadRow(EMPTY_RESPONSE, f"response {place} of {len(responses)} is empty")
    context = context_of(row)
    identity = row_id(prompt, responses, {**context, "scores": scores})
    return {"row_id": identity, "prompt": prompt, "responses": responses, "scores": scores, **_extras(row), **context}


def check_scores(value: Any, num_responses: int) -> list[float]:
    """The scores of `num_responses` responses as floats, refused where nothing can be learned from them."""
    if value is None:
        raise BadRow(MISSING_FIELD, "`scores` is missing")
    if not isinstance(value, list) or not all(isinstance(score, (int, float)) or score is None for score in value):
        raise BadRow(WRONG_TYPE, f"`scores` is not a list of numbers: {value!r}")
    if len(value) != num_responses:
        raise BadRow(LENGTH_MISMATCH, f"{num_responses} responses, {len(value)} scores")
    if num_responses < 2:
        raise BadRow(SINGLE_RESPONSE, f"{num_responses} response(s)")
    if not all(score is not None and math.isfinite(score) for score in value):
        raise BadRow(BAD_SCORE, f"scores {value!r}")
    if len(set(value)) == 1:
        raise BadRow(ALL_TIED, f"every score is {value[0]}")
    return [float(score) for score in value]


def _extras(row: Mapping[str, Any]) -> Row:
    extras: Row = {"is_adversarial": bool(row.get("is_adversarial")) or row.get("type") == ADVERSARIAL_TYPE}
    if row.get("margin") is not None:
        extras["margin"] = number(row["margin"], "margin")
    return extras


def _from_pair(row: Mapping[str, Any]) -> Row:
    pair = normalise_pair(row)
    context: Row = {name: pair[name] for name in ("tools", "chat_template_kwargs") if name in pair}
    responses, scores = [pair["chosen"], pair["rejected"]], [1.0, 0.0]
    identity = row_id(pair["prompt"], responses, {**context, "scores": scores})
    return {
        "row_id": identity,
        "prompt": pair["prompt"],
        "responses": responses,
        "scores": scores,
        **_extras(row),
        **context,
    }


def _from_responses(row: Mapping[str, Any]) -> tuple[Text, list[Text]]:
    if not isinstance(row["responses"], list):
        raise BadRow(WRONG_TYPE, f"`responses` is not a list: {row['responses']!r}")
    responses = [clean_text(response, "responses") for response in row["responses"]]
    prompt = clean_text(row.get("prompt"), "prompt")
    return split_prompt(prompt, responses) if responses else (prompt, [])


def _from_separated(row: Mapping[str, Any]) -> tuple[Text, list[Text]]:
    texts = row.get("text")
    if texts is None:
        raise BadRow(MISSING_FIELD, "`text` is missing")
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise BadRow(WRONG_TYPE, f'`text` is not a list of "query{SEPARATOR}response" strings')
    for text in texts:
        if text.count(SEPARATOR) != 1:
            raise BadRow(BAD_SEPARATOR, f"{SEPARATOR!r} stands {text.count(SEPARATOR)} times in {text[:60]!r}")
    halves = [text.split(SEPARATOR) for text in texts]
    prompts = {query for query, _ in halves}
    if len(prompts) > 1:
        raise BadRow(DIFFERENT_PROMPTS, f"{len(prompts)} different queries in one row")
    responses: list[Text] = [response for _, response in halves]
    return (prompts.pop() if prompts else ""), responses
