"""`prefopt build-rows`: training rows that are no pairs: best of n, all scored answers, golden against sampled."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from prefopt.arguments import check_settings, missing, setting
from prefopt.candidates.formats import BLANK_GOLDEN, clean_response, golden_fault, sample_columns
from prefopt.candidates.pairs import select_pairs
from prefopt.candidates.records import Record, context_as_text, read_records, score_name, scores_of
from prefopt.data.rows import ADVERSARIAL_TYPE, CONTEXT_COLUMNS, Row
from prefopt.data.sources import DataSource, load_source
from prefopt.files import write_json, write_jsonl

Form = Literal["sft", "pairs"]
NO_SAMPLES = "golden answer without samples"
NO_GOLDEN = "samples without a golden answer"
ALL_BLANK = "all responses blank"
SINGLE = "fewer than two responses"
TIED = "all scores tied"
_ADVERSARIAL = {"form": ("adversarial",)}


@dataclass
class BuildRowsArguments:
    """Which candidates are read, which rows are made, and where they go."""

    candidates: str = setting(
        "", "Candidates: the folder that `prefopt generate` or `rank` wrote, or a file.", required=True
    )
    output_dir: str = setting("", "Folder for train.jsonl and rows_report.json.", required=True)
    form: str = setting(
        "",
        "sft: the best-scored answer of each prompt (rejection sampling). comparisons: all scored answers of a prompt "
        "in a row, for RRHF and reward models. adversarial: the golden answer against each sample, for "
        "adversarial-reward-model.",
        choices=("sft", "comparisons", "adversarial"),
        required=True,
    )
    score: str | None = setting(
        None,
        "Name of the scores to use; may be left out where there is only one.",
        only_for={"form": ("sft", "comparisons")},
    )
    golden: str | None = setting(
        None,
        "adversarial: file or hub dataset with `golden` and the `prompt_id` (or `query_id`) of the candidates.",
        only_for=_ADVERSARIAL,
    )
    on_unmatched: str = setting(
        "drop",
        "adversarial: golden answers without samples and samples without golden answer are counted (drop) or an error "
        "(raise).",
        choices=("drop", "raise"),
        only_for=_ADVERSARIAL,
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if self.form == "adversarial" and self.golden is None:
            raise ValueError(missing("golden"))


def run(args: BuildRowsArguments) -> Path:
    """Write `train.jsonl` and `rows_report.json` to `output_dir`, and print what was left out.

    Returns:
        The file of rows.

    Raises:
        ValueError: candidates that do not fit the form, or no row at all.
    """
    records = read_records(args.candidates)
    if args.golden is not None:
        rows, dropped = adversarial_pairs(
            load_source(DataSource(args.golden)), records, on_unmatched=args.on_unmatched
        )
    else:
        scored = _scored(records, args.score)
        rows, dropped = best_of_n_rows(scored) if args.form == "sft" else comparison_rows(scored)
    if not rows:
        reasons = ", ".join(f"{number} x {reason}" for reason, number in dropped.most_common())
        raise ValueError(f"{args.candidates}: none of {len(records)} prompts gives a row ({reasons}).")
    path = Path(args.output_dir) / "train.jsonl"
    write_json(
        path.parent / "rows_report.json",
        {"form": args.form, "prompts": len(records), "rows": len(rows), "left out": dict(dropped)},
    )
    write_jsonl(path, rows)
    print(f"build-rows: {len(rows)} {args.form} rows from {len(records)} prompts -> {path}")
    for reason, number in dropped.items():
        print(f"build-rows: {number} left out: {reason}")
    return path


def _scored(records: Sequence[Record], wanted: str | None) -> list[Row]:
    name = score_name(records, wanted)
    if name is None:
        raise ValueError("The candidates have no scores; run `prefopt rank` first.")
    return [
        {
            "prompt": record["prompt"],
            "responses": [candidate["text"] for candidate in record["candidates"]],
            "scores": scores_of(record, name),
            **{name: record[name] for name in CONTEXT_COLUMNS if name in record},
        }
        for record in records
    ]


def best_of_n(texts: Sequence[str], scores: Sequence[float]) -> int | None:
    """Find the highest-scoring candidate that is not blank, the first of equals; None where all are blank.

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
    """Make rows of `prompt` and `completion` for supervised training, or pairs of best and worst.

    Args:
        records: each with `prompt` (a string or a message list), `responses` (n strings) and `scores` (n numbers);
            `tools` and `chat_template_kwargs` are kept, other keys left out.
        form: "sft": the best response of each prompt (any n >= 1), for TRL's SFTTrainer; "pairs": best against worst
            response that is not blank (n >= 2), for the pair trainers, with `chosen_score` and `rejected_score`.

    Returns:
        The rows in the order of the records, and how many records were dropped for which reason ("all responses
        blank", "fewer than two responses", "all scores tied").

    Raises:
        ValueError: an unknown form; a record without one of the keys, with unequal lengths, or with a score that is
            not finite.
    """
    if form not in ("sft", "pairs"):
        raise ValueError(f"form must be 'sft' or 'pairs', got {form!r}.")
    rows: list[dict[str, Any]] = []
    dropped: Counter[str] = Counter()
    for number, record in enumerate(records):
        if absent := [name for name in ("prompt", "responses", "scores") if name not in record]:
            raise ValueError(f"Record {number} has no `{absent[0]}`.")
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
    """Return the training row, or why there is none."""
    prompt, texts, scores = record["prompt"], list(record["responses"]), list(record["scores"])
    best = best_of_n(texts, scores)
    if best is None:
        return ALL_BLANK
    context: dict[str, Any] = {**context_as_text(record)}
    if form == "sft":
        if context.get("chat_template_kwargs"):  # which TRL's trainer takes as a mapping only
            context["chat_template_kwargs"] = record["chat_template_kwargs"]
        return {"prompt": prompt, "completion": as_turn(prompt, texts[best]), **context}
    texts, scores = _not_blank(texts, scores)
    if len(texts) < 2:
        return SINGLE
    pairs = select_pairs(texts, scores, policy="best_worst")
    if not pairs:
        return TIED
    chosen, rejected = pairs[0].chosen, pairs[0].rejected
    return {
        "prompt": prompt,
        "chosen": as_turn(prompt, texts[chosen]),
        "rejected": as_turn(prompt, texts[rejected]),
        "chosen_score": float(scores[chosen]),
        "rejected_score": float(scores[rejected]),
        **context,
    }


