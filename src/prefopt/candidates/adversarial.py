"""Adversarial pairs: for each prompt, a golden answer against every answer that the policy sampled. Pure functions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from prefopt.candidates.best_of_n import as_turn
from prefopt.candidates.records import context_as_text
from prefopt.data.comparisons import ADVERSARIAL_TYPE

NO_SAMPLES = "golden answer without samples"
NO_GOLDEN = "samples without a golden answer"
BLANK_GOLDEN = "blank golden answer"
BLANK_SAMPLE = "blank sample"
SAME = "sample equals the golden answer"

_NEXT_TURN = "\nHuman:"


def adversarial_pairs(
    golden: Iterable[Mapping[str, Any]], samples: Iterable[Mapping[str, Any]], *, on_unmatched: str = "drop"
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Comparison rows for AdversarialRewardTrainer: one per sample, golden answer first, `scores` 1 and 0, `type` "apo".

    A sample or golden answer that goes on with the next human turn is cut before it. Samples are matched with golden answers by id; rows come
    in the order of the samples.

    Args:
        golden: records with `query_id` (or `prompt_id`) and `golden`, a string.
        samples: records with the same id, `query` (or `prompt`, a string or messages) and the samples: `sample_0`, `sample_1`, ..., or
            `candidates`, each with `text` (what `prefopt generate` writes).
        on_unmatched: "drop" leaves out golden answers without samples and samples without golden answer, and counts them; "raise" refuses.

    Returns:
        The rows, and how many golden answers or samples were left out for which reason.

    Raises:
        ValueError: a record without one of its keys, an id that occurs twice, no row at all, or, with "raise", an unmatched record.

    Reference: arXiv 2311.08045 and its released converter.
    """
    if on_unmatched not in ("drop", "raise"):
        raise ValueError(f'on_unmatched must be "drop" or "raise", not {on_unmatched!r}.')
    by_id = _by_id(samples, "samples")
    answers = {
        key: _text(record, "golden", f"golden record {key!r}") for key, record in _by_id(golden, "golden").items()
    }
    left_out: Counter[str] = Counter()
    for reason, missing in ((NO_SAMPLES, answers.keys() - by_id.keys()), (NO_GOLDEN, by_id.keys() - answers.keys())):
        if missing and on_unmatched == "raise":
            raise ValueError(f"{len(missing)} ids with {reason}, {min(missing)!r} among them.")
        if missing:
            left_out[reason] += len(missing)
    rows: list[dict[str, Any]] = []
    for key, record in by_id.items():
        if key not in answers:
            continue
        texts = _samples(record, key)
        if not texts:
            raise ValueError(f"Samples record {key!r} has neither `sample_0` nor `candidates`.")
        rows += _rows(record, key, answers[key], texts, left_out)
    if not rows:
        raise ValueError(f"No golden answer meets a sample: {dict(left_out)}.")
    return rows, left_out


def _rows(
    record: Mapping[str, Any], key: str, golden: str, texts: list[str], left_out: Counter[str]
) -> list[dict[str, Any]]:
    prompt = record.get("prompt") if record.get("prompt") is not None else record.get("query")
    if prompt is None:
        raise ValueError(f"Samples record {key!r} has neither `prompt` nor `query`.")
    golden = first_turn(golden)
    if not golden.strip():
        left_out[BLANK_GOLDEN] += 1
        return []
    rows = []
    for number, text in enumerate(map(first_turn, texts)):
        if not text.strip():
            left_out[BLANK_SAMPLE] += 1
        elif text.strip() == golden.strip():
            left_out[SAME] += 1
        else:
            responses = [as_turn(prompt, golden), as_turn(prompt, text)]
            rows.append(
                {
                    "query_id": key,
                    "sample": number,
                    "prompt": prompt,
                    "responses": responses,
                    "scores": [1.0, 0.0],
                    "type": ADVERSARIAL_TYPE,
                    **context_as_text(record),
                }
            )
    return rows


def first_turn(text: str) -> str:
    """The text before the next human turn of a dialogue ("\\nHuman:"), stripped where something was cut."""
    head, cut, _ = text.partition(_NEXT_TURN)
    return head.strip() if cut else text


def _by_id(records: Iterable[Mapping[str, Any]], name: str) -> dict[str, Mapping[str, Any]]:
    found: dict[str, Mapping[str, Any]] = {}
    for number, record in enumerate(records):
        key = record.get("query_id") if record.get("query_id") is not None else record.get("prompt_id")
        if key is None:
            raise ValueError(f"Record {number} of the {name} has neither `query_id` nor `prompt_id`.")
        if str(key) in found:
            raise ValueError(f"The id {key!r} occurs twice in the {name}.")
        found[str(key)] = record
    return found


def _samples(record: Mapping[str, Any], key: str) -> list[str]:
    if record.get("candidates") is not None:
        return [_text(candidate, "text", f"a candidate of {key!r}") for candidate in record["candidates"]]
    numbers = sorted(int(name[7:]) for name in record if name.startswith("sample_") and name[7:].isdecimal())
    return [_text(record, f"sample_{number}", f"samples record {key!r}") for number in numbers]


def _text(record: Mapping[str, Any], name: str, where: str) -> str:
    value = record.get(name)
    if not isinstance(value, str):
        raise ValueError(f"`{name}` of {where} is {value!r}, not a string.")
    return value
