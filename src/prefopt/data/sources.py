"""One data source: a hub name, a local file or a local folder, read with `datasets`."""

from __future__ import annotations

import glob
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, ReadInstruction, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from prefopt.files import read_json

# file ending -> name of the reader in `datasets`
READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".arrow": "arrow"}
# how the files of a folder with splits are usually named
_SPLIT_LIKE = re.compile(r"(train|test|val|dev|eval)")
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
# columns of text: in CSV files a cell such as "None" or "42" is text there, and neither missing nor a number
TEXT_COLUMNS = ("prompt", "chosen", "rejected", "messages", "rejected_response")


@dataclass
class DataSource:
    """Where rows come from, and how many of them are used."""

    path: str = field(
        metadata={
            "help": "Hub name, local file (json, jsonl, parquet, csv, arrow; .gz), save_to_disk folder, or folder "
            "with <split>.jsonl."
        }
    )
    name: str | None = field(default=None, metadata={"help": "Configuration (subset) of a hub dataset."})
    split: str = field(default="train", metadata={"help": 'Split, or a slice of one such as "train[:1000]".'})
    data_files: Any = field(
        default=None, metadata={"help": "Files inside the dataset: a path, a list, or a mapping split -> files."}
    )
    data_dir: str | None = field(default=None, metadata={"help": "Folder inside the dataset."})
    columns: list[str] | None = field(default=None, metadata={"help": "Columns to keep; all when unset."})
    fraction: float | None = field(
        default=None, metadata={"help": "Part of the rows to use, above 0 and at most 1; see `mixing`."}
    )

    def __post_init__(self) -> None:
        if not isinstance(self.path, str) or not self.path:
            raise ValueError(f"A dataset needs a path (hub name, file or folder), not {self.path!r}.")
        if not isinstance(self.split, str) or not self.split:
            raise ValueError(f'Dataset {self.path!r}: split must be a name such as "train", not {self.split!r}.')
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise ValueError(f"Dataset {self.path!r}: fraction {self.fraction} is outside (0, 1].")

    def __str__(self) -> str:
        return f"{self.path!r} ({self.name + ', ' if self.name else ''}split {self.split!r})"


def load_source(source: DataSource) -> Dataset:
    """All rows of one source, with the columns that it keeps.

    Raises:
        ValueError: no such file, dataset, split or column; a file that cannot be read; no rows.
    """
    path = Path(source.path).expanduser()
    with _readable_errors(source):
        if path.is_dir() and source.data_files is None and source.data_dir is None:
            dataset = _load_folder(path, source)
        elif path.is_file():
            dataset = _load_files([path], source)
        else:
            if not path.exists() and _looks_local(source.path):
                raise ValueError(f"Dataset {source.path!r}: no such file or folder.")
            dataset = load_dataset(
                str(path) if path.exists() else source.path,
                name=source.name,
                data_dir=source.data_dir,
                data_files=source.data_files,
                split=source.split,
            )
    assert not isinstance(dataset, (IterableDataset, DatasetDict))
    if len(dataset) == 0:
        raise ValueError(f"Dataset {source} has no rows.")
    if source.columns is None:
        return dataset
    unknown = [column for column in source.columns if column not in dataset.column_names]
    if unknown:
        raise ValueError(f"Dataset {source} has no column {unknown[0]!r}; it has {sorted(dataset.column_names)}.")
    return dataset.select_columns(source.columns)


def _looks_local(path: str) -> bool:
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or _reader_of(Path(path)) is not None


def _reader_of(path: Path) -> str | None:
    """The reader for a file by its ending, a compression's ending put aside."""
    name = path.name.lower()
    for ending in COMPRESSIONS:
        name = name.removesuffix(ending)
    return READERS.get(Path(name).suffix)


def _split_name(split: str) -> str:
    return re.sub(r"\[.*", "", split)


