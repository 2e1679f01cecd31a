"""Rows of data files, read and written in pieces, so that memory does not grow with the file."""

from __future__ import annotations

import gzip
import json
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, islice
from pathlib import Path
from typing import Generic, TypeVar, overload

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features
from datasets.features.features import require_decoding

from prefopt.data.rows import Row
from prefopt.data.sources import DataSource, load_source
from prefopt.files import atomic_path, iterate_jsonl, user_path

T = TypeVar("T")
CHUNK = 1000  # rows in a piece
LARGEST_ROW_GROUP = 1 << 28  # bytes; larger ones would fill the memory when they are read


class Again(Iterable[T], Generic[T]):
    """Iterates anew each time: over what `make` returns."""

    def __init__(self, make: Callable[[], Iterable[T]]) -> None:
        self.make = make

    def __iter__(self) -> Iterator[T]:
        return iter(self.make())


class Rows(Sequence[Row]):
    """Rows that are read when they are asked for; slices are lists."""

    def __iter__(self) -> Iterator[Row]:
        return (row for start in range(0, len(self), CHUNK) for row in self.between(start, start + CHUNK))

    def between(self, start: int, stop: int) -> list[Row]:
        """Read the rows from `start` up to `stop`."""
        raise NotImplementedError

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            assert step == 1, "pieces are contiguous"
            return self.between(start, stop)
        return self.between(index, index + 1)[0]


class LineRows(Rows):
    """Rows of a .jsonl or .jsonl.gz file, found by the places of its lines."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # a compressed file is read on from where it was left, as going back means to start again
        self.file = gzip.open(path, "rb") if path.name.endswith(".gz") else open(path, "rb")  # noqa: SIM115
        self.starts = array("q")
        place = 0
        for line in self.file:
            if line.strip():
                self.starts.append(place)
            place += len(line)

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[Row]:
        return iterate_jsonl(self.path)

    def between(self, start: int, stop: int) -> list[Row]:
        """Read the rows from `start` up to `stop`."""
        found = []
        for place in self.starts[start:stop]:
            self.file.seek(place)
            found.append(json.loads(self.file.readline()))
        return found


class ParquetRows(Rows):
    """Rows of a .parquet file, found by its row groups."""

    def __init__(self, path: Path) -> None:
        self.file = pq.ParquetFile(path)
        groups = [self.file.metadata.row_group(index) for index in range(self.file.num_row_groups)]
        self.starts = list(accumulate((group.num_rows for group in groups), initial=0))
        self.largest = max((group.total_byte_size for group in groups), default=0)
        self.held: tuple[int, pa.Table] | None = None

    def __len__(self) -> int:
        return self.starts[-1]

    def __iter__(self) -> Iterator[Row]:
        for batch in self.file.iter_batches(CHUNK):
            yield from _decoded(pa.Table.from_batches([batch]))

    def between(self, start: int, stop: int) -> list[Row]:
        """Read the rows from `start` up to `stop`."""
        found: list[Row] = []
        while start < stop:
            index = bisect_right(self.starts, start) - 1
            if self.held is None or self.held[0] != index:
                self.held = (index, self.file.read_row_group(index))
            end = min(stop, self.starts[index + 1])
            found += _decoded(self.held[1].slice(start - self.starts[index], end - start))
            start = end
        return found


class DatasetRows(Rows):
    """Rows of a dataset, which `datasets` maps into memory."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def between(self, start: int, stop: int) -> list[Row]:
        """Read the rows from `start` up to `stop`."""
        return list(self.dataset.select(range(start, min(stop, len(self)))))


def open_rows(source: DataSource) -> Rows:
    """Open the rows of a source: of a jsonl or parquet file without a copy of it, of anything else by `load_source`.

    Raises:
        ValueError: see `load_source`.
    """
    path = user_path(source.path)
    if path.is_file() and path.stat().st_size and source == DataSource(source.path):
        rows: Rows | None = None
        if path.name.endswith((".jsonl", ".jsonl.gz")):
            rows = LineRows(path)
        elif path.name.endswith(".parquet"):
            rows = _parquet_rows(path)
        if rows:
            return rows
    return DatasetRows(load_source(source))


def _parquet_rows(path: Path) -> ParquetRows | None:
    try:
        rows = ParquetRows(path)
    except (OSError, pa.ArrowException):
        return None  # `load_source` says what is wrong with it
    return rows if rows.largest <= LARGEST_ROW_GROUP else None


def _decoded(table: pa.Table) -> list[Row]:
    features = Features.from_arrow_schema(table.schema)
    if not any(map(require_decoding, features.values())):
        return list(table.to_pylist())
    # a dataset decodes columns of JSON; the fingerprint is given, as computing it means to hash the rows
    return list(Dataset(table, fingerprint="piece"))


def pieces(rows: Iterable[T], size: int = CHUNK) -> Iterator[list[T]]:
    """Cut rows into lists of `size`."""
    iterator = iter(rows)
    while piece := list(islice(iterator, size)):
        yield piece


def infer_features(rows: Iterable[Row], names: Sequence[str]) -> Features:
    """Infer the types of columns from all rows, a piece at a time.

    Raises:
        ValueError: a column holds values of different types.
    """
    found: Features | None = None
    for piece in pieces(rows):
        features = _dataset(piece, names).features
        if found is None or found == features:
            found = features
            continue
        schemas = [each.arrow_schema.remove_metadata() for each in (found, features)]
        try:
            found = Features.from_arrow_schema(pa.unify_schemas(schemas, promote_options="permissive"))
        except pa.ArrowException as error:
            raise ValueError(f"Columns hold values of different types: {error}") from error
    return found or Features()


def _dataset(rows: Sequence[Row], names: Iterable[str], features: Features | None = None) -> Dataset:
    return Dataset.from_dict({name: [row.get(name) for row in rows] for name in names}, features=features)


def write_parquet(path: str | Path, rows: Iterable[Row], features: Features) -> None:
    """Write rows to a parquet file, atomically; `datasets` reads its columns with the types of `features`."""
    with atomic_path(path) as temporary, pq.ParquetWriter(temporary, features.arrow_schema) as writer:
        for piece in pieces(rows):
            writer.write_table(_dataset(piece, features, features).data.table)


def to_dataset(rows: Iterable[Row], features: Features) -> Dataset:
    """Collect rows in a dataset."""
    return _dataset(list(rows), features, features)
