"""`prefopt build-rows`: from candidates to training rows that are no pairs: the best of n, all scored answers, or golden against sampled ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefopt.candidates.adversarial import adversarial_pairs
from prefopt.candidates.best_of_n import as_turn, best_of_n_rows
from prefopt.candidates.formats import score_name, scores_of
from prefopt.candidates.records import Record, context_as_text, read_records
from prefopt.data.rows import CONTEXT_COLUMNS, Row
from prefopt.data.sources import DataSource, load_source
from prefopt.files import write_json, write_jsonl

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
        "sft: the best-scored answer of each prompt (rejection sampling). comparisons: all scored answers of a prompt in a row, for RRHF "
        "and reward models. adversarial: the golden answer against each sample, for adversarial-reward-model.",
        choices=list(FORMS),
    )
    score: str | None = _setting(None, "Name of the scores to use; may be left out where there is only one.")
    golden: str | None = _setting(
        None, "adversarial: file or hub dataset with `golden` and the `prompt_id` (or `query_id`) of the candidates."
    )
    on_unmatched: str = _setting(
        "drop",
        "adversarial: golden answers without samples and samples without golden answer are counted (drop) or refused (raise).",
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
        records: each with `prompt` (a string or messages), `responses` (R strings) and `scores` (R numbers); their `tools` and
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