def _not_blank(texts: Sequence[str], scores: Sequence[float]) -> tuple[list[str], list[float]]:
    full = [index for index, text in enumerate(texts) if text.strip()]
    return [texts[index] for index in full], [scores[index] for index in full]


def as_turn(prompt: Any, text: str) -> Any:
    """Return a response in the form of its prompt: text after text, an assistant's message after messages."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def comparison_rows(records: Sequence[Row]) -> tuple[list[Row], Counter[str]]:
    """Make comparison rows of scored candidates: `prompt`, `responses` that are not blank, `scores`.

    Args:
        records: each with `prompt` (a string or messages), `responses` (R strings) and `scores` (R numbers); their
            `tools` and `chat_template_kwargs` are kept.

    Returns:
        The rows, and how many records were dropped for which reason, and blank responses left out.
    """
    rows: list[Row] = []
    dropped: Counter[str] = Counter()
    for record in records:
        texts, scores = _not_blank(record["responses"], record["scores"])
        dropped["blank responses"] += len(record["responses"]) - len(texts)
        if len(texts) < 2:
            dropped[SINGLE] += 1
        elif len(set(scores)) == 1:
            dropped[TIED] += 1
        else:
            turns = [as_turn(record["prompt"], text) for text in texts]
            rows.append({"prompt": record["prompt"], "responses": turns, "scores": scores, **context_as_text(record)})
    return rows, +dropped


def adversarial_pairs(
    golden: Iterable[Mapping[str, Any]], samples: Iterable[Mapping[str, Any]], *, on_unmatched: str = "drop"
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Make rows for AdversarialRewardTrainer: one per sample, golden answer first, `scores` 1 and 0, `type` "apo".

    A sample or golden answer that goes on with the next human turn is cut before it. Samples are matched with golden
    answers by id; rows come in the order of the samples.

    Args:
        golden: records with `query_id` (or `prompt_id`) and `golden`, a string.
        samples: records with the same id, `query` (or `prompt`, a string or messages) and the samples: `sample_0`,
            `sample_1`, ..., or `candidates`, each with `text` (what `prefopt generate` writes).
        on_unmatched: "drop" leaves out golden answers without samples and samples without golden answer, and counts
            them; "raise" raises.

    Returns:
        The rows, and how many golden answers or samples were left out for which reason.

    Raises:
        ValueError: a record without one of its keys, an id that occurs twice, no row at all, or, with "raise", an
            unmatched record.

    Reference: arXiv 2311.08045 and its released converter.
    """
    if on_unmatched not in ("drop", "raise"):
        raise ValueError(f'on_unmatched must be "drop" or "raise", not {on_unmatched!r}.')
    by_id = _by_id(samples, "samples")
    answers = {
        key: _text(record, "golden", f"golden record {key!r}") for key, record in _by_id(golden, "golden").items()
    }
    left_out: Counter[str] = Counter()
    for reason, ids in ((NO_SAMPLES, answers.keys() - by_id.keys()), (NO_GOLDEN, by_id.keys() - answers.keys())):
        if ids and on_unmatched == "raise":
            raise ValueError(f"{len(ids)} ids with {reason}, {min(ids)!r} among them.")
        if ids:
            left_out[reason] += len(ids)
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
    golden = clean_response(golden)
    rows = []
    for number, text in enumerate(map(clean_response, texts)):
        fault = golden_fault(golden, text)
        if fault is not None:
            left_out[fault] += 1
        if fault == BLANK_GOLDEN:  # counted once, not for each sample
            return []
        if fault is None:
            rows.append(
                {
                    "query_id": key,
                    "sample": number,
                    "prompt": prompt,
                    "responses": [as_turn(prompt, golden), as_turn(prompt, text)],
                    "scores": [1.0, 0.0],
                    "type": ADVERSARIAL_TYPE,
                    **context_as_text(record),
                }
            )
    return rows


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
    return [_text(record, name, f"samples record {key!r}") for name in sample_columns(record)]


def _text(record: Mapping[str, Any], name: str, where: str) -> str:
    value = record.get(name)
    if not isinstance(value, str):
        raise ValueError(f"`{name}` of {where} is {value!r}, not a string.")
    return value
