"""Data sets from recipes: sources are read, thinned, normalised (or tokenised), joined, and test rows held out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets

from prefopt.arguments import check_settings, setting
from prefopt.data.holdout import check_test_size, hold_out, hold_out_rows
from prefopt.data.rows import Kind, check_columns, check_unused_text, is_tokenised, normalise, text_features
from prefopt.data.sources import DataSource, load_source
from prefopt.data.tokenization import OUTCOME, RowTokenizer, form_of, main_process_first, outcomes_of
from prefopt.files import content_hash

VERSION = 2


@dataclass
class DataArguments:
    """What to train and to evaluate on; the one form into which all generations of recipe keys are translated."""

    train: list[DataSource] = field(default_factory=list, metadata={"help": "Sources of the training rows."})
    test: list[DataSource] = field(
        default_factory=list, metadata={"help": "Sources of the evaluation rows; their fractions are not used."}
    )
    mixing: str = setting(
        "head",
        'What a fraction means: "head" the first part of the rows (dataset_mixer), "sample" a seeded random part '
        '(dataset_mixture), "share" a share of the whole mixture (TRL\'s datasets).',
        choices=("head", "sample", "share"),
    )
    test_split_size: float | int | None = setting(
        None, "Hold out this part (below 1) or number of the training rows, by prompt."
    )
    seed: int = setting(42, "Seed of sampling and of the hold-out.")

    def __post_init__(self) -> None:
        self.train, self.test = ([_as_source(source) for source in part] for part in (self.train, self.test))
        if not self.train:
            raise ValueError("No training data: name at least one dataset.")
        check_settings(self)
        given = [source.fraction is not None for source in self.train]
        if self.mixing == "share" and any(given) and not all(given):
            raise ValueError("Give a fraction for every dataset of the mixture, or for none.")
        if self.test_split_size is not None:
            check_test_size(self.test_split_size)
            if self.test:
                raise ValueError("Both a test dataset and test_split_size are given; keep one.")
        fractions = [source for source in self.test if source.fraction not in (None, 1)]
        if fractions:
            raise ValueError(f"Test dataset {fractions[0].path!r}: test sets are used whole; remove its fraction.")


def _as_source(value: Any) -> DataSource:
    return DataSource(**value) if isinstance(value, Mapping) else value


def load_datasets(
    args: DataArguments, kind: Kind = "pairs", *, num_proc: int | None = None
) -> tuple[Dataset, Dataset | None]:
    """Load the training rows and the evaluation rows (None where the recipe names none) in the schema of `kind`.

    Nothing is dropped here: a row that cannot be used says so in its `fault` column and is counted at tokenisation.

    Args:
        args: sources, fractions and hold-out.
        kind: "pairs", "comparisons", "prompts" (all other columns kept) or "any" (rows as they are).
        num_proc: processes.

    Raises:
        ValueError: a source that cannot be read or has other columns, sources that do not mix, too few prompts to hold
            out.
    """
    return _load(args, kind, lambda dataset, where: normalise_rows(dataset, kind, num_proc=num_proc, where=where))


def load_tokenized(
    args: DataArguments, tokenize: RowTokenizer, *, num_proc: int | None = None
) -> tuple[Dataset, Dataset | None]:
    """Load the same rows as `load_datasets`, each read once and tokenised at once.

    Returns:
        The training and the evaluation rows as `RowTokenizer.map` returns them: `RowTokenizer.settle` drops the faulty
        ones and counts.
    """
    return _load(args, tokenize.kind, lambda dataset, where: tokenize.map(dataset, num_proc=num_proc, where=where))


def _load(
    args: DataArguments, kind: Kind, prepare: Callable[[Dataset, str], Dataset]
) -> tuple[Dataset, Dataset | None]:
    def join(sources: list[DataSource], datasets: list[Dataset]) -> Dataset:
        tokenised = [is_tokenised(dataset.column_names, kind) for dataset in datasets]
        prepared = [prepare(dataset, f"Dataset {source}") for source, dataset in zip(sources, datasets)]
        return _join(sources, prepared, tokenised)

    with main_process_first():
        train = join(args.train, _thin([load_source(source) for source in args.train], args))
        if args.test:
            return train, join(args.test, [load_source(source) for source in args.test])
    if args.test_split_size is None:
        return train, None
    if OUTCOME not in train.column_names:
        return hold_out(train, args.test_split_size, seed=args.seed)
    names = [outcome.prompt for outcome in outcomes_of(train)]
    kept, held = hold_out_rows(names, args.test_split_size, seed=args.seed)
    return train.select(kept), train.select(held)


def _thin(datasets: list[Dataset], args: DataArguments) -> list[Dataset]:
    """Select the part of each source that its fraction asks for."""
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
        if count < len(dataset):
            places: Any = range(count)
            if args.mixing == "sample":  # the rows that `Dataset.shuffle(seed)` puts first
                places = np.sort(np.random.default_rng(args.seed).permutation(len(dataset))[:count])
            dataset = dataset.select(places)
        thinned.append(dataset)
    return thinned


def _join(sources: list[DataSource], datasets: list[Dataset], tokenised: list[bool]) -> Dataset:
    """Concatenate prepared sources.

    Raises:
        ValueError: some are token ids and some are not, or some are texts and some are messages, or the types of a
            column differ.
    """
    first = datasets[0]
    for source, dataset, is_ids in zip(sources[1:], datasets[1:], tokenised[1:]):
        both = f"Dataset {source} and dataset {sources[0]} do not mix:"
        if is_ids != tokenised[0]:
            raise ValueError(f"{both} one of them is tokenised already.")
        common = [column for column in first.column_names if column in dataset.column_names]
        types = [(column, _type(dataset, column), _type(first, column)) for column in common]
        if differing := next((column for column in types if column[1] != column[2]), None):
            column, one, other = differing
            column = "prompt" if column == OUTCOME else column
            raise ValueError(f"{both} their {column!r} columns have different types, {one} and {other}.")
    return concatenate_datasets(datasets)


def _type(dataset: Dataset, column: str) -> str:
    """Describe the type of a column; of the outcomes' column, the form of the rows that it is about."""
    feature = dataset.features[column]
    if column == OUTCOME:
        return "messages" if form_of(outcomes_of(dataset)) else "string"
    return {"Json": "messages", "Value": getattr(feature, "dtype", "")}.get(type(feature).__name__, str(feature))


