"""One data source: a hub name, a local file or a local folder, read with `datasets`."""

from __future__ import annotations

import glob
import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, ReadInstruction, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from prefopt.arguments import setting
from prefopt.data.rows import PROMPT_PARTS, READ_COLUMNS, SYSTEM_COLUMN
from prefopt.files import read_json, user_path

# file ending -> name of the reader in `datasets`
READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".arrow": "arrow"}
# how the files of a folder with splits are usually named
_SPLIT_LIKE = re.compile(r"(train|test|val|dev|eval)")
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
# columns of text: in CSV files a cell such as "None" or "42" is text there, and neither missing nor a number
TEXT_COLUMNS = ("prompt", "chosen", "rejected", "messages", "rejected_response")


COLUMNS_HELP = (
    "Columns to keep (a list), or how columns are read: {prompt: question, system: system}; several columns make one "
    "prompt: {prompt: [instruction, input]}, and null leaves one out. All columns under their own names when unset."
)


@dataclass
class DataSource:
    """Where rows come from, and how many of them are used."""

    path: str = field(
        metadata={
            "help": "Hub name, local file (json, jsonl, parquet, csv, arrow; .gz), save_to_disk folder, or folder "
            "with <split>.jsonl."
        }
    )
    name: str | None = setting(None, "Configuration (subset) of a hub dataset.")
    split: str = setting("train", 'Split, or a slice of one such as "train[:1000]".')
    data_files: Any = setting(None, "Files inside the dataset: a path, a list, or a mapping split -> files.")
    data_dir: str | None = setting(None, "Folder inside the dataset.")
    columns: list[str] | dict[str, str | list[str] | None] | None = setting(None, COLUMNS_HELP)
    fraction: float | None = setting(None, "Part of the rows to use, above 0 and at most 1; see `mixing`.")

    def __post_init__(self) -> None:
        if not isinstance(self.path, str) or not self.path:
            raise ValueError(f"A dataset needs a path (hub name, file or folder), not {self.path!r}.")
        if not isinstance(self.split, str) or not self.split:
            raise ValueError(f'Dataset {self.path!r}: split must be a name such as "train", not {self.split!r}.')
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise ValueError(f"Dataset {self.path!r}: fraction {self.fraction} is outside (0, 1].")
        _ = self.mapping  # checks it

    @property
    def mapping(self) -> dict[str, str]:
        """Column of the dataset -> the name under which rows are read, where `columns` is a mapping."""
        if not isinstance(self.columns, Mapping):
            return {}
        names: dict[str, str] = {}
        for target, given in self.columns.items():
            if given is None:
                continue
            if target not in READ_COLUMNS:
                raise ValueError(
                    f"Dataset {self}: columns maps to {target!r}, which nothing reads. Known: "
                    f"{', '.join(READ_COLUMNS)}."
                )
            parts = given if isinstance(given, list) else [given]
            if not parts or (len(parts) > 1 and target != "prompt") or len(parts) > 1 + len(PROMPT_PARTS):
                raise ValueError(
                    f"Dataset {self}: columns maps {parts} to {target!r}; only a prompt has several parts."
                )
            targets = (SYSTEM_COLUMN if target == "system" else target, *PROMPT_PARTS)
            names |= dict(zip(parts, targets))
        return names

    def __str__(self) -> str:
        return f"{self.path!r} ({self.name + ', ' if self.name else ''}split {self.split!r})"


def load_source(source: DataSource) -> Dataset:
    """Load all rows of one source, with the columns that it keeps.

    Raises:
        ValueError: no such file, dataset, split or column; a file that cannot be read; no rows.
    """
    path = user_path(source.path)
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
    if not source.columns:
        return dataset
    mapping, is_mapping = source.mapping, isinstance(source.columns, Mapping)
    given = source.columns if isinstance(source.columns, Mapping) else {}
    left_out = [name for name, column in given.items() if column is None]
    asked = [*mapping, *left_out] if is_mapping else source.columns
    unknown = [column for column in asked if column not in dataset.column_names]
    if unknown:
        raise ValueError(f"Dataset {source} has no column {unknown[0]!r}; it has {sorted(dataset.column_names)}.")
    if not is_mapping:
        return dataset.select_columns(list(source.columns))
    replaced = [name for name in mapping.values() if name in dataset.column_names and name not in mapping]
    gone = [name for name in dict.fromkeys([*left_out, *replaced]) if name not in mapping]
    return dataset.remove_columns(gone).rename_columns(mapping)


def _looks_local(path: str) -> bool:
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or _reader_of(Path(path)) is not None


def _reader_of(path: Path) -> str | None:
    """Return the reader for a file by its ending, ignoring that of a compression."""
    name = path.name.lower()
    for ending in COMPRESSIONS:
        name = name.removesuffix(ending)
    return READERS.get(Path(name).suffix)


def _split_name(split: str) -> str:
    return re.sub(r"\[.*", "", split)


def _load_folder(folder: Path, source: DataSource) -> Dataset:
    """Load a save_to_disk folder, or a folder whose files are named after their splits."""
    split = _split_name(source.split)
    saved = _saved_splits(folder)
    is_saved = any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))
    files = {} if is_saved else _files_by_split(folder)
    if split in saved:
        return _load_saved(saved[split], source)
    if split in files:
        return _load_files(files[split], source)
    # a README or a configuration name the splits of a hub dataset's copy; files of any name may be its training rows
    described = source.name is not None or (folder / "README.md").is_file()
    names_splits = split != "train" or any(_SPLIT_LIKE.match(name) for name in files)
    if saved or (files and names_splits and not described):
        raise _unknown_split(source, [*saved, *files])
    if not any(_reader_of(file) for file in folder.rglob("*") if file.is_file()):
        raise ValueError(f"Dataset {source.path!r}: the folder holds no json, jsonl, parquet, csv or arrow file.")
    return load_dataset(str(folder), name=source.name, split=source.split)


def _saved_splits(folder: Path) -> dict[str, Path]:
    """Find the save_to_disk folders of each split in `folder`, which may itself be one (split "train")."""
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
    """Find `train.jsonl`, `data/train-00000-of-00002.parquet`, ...; return them by the names of their splits."""
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
    split = _split_name(source.split)
    if split != "train" and not user_path(source.path).is_dir():
        raise _unknown_split(source, ["train"])
    options: dict[str, Any] = {"parse_agent_traces": False} if reader == "json" else {}
    if reader == "csv":
        options = {
            "converters": dict.fromkeys((*TEXT_COLUMNS, *source.mapping), str),
            "keep_default_na": False,
            "na_values": [""],
        }
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
    """Turn the errors of `datasets` about a user's mistake into one sentence."""
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
        if str(error).startswith("Dataset "):
            raise
        raise ValueError(f"Dataset {source}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
