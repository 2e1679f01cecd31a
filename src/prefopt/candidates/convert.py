"""`prefopt convert`: candidate records and pairs from and to the formats of other projects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset

from prefopt.candidates.formats import (
    Context,
    Format,
    pairs_to_records,
    read_comparisons,
    read_completions,
    read_generated,
    read_golden,
    read_hh,
    read_pairs,
    read_responses,
    read_samples,
    read_ultrafeedback,
    write_adversarial_pairs,
    write_comparisons,
    write_completions,
    write_generated,
    write_hh,
    write_pairs,
    write_samples,
    write_ultrafeedback,
)
from prefopt.candidates.records import read_records, write_records
from prefopt.data.messages import without_none
from prefopt.data.rows import Row
from prefopt.data.sources import DataSource, load_source
from prefopt.files import atomic_path, write_json, write_jsonl


def _as_they_are(rows: Sequence[Row], context: Context) -> list[Row]:
    return list(rows)


FORMATS: dict[str, Format] = {
    "records": Format("candidate records of prefopt", "records", _as_they_are, _as_they_are),
    "pairs": Format("pairs: prompt, chosen, rejected, method columns", "pairs", read_pairs, _as_they_are),
    "responses": Format("any dataset with a prompt and `columns` of responses", "records", read_responses, None),
    "sppo_generated": Format("SPPO: generate_k, rm_scores, probability", "records", read_generated, write_generated),
    "sppo": Format("SPPO: chosen, rejected, chosen_probs*", "pairs", read_pairs, write_pairs),
    "apo_samples": Format(
        "APO: query_id, query, sample_k (and a file `golden`)", "records", read_samples, write_samples
    ),
    "apo_comparisons": Format(
        "APO: text and scores of any number of responses", "records", read_comparisons, write_comparisons
    ),
    "apo_pairs": Format(
        "APO: text and scores, golden answer against each sample", "records", None, write_adversarial_pairs
    ),
    "ultrafeedback": Format(
        "UltraFeedback: chosen and rejected conversations",
        "pairs",
        read_ultrafeedback,
        write_ultrafeedback,
    ),
    "ultrafeedback_completions": Format(
        "UltraFeedback: instruction, completions", "records", read_completions, write_completions
    ),
    "hh": Format("HH: chosen and rejected dialogues", "pairs", read_hh, write_hh),
}
READABLE = tuple(name for name, form in FORMATS.items() if form.read is not None)
WRITABLE = tuple(name for name, form in FORMATS.items() if form.write is not None)
ENDINGS = (".parquet", ".jsonl", ".jsonl.gz", ".json")


def _setting(default: Any, text: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": text, **more})


@dataclass
class ConvertArguments:
    """What to read, as what, and what to write."""

    input: str = _setting("", "Rows to read: file, folder or hub name.")
    output: str = _setting("", f"File to write ({', '.join(ENDINGS)}; .json is one array).")
    from_format: str = _setting("", "Format of the input: " + ", ".join(READABLE) + ".", choices=list(READABLE))
    to_format: str = _setting("", "Format of the output: " + ", ".join(WRITABLE) + ".", choices=list(WRITABLE))
    split: str = _setting("train", "Split of the input.")
    columns: list[str] = field(
        default_factory=list, metadata={"help": "responses: columns with a response or a list of responses."}
    )
    golden: str | None = _setting(None, "apo_samples: file with query_id and golden.")
    score: str | None = _setting(None, "Which scores to write, where records have several.")
    one_sample: bool = _setting(False, "apo_pairs: one random sample of each query instead of all.")
    seed: int = _setting(42, "apo_pairs: seed of that sample.")
    as_messages: bool = _setting(False, "hh: read the dialogues as lists of messages.")

    def __post_init__(self) -> None:
        for name in ("input", "output", "from_format", "to_format"):
            if not getattr(self, name):
                raise ValueError(f"{name} is missing: set it in the recipe or with --{name}.")
        for name, known in (("from_format", READABLE), ("to_format", WRITABLE)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}.")
        if not self.output.endswith(ENDINGS):
            raise ValueError(f"output must end in one of {', '.join(ENDINGS)}, not {self.output!r}.")
        source, target = FORMATS[self.from_format], FORMATS[self.to_format]
        if source.kind == "records" and target.kind == "pairs":
            raise ValueError(
                f"{self.from_format} holds candidates and {self.to_format} pairs: score the candidates with `prefopt "
                "rank` and "
                "choose pairs with `prefopt build-pairs`."
            )
        for name, where in (
            ("columns", self.from_format == "responses"),
            ("golden", self.from_format == "apo_samples"),
            ("as_messages", self.from_format == "hh"),
            ("one_sample", self.to_format == "apo_pairs"),
        ):
            if getattr(self, name) and not where:
                raise ValueError(
                    f"{name} plays no part between {self.from_format} and {self.to_format}; leave it out."
                )


def run(args: ConvertArguments) -> Path:
    """Convert, and say what was dropped.

    Returns:
        The file that was written.

    Raises:
        ValueError: a row that is not of the format, or nothing left to write.
    """
    if args.from_format == "records":
        rows = read_records(args.input, split=args.split)
    else:
        rows = [without_none(row) for row in load_source(DataSource(args.input, split=args.split))]
    golden = None
    if args.golden is not None:
        golden = read_golden(list(load_source(DataSource(args.golden))))
    context = Context(args.columns, golden, args.score, args.one_sample, args.seed, args.as_messages)
    source, target = FORMATS[args.from_format], FORMATS[args.to_format]
    assert source.read is not None and target.write is not None
    found = source.read(rows, context)
    if source.kind == "pairs" and target.kind == "records":
        found = pairs_to_records(found)
    written = target.write(found, context)
    if not written:
        reasons = ", ".join(f"{number} {name}" for name, number in context.counts.items() if number)
        raise ValueError(f"{args.input}: none of {len(rows)} rows is left to write ({reasons or 'none was read'}).")
    output = Path(args.output)
    _write(output, written, is_records=args.to_format == "records")
    print(f"convert: {len(rows)} rows of {args.from_format} -> {len(written)} rows of {args.to_format} in {output}")
    for name, number in context.counts.items():
        if number:
            print(f"convert: {number} {name}")
    return output


def _write(path: Path, rows: list[Row], *, is_records: bool) -> None:
    if path.name.endswith(".json"):
        write_json(path, rows)
    elif is_records:
        write_records(path, rows)
    elif path.name.endswith(".parquet"):
        with atomic_path(path) as temporary:
            Dataset.from_list(rows).to_parquet(str(temporary))
    else:
        write_jsonl(path, rows)
