"""Data sets from recipes: sources are read, brought to one schema, thinned, joined, and test rows held out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset, Features, Json, List, Value, concatenate_datasets

from prefopt.data.messages import WRONG_TYPE, BadRow
from prefopt.data.rows import (
    COLUMN_ALIASES,
    METHOD_COLUMNS,
    REFERENCE_COLUMNS,
    Kind,
    Row,
    check_columns,
    is_tokenised,
    normalise_comparison,
    normalise_pair,
    normalise_prompt,
)
from prefopt.data.sources import DataSource, load_source
from prefopt.data.tokenization import main_process_first
from prefopt.files import content_hash

VERSION = 1
_READERS = {"pairs": normalise_pair, "comparisons": normalise_comparison, "prompts": normalise_prompt}


def normalise_rows(
    dataset: Dataset, kind: Kind, *, num_proc: int | None = None, where: str = "The dataset"
) -> Dataset:
    """All rows in the schema of `kind`; nothing is dropped: a row that cannot be read says why in `fault`.

    Tokenised rows, and rows of kind "any", are returned as they are. Message lists are stored as JSON values, which
    keeps messages with different keys apart; strings are stored as strings.

    Raises:
        ValueError: columns that cannot be read as `kind`.
    """
    check_columns(dataset.column_names, kind, where=where)
    if kind == "any" or is_tokenised(dataset.column_names, kind):
        return dataset
    dataset = dataset.with_format(None)
    is_messages = _first_is_messages(dataset, kind)
    features = _features(dataset.features, kind, is_messages)
    mapped = dataset.map(
        _normalise_batch,
        batched=True,
        fn_kwargs={"kind": kind, "is_messages": is_messages, "columns": list(features)},
        remove_columns=[column for column in dataset.column_names if column not in features],
        features=features,
        num_proc=num_proc if num_proc is None or num_proc <= len(dataset) else len(dataset),
        new_fingerprint=content_hash(dataset._fingerprint, kind, "rows", VERSION)[:32],
        desc=f"Reading {where}",
    )
    if mapped.data.column("fault").null_count == len(mapped):
        return mapped.remove_columns(["fault", "fault_detail"])
    return mapped


def _normalise(row: Row, kind: Kind) -> Row:
    return _READERS[kind](row)


def _first_is_messages(dataset: Dataset, kind: Kind) -> bool:
    """Whether the first readable row is a conversation."""
    for row in dataset:
        try:
            return isinstance(_normalise(row, kind)["prompt"], list)
        except BadRow:
            continue
    return False


def _features(features: Features, kind: Kind, is_messages: bool) -> Features:
    text = Json() if is_messages else Value("string")
    out: dict[str, Any] = {"row_id": Value("string"), "prompt": text}
    names = {COLUMN_ALIASES.get(name, name) for name in features}
    if kind == "pairs":
        out |= {"chosen": text, "rejected": text}
        out |= {name: Value("float64") for name in METHOD_COLUMNS if name in names}
        out |= {name: features[name] for name in REFERENCE_COLUMNS if name in names}
    elif kind == "comparisons":
        out |= {"responses": List(text), "scores": List(Value("float64")), "is_adversarial": Value("bool")}
        out |= {"margin": Value("float64")} if "margin" in names else {}
    else:
        out = {**features, **out}
    out |= {name: Json() for name in ("tools", "chat_template_kwargs") if name in features}
    return Features({**out, "fault": Value("string"), "fault_detail": Value("string")})


def _normalise_batch(
    batch: dict[str, list[Any]], *, kind: Kind, is_messages: bool, columns: list[str]
) -> dict[str, list[Any]]:
    size = len(next(iter(batch.values())))
    rows = []
    for place in range(size):
        row = {name: values[place] for name, values in batch.items()}
        rows.append(_normalise_or_mark(row, kind, is_messages))
    return {name: [row.get(name) for row in rows] for name in columns}


def _normalise_or_mark(row: Row, kind: Kind, is_messages: bool) -> Row:
    original = row if kind == "prompts" else {}
    try:
        clean = _normalise(row, kind)
        if isinstance(clean["prompt"], list) != is_messages:
            other = "a string" if is_messages else "a list of messages"
            raise BadRow(WRONG_TYPE, f"`prompt` is {other}, unlike the rows before")
    except BadRow as fault:
        identity = content_hash(repr(sorted(row.items(), key=str)))[:16]
        emptied = dict.fromkeys(("prompt", "tools", "chat_template_kwargs"))
        return {**original, **emptied, "row_id": identity, "fault": fault.reason, "fault_detail": fault.detail}
    return {**original, **dict.fromkeys(("tools", "chat_template_kwargs")), **clean}


MIXING = ("head", "sample", "share")


@dataclass
class DataArguments:
    """What to train and to evaluate on; the one form into which all generations of recipe keys are translated."""

    train: list[DataSource] = field(default_factory=list, metadata={"help": "Sources of the training rows."})
    test: list[DataSource] = field(
        default_factory=list, metadata={"help": "Sources of the evaluation rows; their fractions are not used."}
    )
    mixing: str = field(
        default="head",
        metadata={
            "help": 'What a fraction means: "head" the first part of the rows (dataset_mixer), "sample" a seeded random part '
            '(dataset_mixture), "share" a share of the whole mixture (TRL\'s datasets).'
        },
    )
    test_split_size: float | int | None = field(
        default=None, metadata={"help": "Hold out this part (below 1) or number of the training rows, by prompt."}
    )
    seed: int = field(default=42, metadata={"help": "Seed of sampling and of the hold-out."})

    def __post_init__(self) -> None:
        self.train = [_as_source(source) for source in self.train]
        self.test = [_as_source(source) for source in self.test]
        if not self.train:
            raise ValueError("No training data: name at least one dataset.")
        if self.mixing not in MIXING:
            raise ValueError(f"mixing must be one of {', '.join(MIXING)}, not {self.mixing!r}.")
        given = [source.fraction is not None for source in self.train]
        if self.mixing == "share" and any(given) and not all(given):
            raise ValueError("Give a fraction for every dataset of the mixture, or for none.")
        if self.test_split_size is not None:
            _check_test_size(self.test_split_size)
            if self.test:
                raise ValueError("Both a test dataset and test_split_size are given; keep one.")
        fractions = [source for source in self.test if source.fraction not in (None, 1)]
        if fractions:
            raise ValueError(f"Test dataset {fractions[0].path!r}: test sets are used whole; remove its fraction.")


def _as_source(value: Any) -> DataSource:
    return DataSource(**value) if isinstance(value, Mapping) else value


def _check_test_size(size: float | int) -> None:
    whole = isinstance(size, int) and not isinstance(size, bool)
    if not (size >= 1 if whole else 0 < size < 1):
        raise ValueError(f"test_split_size must be a part between 0 and 1 or a number of rows, not {size!r}.")


def load_datasets(
    args: DataArguments, kind: Kind = "pairs", *, num_proc: int | None = None
) -> tuple[Dataset, Dataset | None]:
    """The training rows and the evaluation rows (None where the recipe names none), in the schema of `kind`.

    Nothing is dropped here: a row that cannot be used says so in its `fault` column and is counted at tokenisation.

    Args:
        args: sources, fractions and hold-out.
        kind: "pairs", "comparisons", "prompts" (all other columns kept) or "any" (rows as they are).
        num_proc: processes.

    Raises:
        ValueError: a source that cannot be read or has other columns, sources that do not mix, too few prompts to hold
            out.
    """
    with main_process_first():
        train = _join(_thin([_read(source, kind, num_proc) for source in args.train], args), args.train)
        if args.test:
            return train, _join([_read(source, kind, num_proc) for source in args.test], args.test)
        if args.test_split_size is None:
            return train, None
        return hold_out(train, args.test_split_size, seed=args.seed)


def _read(source: DataSource, kind: Kind, num_proc: int | None) -> Dataset:
    dataset = load_source(source)
    return normalise_rows(dataset, kind, num_proc=num_proc, where=f"Dataset {source}")


def _thin(datasets: list[Dataset], args: DataArguments) -> list[Dataset]:
    """The part of each source that its fraction asks for."""
    fractions = [source.fraction for source in args.train]
    sizes = [len(dataset) for dataset in datasets]
    if args.mixing == "share" and None not in fractions:
        shares = [fraction / sum(fractions) for fraction in fractions]  # type: ignore[operator, arg-type]
        total = min(size / share for size, share in zip(sizes, shares))
        counts = [round(share * total) for share in shares]
    else:
        counts = [size if fraction is None else int(fraction * size) for size, fraction in zip(sizes, fractions)]
    thinned = []
    for source, dataset, count in zip(args.train, datasets, counts):
        if count == 0:
            raise ValueError(f"Dataset {source}: fraction {source.fraction} of {len(dataset)} rows leaves none.")
        if count == len(dataset):
            thinned.append(dataset)
        elif args.mixing == "sample":
            order = np.random.default_rng(args.seed).permutation(
                len(dataset)
            )  # as `Dataset.shuffle(seed)` orders them
            thinned.append(dataset.select(np.sort(order[:count])))
        else:
            thinned.append(dataset.select(range(count)))
    return thinned


def _join(datasets: list[Dataset], sources: list[DataSource]) -> Dataset:
    if len(datasets) == 1:
        return datasets[0]
    first = datasets[0]
    for source, dataset in zip(sources[1:], datasets[1:]):
        if is_tokenised(dataset.column_names) != is_tokenised(first.column_names):
            raise ValueError(
                f"Dataset {source} and dataset {sources[0]} do not mix: one of them is tokenised already."
            )
        for column in first.column_names:
            if column in dataset.column_names and first.features[column] != dataset.features[column]:
                raise ValueError(
                    f"Dataset {source} and dataset {sources[0]} do not mix: their {column!r} columns have different "
                    "types, "
                    f"{_type(dataset, column)} and {_type(first, column)}."
                )
    return concatenate_datasets(datasets)


def _type(dataset: Dataset, column: str) -> str:
    feature = dataset.features[column]
    return {"Json": "messages", "Value": getattr(feature, "dtype", "")}.get(type(feature).__name__, str(feature))


def hold_out(
    dataset: Dataset, size: float | int, *, seed: int, key: Callable[[Mapping[str, Any]], str] | None = None
) -> tuple[Dataset, Dataset]:
    """Split `dataset` in two without a common prompt; which prompts are held out does not depend on the rows' order.

    Args:
        dataset: rows with `prompt` or `prompt_ids` (a row without either is a prompt of its own).
        size: part (below 1) or number of rows of the second set, reached to within one prompt's rows.
        seed: which prompts.
        key: names a row's prompt; the default hashes it.

    Returns:
        The remaining rows and the held-out rows, each in their old order.
    """
    _check_test_size(size)
    keys = [(key or prompt_key)(row) for row in dataset]
    target = round(size * len(keys)) if size < 1 else int(size)
    counts: dict[str, int] = dict.fromkeys(sorted(set(keys)), 0)
    for name in keys:
        counts[name] += 1
    names = list(counts)
    held: set[str] = set()
    rows = 0
    for place in np.random.default_rng(seed).permutation(len(names)):
        if rows >= max(target, 1):
            break
        held.add(names[place])
        rows += counts[names[place]]
    if len(held) == len(names):
        raise ValueError(
            f"Cannot hold out {size} of {len(keys)} rows with {len(names)} different prompts: no row would be left."
        )
    return (
        dataset.select([row for row, name in enumerate(keys) if name not in held]),
        dataset.select([row for row, name in enumerate(keys) if name in held]),
    )


def prompt_key(row: Mapping[str, Any]) -> str:
    """A hash of the row's prompt, or of the whole row where it has none."""
    prompt = row.get("prompt") if row.get("prompt") is not None else row.get("prompt_ids")
    return content_hash(prompt if prompt is not None else repr(sorted(row.items(), key=str)))