def normalise_rows(
    dataset: Dataset, kind: Kind, *, num_proc: int | None = None, where: str = "The dataset"
) -> Dataset:
    """Bring all rows to the schema of `kind`; nothing is dropped: a row that cannot be read says why in `fault`.

    Tokenised rows, and rows of kind "any", are returned unchanged. Message lists are stored as JSON values, which
    keeps messages with different keys apart; strings are stored as strings.

    Raises:
        ValueError: columns that cannot be read as `kind`.
    """
    check_columns(dataset.column_names, kind, where=where)
    if kind == "any" or is_tokenised(dataset.column_names, kind):
        return dataset
    dataset = dataset.with_format(None)
    check_unused_text(dataset, kind, where=where)
    first = next(
        (clean for row in dataset if (clean := normalise(row, kind, ("prompt", "fault")))["fault"] is None), {}
    )
    is_messages = isinstance(first.get("prompt"), list)
    features = text_features(dataset.features, kind, is_messages=is_messages)
    mapped = dataset.map(
        _normalise_batch,
        batched=True,
        fn_kwargs={"kind": kind, "is_messages": is_messages, "columns": list(features)},
        remove_columns=[column for column in dataset.column_names if column not in features],
        features=features,
        num_proc=num_proc and min(num_proc, len(dataset)),
        new_fingerprint=content_hash(dataset._fingerprint, kind, "rows", VERSION)[:32],
        desc=f"Reading {where}",
    )
    if mapped.data.column("fault").null_count == len(mapped):
        return mapped.remove_columns(["fault", "fault_detail"])
    return mapped


def _normalise_batch(
    batch: dict[str, list[Any]], *, kind: Kind, is_messages: bool, columns: list[str]
) -> dict[str, list[Any]]:
    rows = [dict(zip(batch, values)) for values in zip(*batch.values())]
    clean = [normalise(row, kind, columns, is_messages=is_messages) for row in rows]
    return {name: [row[name] for row in clean] for name in columns}
