"""`prefopt convert`: candidate records and pairs from and to the formats of other projects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset

from prefopt.arguments import check_settings, setting
from prefopt.candidates.formats import FORMATS, Context, pairs_to_records, read_golden
from prefopt.candidates.records import read_records, write_records
from prefopt.data.messages import without_none
from prefopt.data.rows import Row
from prefopt.data.sources import DataSource, load_source
from prefopt.files import atomic_path, write_json, write_jsonl

READABLE = tuple(name for name, form in FORMATS.items() if form.read is not None)
WRITABLE = tuple(name for name, form in FORMATS.items() if form.write is not None)
ENDINGS = (".parquet", ".jsonl", ".jsonl.gz", ".json")


@dataclass
class ConvertArguments:
    """What to read, as what, and what to write."""

    input: str = setting("", "Rows to read: file, folder or hub name.", required=True)
    output: str = setting("", f"File to write ({', '.join(ENDINGS)}; .json is one array).", required=True)
    from_format: str = setting(
        "", "Format of the input: " + ", ".join(READABLE) + ".", choices=READABLE, required=True
    )
    to_format: str = setting("", "Format of the output: " + ", ".join(WRITABLE) + ".", choices=WRITABLE, required=True)
    split: str = setting("train", "Split of the input.")
    columns: list[str] = setting(
        help="responses: columns with a response or a list of responses.",
        factory=list,
        only_for={"from_format": ("responses",)},
    )
    golden: str | None = setting(
        None, "apo_samples: file with query_id and golden.", only_for={"from_format": ("apo_samples",)}
    )
    score: str | None = setting(None, "Which scores to write, where records have several.")
    one_sample: bool = setting(
        False, "apo_pairs: one random sample of each query instead of all.", only_for={"to_format": ("apo_pairs",)}
    )
    seed: int = setting(42, "apo_pairs: seed of that sample.")
    as_messages: bool = setting(
        False, "hh: read the dialogues as lists of messages.", only_for={"from_format": ("hh",)}
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if not self.output.endswith(ENDINGS):
            raise ValueError(f"output must end in one of {', '.join(ENDINGS)}, not {self.output!r}.")
        if FORMATS[self.from_format].kind == "records" and FORMATS[self.to_format].kind == "pairs":
            raise ValueError(
                f"{self.from_format} holds candidates and {self.to_format} pairs: score the candidates with `prefopt "
                "rank` and choose pairs with `prefopt build-pairs`."
            )


def run(args: ConvertArguments) -> Path:
    """Convert, and print what was dropped.

    Returns:
        The file that was written.

    Raises:
        ValueError: a row that is not of the format, or nothing left to write.
    """
    rows: Sequence[Row]
    if args.from_format == "records":
        rows = read_records(args.input, split=args.split)
    else:
        rows = [without_none(row) for row in load_source(DataSource(args.input, split=args.split))]
    golden = None if args.golden is None else read_golden(load_source(DataSource(args.golden)))
    context = Context(args.columns, golden, args.score, args.one_sample, args.seed, args.as_messages)
    source, target = FORMATS[args.from_format], FORMATS[args.to_format]
    assert source.read is not None and target.write is not None
    found = list(source.read(rows, context))
    if source.kind == "pairs" and target.kind == "records":
        found = pairs_to_records(found)
    written = list(target.write(found, context))
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
