"""What can be wrong with a row, and the exception that carries it."""

from __future__ import annotations

from typing import Literal

OnBadRow = Literal["drop", "raise"]

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
    """One row that cannot be used; `reason` is one of the names above, `detail` says what was found."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def check_on_bad_row(value: str) -> None:
    """Refuse any setting of `on_bad_row` but "drop" and "raise"."""
    if value not in ("drop", "raise"):
        raise ValueError(f'on_bad_row must be "drop" or "raise", not {value!r}.')
