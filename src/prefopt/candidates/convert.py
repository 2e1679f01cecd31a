"""`prefopt convert`: candidate records and pairs from and to the formats of other projects."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prefopt.arguments import check_settings, setting
from prefopt.candidates.formats import FORMATS, Context, Converter, pairs_to_records, read_golden
from prefopt.candidates.records import Records, write_records
from prefopt.candidates.tables import Again, infer_features, open_rows, write_parquet
from prefopt.data.messages import without_none
from prefopt.data.rows import Row
from prefopt.data.sources import DataSource, load_source
from prefopt.files import atomic_path, write_jsonl

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
    source, target = FORMATS[args.from_format], FORMATS[args.to_format]
    assert source.read is not None and target.write is not None
    golden = None if args.golden is None else read_golden(load_source(DataSource(args.golden)))
    reading = Context(args.columns, golden, args.score, args.one_sample, args.seed, args.as_messages)
    writing = replace(reading, counts=Counter())
    if args.from_format == "records":
        rows: Sequence[Row] = Records(args.input, split=args.split)
    else:
        rows = open_rows(DataSource(args.input, split=args.split))
    read_from = Again(lambda: (without_none(row) for row in rows)) if args.from_format != "records" else rows
    found: Iterable[Row] = _Counted(source.read, read_from, reading)
    if source.kind == "pairs" and target.kind == "records":
        pairs = found
        found = Again(lambda: pairs_to_records(pairs))
    written = _Counted(target.write, found, writing)
    output = Path(args.output)
    try:
        _write(output, written, is_records=args.to_format == "records")
    except _NothingToWrite:
        reasons = ", ".join(_counted(reading, writing)) or "none was read"
        raise ValueError(f"{args.input}: none of {len(rows)} rows is left to write ({reasons}).") from None
    print(f"convert: {len(rows)} rows of {args.from_format} -> {written.number} rows of {args.to_format} in {output}")
    for line in _counted(reading, writing):
        print(f"convert: {line}")
    return output


def _counted(*contexts: Context) -> list[str]:
    return [f"{number} {name}" for context in contexts for name, number in context.counts.items() if number]


class _NothingToWrite(Exception):
    pass


class _Counted(Iterable[Row]):
    """Converted rows, made anew each time they are iterated over; the counts are those of the last time."""

    def __init__(self, convert: Converter, rows: Iterable[Row], context: Context) -> None:
        self.convert, self.rows, self.context = convert, rows, context
        self.number = 0

    def __iter__(self) -> Iterator[Row]:
        self.context.counts.clear()
        self.number = 0
        for row in self.convert(self.rows, self.context):
            self.number += 1
            yield row


def _finite(row: Row, number: int) -> Row:
    """Return a row unchanged.

    Raises:
        ValueError: it holds NaN or infinity, which JSON does not know and no loss can read.
    """
    found = next(((name, fault) for name, value in row.items() for fault in _not_finite(value)), None)
    if found is not None:
        raise ValueError(f"Row {number} to write: `{found[0]}` holds {found[1]}, not a finite number.")
    return row


def _not_finite(value: Any) -> Iterator[float]:
    if isinstance(value, float):
        if not math.isfinite(value):
            yield value
    elif isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _not_finite(item)


def _write(path: Path, rows: Iterable[Row], *, is_records: bool) -> None:
    first = next((row for row in rows), None)
    if first is None:
        raise _NothingToWrite
    finite = Again(lambda: (_finite(row, number) for number, row in enumerate(rows)))
    if path.name.endswith(".json"):
        _write_array(path, finite)
    elif is_records:
        write_records(path, finite)
    elif path.name.endswith(".parquet"):
        write_parquet(path, finite, infer_features(finite, list(first)))
    else:
        write_jsonl(path, finite)


def _write_array(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as one indented JSON array, one at a time."""
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for number, row in enumerate(rows):
            text = json.dumps(row, indent=2, ensure_ascii=False)
            file.write(("[" if number == 0 else ",") + "\n  " + text.replace("\n", "\n  "))
        file.write("\n]\n")