def _load_folder(folder: Path, source: DataSource) -> Dataset:
    """A save_to_disk folder, or a folder whose files are named after their splits."""
    split = _split_name(source.split)
    saved = _saved_splits(folder)
    is_saved = any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))
    files = {} if is_saved else _files_by_split(folder)
    if split in saved:
        return _load_saved(saved[split], source)
    if split in files:
        return _load_files(files[split], source)
    described = source.name is not None or (folder / "README.md").is_file()
    if saved or (not described and (split != "train" or any(_SPLIT_LIKE.match(name) for name in files))):
        if saved or files:
            raise _unknown_split(source, [*saved, *files])
    if not any(_reader_of(file) for file in folder.rglob("*") if file.is_file()):
        raise ValueError(f"Dataset {source.path!r}: the folder holds no json, jsonl, parquet, csv or arrow file.")
    return load_dataset(str(folder), name=source.name, split=source.split)


def _saved_splits(folder: Path) -> dict[str, Path]:
    """The save_to_disk folders in `folder` (or `folder` itself, as the split "train") under the names of their splits."""
    if (folder / "state.json").is_file():
        return {"train": folder}
    return {child.name: child for child in sorted(folder.iterdir()) if (child / "state.json").is_file()}


def _load_saved(folder: Path, source: DataSource) -> Dataset:
    if not read_json(folder / "state.json")["_data_files"]:
        raise ValueError(f"Dataset {source} has no rows.")
    whole = load_from_disk(str(folder))
    assert isinstance(whole, Dataset)
    (part,) = ReadInstruction.from_spec(source.split).to_absolute({_split_name(source.split): len(whole)})
    if part.from_ is None and part.to is None:
        return whole
    return whole.select(range(part.from_ or 0, len(whole) if part.to is None else part.to))


def _files_by_split(folder: Path) -> dict[str, list[Path]]:
    """`train.jsonl`, `data/train-00000-of-00002.parquet`, ... under the names of their splits."""
    files: dict[str, list[Path]] = {}
    for place in (folder, folder / "data"):
        for file in sorted(place.iterdir()) if place.is_dir() else []:
            if file.is_file() and _reader_of(file) is not None:
                name = file.name.split(".")[0]
                files.setdefault(re.sub(r"-\d+(-of-\d+)?$", "", name), []).append(file)
    return files


def _load_files(files: list[Path], source: DataSource) -> Dataset:
    reader = _reader_of(files[0])
    if reader is None:
        raise ValueError(
            f"Dataset {source.path!r}: unknown kind of file; known are {', '.join(READERS)}, also compressed."
        )
    for file in files:
        if file.stat().st_size == 0:
            raise ValueError(f"Dataset {source.path!r}: {file.name} is empty.")
    split = _split_name(source.split) if Path(source.path).expanduser().is_dir() else "train"
    if _split_name(source.split) != split:
        raise _unknown_split(source, ["train"])
    options: dict[str, Any] = {}
    if reader == "json":
        options["parse_agent_traces"] = False
    if reader == "csv":
        options |= {"converters": dict.fromkeys(TEXT_COLUMNS, str), "keep_default_na": False, "na_values": [""]}
        options["sep"] = "\t" if ".tsv" in files[0].name else ","
    names = [
        glob.escape(str(file)) for file in files
    ]  # datasets takes names for patterns: `run[1]` would match `run1`
    return load_dataset(reader, data_files={split: names}, split=source.split, **options)


def _unknown_split(source: DataSource, available: list[str]) -> ValueError:
    return ValueError(
        f"Dataset {source.path!r} has no split {_split_name(source.split)!r}; it has {sorted(set(available))}."
    )


@contextmanager
def _readable_errors(source: DataSource) -> Iterator[None]:
    """Turn what `datasets` raises about a user's mistake into one sentence."""
    try:
        yield
    except DatasetNotFoundError as error:
        raise ValueError(
            f"Dataset {source.path!r} is neither a local file or folder nor a dataset that the hub shows "
            f"({_first_line(error)})."
        ) from error
    except DatasetGenerationError as error:
        cause = error.__cause__ or error
        raise ValueError(f"Dataset {source.path!r} could not be read: {_first_line(cause)}") from error
    except (FileNotFoundError, ConnectionError) as error:
        raise ValueError(
            f"Dataset {source.path!r} was not found here, and the hub cannot be reached ({_first_line(error)})."
        ) from error
    except (OSError, EOFError, zlib.error) as error:  # such as a compressed file that is cut short
        raise ValueError(f"Dataset {source.path!r} could not be read: {_first_line(error)}") from error
    except ValueError as error:
        text = str(error)
        if text.startswith("Dataset "):
            raise
        raise ValueError(f"Dataset {source}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
