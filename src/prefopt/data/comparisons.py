"""Comparison rows for reward models: a prompt, R >= 2 responses, a score for each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from prefopt.data.faults import (
    ALL_TIED,
    BAD_SCORE,
    BAD_SEPARATOR,
    DIFFERENT_PROMPTS,
    EMPTY_RESPONSE,
    LENGTH_MISMATCH,
    MISSING_FIELD,
    SINGLE_RESPONSE,
    WRONG_TYPE,
    BadRow,
)
from prefopt.data.messages import Text, clean_text, is_blank, split_prompt
from prefopt.data.rows import Row, context_of, normalise_pair, number, raise_recorded_fault, row_id

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
