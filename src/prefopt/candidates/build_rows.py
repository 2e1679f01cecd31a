"""`prefopt build-rows`: from candidates to training rows that are no pairs: the best of n, all scored answers, or golden against sampled ones."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from prefopt.candidates.pairs import select_pairs
from prefopt.candidates.records import Record, context_as_text, read_records, score_name, scores_of
from prefopt.data.rows import ADVERSARIAL_TYPE, CONTEXT_COLUMNS, Row
from prefopt.data.sources import DataSource, load_source
from prefopt.files import write_json, write_jsonl

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
        records: each with `prompt` (a string or a message list), `responses` (n strings) and `scores` (n numbers);
            `tools` and
            `chat_template_kwargs` are kept, other keys left out.
        form: "sft": the best response of each prompt (any n >= 1), for TRL's SFTTrainer; "pairs": best against worst
            response that
            is not blank (n >= 2), for the pair trainers, with their scores as `chosen_score` and `rejected_score`.

    Returns:
        The rows in the order of the records, and how many records were dropped for which reason ("all responses
        blank",
        "fewer than two responses", "all scores tied").

    Raises:
        ValueError: an unknown form; a record without one of the keys, with unequal lengths, or with a score that is
            not finite.
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

    A sample or golden answer that goes on with the next human turn is cut before it. Samples are matched with golden
    answers by id; rows come
    in the order of the samples.

    Args:
        golden: records with `query_id` (or `prompt_id`) and `golden`, a string.
        samples: records with the same id, `query` (or `prompt`, a string or messages) and the samples: `sample_0`,
            `sample_1`, ..., or
            `candidates`, each with `text` (what `prefopt generate` writes).
        on_unmatched: "drop" leaves out golden answers without samples and samples without golden answer, and counts
            them; "raise" refuses.

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


FORMS = ("sft", "comparisons", "adversarial")


def _setting(default: Any, text: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": text, **more})


@dataclass
class BuildRowsArguments:
    """What `prefopt build-rows` reads, which rows it makes, and where they go."""

    candidates: str = _setting("", "Candidates: the folder that `prefopt generate` or `rank` wrote, or a file.")
    output_dir: str = _setting("", "Folder for train.jsonl and rows_report.json.")
    form: str = _setting(
        "",
        "sft: the best-scored answer of each prompt (rejection sampling). comparisons: all scored answers of a prompt "
        "in a row, for RRHF "
        "and reward models. adversarial: the golden answer against each sample, for adversarial-reward-model.",
        choices=list(FORMS),
    )
    score: str | None = _setting(None, "Name of the scores to use; may be left out where there is only one.")
    golden: str | None = _setting(
        None, "adversarial: file or hub dataset with `golden` and the `prompt_id` (or `query_id`) of the candidates."
    )
    on_unmatched: str = _setting(
        "drop",
        "adversarial: golden answers without samples and samples without golden answer are counted (drop) or refused "
        "(raise).",
        choices=["drop", "raise"],
    )

    def __post_init__(self) -> None:
        for name in ("candidates", "output_dir", "form"):
            if not getattr(self, name):
                raise ValueError(f"{name} is missing: set it in the recipe or with --{name}.")
        for name in ("form", "on_unmatched"):
            choices = type(self).__dataclass_fields__[name].metadata["choices"]
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}.")
        adversarial = self.form == "adversarial"
        if adversarial and self.golden is None:
            raise ValueError("golden is missing: adversarial rows need a file of golden answers.")
        if not adversarial and (self.golden is not None or self.on_unmatched != "drop"):
            raise ValueError(f"golden and on_unmatched have no effect on the form {self.form}; leave them out.")
        if adversarial and self.score is not None:
            raise ValueError("score has no effect on adversarial rows, which need no scores; leave it out.")


def run(args: BuildRowsArguments) -> Path:
    """Write `train.jsonl` and `rows_report.json` to `output_dir`, and say what was left out.

    Returns:
        The file of rows.

    Raises:
        ValueError: candidates that do not fit the form, or no row at all.
    """
    records = read_records(args.candidates)
    if args.form == "adversarial":
        assert args.golden is not None
        golden = load_source(DataSource(args.golden))
        rows, dropped = adversarial_pairs(list(golden), records, on_unmatched=args.on_unmatched)
    else:
        rows, dropped = _scored_rows(records, args.score, args.form)
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


def _scored_rows(records: Sequence[Record], wanted: str | None, form: str) -> tuple[list[Row], Counter[str]]:
    name = score_name(records, wanted)
    if name is None:
        raise ValueError("The candidates have no scores; run `prefopt rank` first.")
    scored = [
        {
            "prompt": record["prompt"],
            "responses": [candidate["text"] for candidate in record["candidates"]],
            "scores": scores_of(record, name),
            **{name: record[name] for name in CONTEXT_COLUMNS if name in record},
        }
        for record in records
    ]
    return best_of_n_rows(scored) if form == "sft" else comparison_rows(scored)


def comparison_rows(records: Sequence[Row]) -> tuple[list[Row], Counter[str]]:
    """Comparison rows of scored candidates: `prompt`, `responses` that are not blank, `scores`.

    Args:
        records: each with `prompt` (a string or messages), `responses` (R strings) and `scores` (R numbers); their
            `tools` and
            `chat_template_kwargs` are kept.

    Returns:
        The rows, and how many records were dropped for which reason, and blank responses left out.
    """
    rows: list[Row] = []
    dropped: Counter[str] = Counter()
    for record in records:
        full = [(text, score) for text, score in zip(record["responses"], record["scores"]) if text.strip()]
        dropped["blank responses"] += len(record["responses"]) - len(full)
        scores = [score for _, score in full]
        if len(full) < 2:
            dropped["fewer than two responses"] += 1
        elif len(set(scores)) == 1:
            dropped["all scores tied"] += 1
        else:
            texts = [as_turn(record["prompt"], text) for text, _ in full]
            rows.append({"prompt": record["prompt"], "responses": texts, "scores": scores, **context_as_text(record)})
    return rows, +dropped
