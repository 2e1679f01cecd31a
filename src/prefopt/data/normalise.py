"""Whole data sets brought to one schema, so that sources of different shapes can be mixed."""

from __future__ import annotations

from typing import Any

from datasets import Dataset, Features, Json, List, Value

from prefopt.data.comparisons import normalise_comparison
from prefopt.data.faults import WRONG_TYPE, BadRow
from prefopt.data.rows import (
    COLUMN_ALIASES,
    METHOD_COLUMNS,
    REFERENCE_COLUMNS,
    Kind,
    Row,
    check_columns,
    is_tokenised,
    normalise_pair,
    normalise_prompt,
)
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


def _read(row: Row, kind: Kind) -> Row:
    return _READERS[kind](row)


def _first_is_messages(dataset: Dataset, kind: Kind) -> bool:
    """Whether the first readable row is a conversation."""
    for row in dataset:
        try:
            return isinstance(_read(row, kind)["prompt"], list)
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
        clean = _read(row, kind)
        if isinstance(clean["prompt"], list) != is_messages:
            other = "a string" if is_messages else "a list of messages"
            raise BadRow(WRONG_TYPE, f"`prompt` is {other}, unlike the rows before")
    except BadRow as fault:
        identity = content_hash(repr(sorted(row.items(), key=str)))[:16]
        emptied = dict.fromkeys(("prompt", "tools", "chat_template_kwargs"))
        return {**original, **emptied, "row_id": identity, "fault": fault.reason, "fault_detail": fault.detail}
    return {**original, **dict.fromkeys(("tools", "chat_template_kwargs")), **clean}
