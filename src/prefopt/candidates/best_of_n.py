"""Rejection sampling: the best of a prompt's scored candidates becomes a supervised example, or a pair. Pure functions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from prefopt.candidates.pairs import select_pairs
from prefopt.candidates.records import context_as_text

Form = Literal["sft", "pairs"]


def best_of_n(texts: Sequence[str], scores: Sequence[float]) -> int | None:
    """Index of the highest-scoring candidate that is not blank, the first of equals; None where all are blank.

    Args:
        texts: n candidates of one prompt.
        scores: (n,) higher is better.

    Raises:
        ValueError: lengths that differ, or a score that is not finite.

    Reference: arXiv 2311.08045 ("RJS").
    """
    if len(texts) != len(scores):
        raise ValueError(f"{len(texts)} candidates but {len(scores)} scores.")
    if bad := [index for index, score in enumerate(scores) if not math.isfinite(score)]:
        raise ValueError(f"The score of candidate {bad[0]} is {scores[bad[0]]}; scores must be finite.")
    full = [index for index, text in enumerate(texts) if text.strip()]
    return max(full, key=lambda index: (scores[index], -index)) if full else None


def best_of_n_rows(
    records: Iterable[Mapping[str, Any]], *, form: Form = "sft"
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Training rows from scored candidates: `prompt` and `completion` for supervised training, or pairs of best and worst.

    Args:
        records: each with `prompt` (a string or a message list), `responses` (n strings) and `scores` (n numbers); `tools` and
            `chat_template_kwargs` are kept, other keys left out.
        form: "sft": the best response of each prompt (any n >= 1), for TRL's SFTTrainer; "pairs": best against worst response that
            is not blank (n >= 2), for the pair trainers, with their scores as `chosen_score` and `rejected_score`.

    Returns:
        The rows in the order of the records, and how many records were dropped for which reason ("all responses blank",
        "fewer than two responses", "all scores tied").

    Raises:
        ValueError: an unknown form; a record without one of the keys, with unequal lengths, or with a score that is not finite.
    """
    if form not in ("sft", "pairs"):
        raise ValueError(f"form must be 'sft' or 'pairs', got {form!r}.")
    rows: list[dict[str, Any]] = []
    dropped: Counter[str] = Counter()
    for number, record in enumerate(records):
        if missing := [name for name in ("prompt", "responses", "scores") if name not in record]:
            raise ValueError(f"Record {number} has no `{missing[0]}`.")
        try:
            row = _row(record, form)
        except ValueError as error:
            raise ValueError(f"Record {number}: {error}") from error
        if isinstance(row, str):
            dropped[row] += 1
        else:
            rows.append(row)
    return rows, dropped


def _row(record: Mapping[str, Any], form: Form) -> dict[str, Any] | str:
    """The training row, or why there is none."""
    prompt, texts, scores = record["prompt"], list(record["responses"]), list(record["scores"])
    best = best_of_n(texts, scores)
    if best is None:
        return "all responses blank"
    context: dict[str, Any] = {**context_as_text(record)}
    if form == "sft":
        if context.get("chat_template_kwargs"):  # which TRL's trainer takes as a mapping only
            context["chat_template_kwargs"] = record["chat_template_kwargs"]
        return {"prompt": prompt, "completion": as_turn(prompt, texts[best]), **context}
    full = [index for index, text in enumerate(texts) if text.strip()]
    if len(full) < 2:
        return "fewer than two responses"
    texts, scores = [texts[index] for index in full], [scores[index] for index in full]
    pairs = select_pairs(texts, scores, policy="best_worst")
    if not pairs:
        return "all scores tied"
    chosen, rejected = pairs[0].chosen, pairs[0].rejected
    return {
        "prompt": prompt,
        "chosen": as_turn(prompt, texts[chosen]),
        "rejected": as_turn(prompt, texts[rejected]),
        "chosen_score": float(scores[chosen]),
        "rejected_score": float(scores[rejected]),
        **context,
    }


def as_turn(prompt: Any, text: str) -> Any:
    """A response in the form of its prompt: text after text, an assistant's message after messages."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
