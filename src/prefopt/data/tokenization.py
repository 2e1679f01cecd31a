"""Tokenised data sets: rows are templated, tokenised, split and cut here, and every row that is lost is counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc
import torch.distributed
from accelerate import PartialState
from datasets import Dataset, DatasetDict, Features, IterableDataset, Value
from transformers import PreTrainedTokenizerBase

from prefopt.data.builders import PARTS, columns_of, fit, output_features, parts_of, placeholder, read_row
from prefopt.data.encoding import EncodedGroup, Group, check_chat_template, encode_groups, tokenizer_fingerprint
from prefopt.data.faults import NOT_A_PREFIX, BadRow, OnBadRow, check_on_bad_row
from prefopt.data.report import LengthSummary, TokenizationReport
from prefopt.data.rows import Kind, Row, check_columns
from prefopt.data.truncation import Truncation
from prefopt.files import content_hash

# part of the cache key: raise it whenever the same input would give other ids
VERSION = 1
STATUS = Features(
    {"_fault": Value("string"), "_detail": Value("string"), "_not_prefix": Value("bool"), "_cut": Value("string")}
)


@dataclass(frozen=True)
class _Job:
    """All that decides what a row becomes."""

    kind: Kind
    truncation: Truncation
    strict_prefix: bool = False
    template_strings: bool = False


def tokenize_pairs(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    max_prompt_length: int | None = None,
    truncation_mode: str = "keep_start",
    on_bad_row: OnBadRow = "drop",
    strict_prefix: bool = False,
    num_proc: int | None = None,
    name: str = "train",
) -> tuple[Dataset, TokenizationReport]:
    """Preference rows of any accepted shape as token ids, split and cut, with a report of what happened to them.

    Args:
        dataset: rows as in `prefopt.data.rows`, or rows that are tokenised already, which are only checked and cut.
        tokenizer: gives ids, chat template, BOS and end token.
        max_length: tokens of prompt and completion together; None cuts nothing.
        max_prompt_length: tokens of a prompt that has to be cut; None follows `truncation_mode`.
        truncation_mode: "keep_start" or "keep_end"; see `Truncation`.
        on_bad_row: "drop" counts and leaves out a row that cannot be used, "raise" stops at the first.
        strict_prefix: treat a row whose prompt is not a token prefix of prompt + completion as one that cannot be used.
        num_proc: processes.
        name: what the report calls this set.

    Returns:
        A data set with `row_id`, `prompt_ids`, `chosen_ids`, `rejected_ids`, `chosen_bytes`, `rejected_bytes` (UTF-8 bytes
        of the scored text without special tokens) and the method columns that it had; and the report.

    Raises:
        ValueError: wrong columns, images, a streamed set, no chat template for messages, no usable row, wrong lengths.
    """
    job = _Job("pairs", Truncation(max_length, max_prompt_length, truncation_mode), strict_prefix)
    return _tokenize(dataset, tokenizer, job, on_bad_row, num_proc, name)


def tokenize_comparisons(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    max_prompt_length: int | None = None,
    truncation_mode: str = "keep_start",
    on_bad_row: OnBadRow = "drop",
    num_proc: int | None = None,
    name: str = "train",
) -> tuple[Dataset, TokenizationReport]:
    """Comparison rows (a prompt and R >= 2 scored responses, or pairs) as token ids; the rest as in `tokenize_pairs`.

    Returns:
        A data set with `row_id`, `prompt_ids`, `response_ids` (a list for each response), `scores`, `is_adversarial`, and
        `margin` where it had one; and the report.
    """
    job = _Job("comparisons", Truncation(max_length, max_prompt_length, truncation_mode))
    return _tokenize(dataset, tokenizer, job, on_bad_row, num_proc, name)


def tokenize_prompts(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    template_strings: bool = False,
    on_bad_row: OnBadRow = "drop",
    num_proc: int | None = None,
    name: str = "prompts",
) -> tuple[Dataset, TokenizationReport]:
    """Prompts for generation, with the generation prompt and one BOS: the ids that `tokenize_pairs` gives the same prompt.

    Args:
        dataset: rows with a `prompt`, or any preference rows, whose prompts are taken.
        tokenizer: gives ids and chat template.
        max_length: a longer prompt is a row that cannot be used; prompts are never cut here.
        template_strings: read a string prompt as one user turn of a conversation.
        on_bad_row: as in `tokenize_pairs`.
        num_proc: processes.
        name: what the report calls this set.

    Returns:
        The data set with all its columns, and `row_id` (of the prompt) and `prompt_ids`; and the report.
    """
    job = _Job("prompts", Truncation(max_length), template_strings=template_strings)
    return _tokenize(dataset, tokenizer, job, on_bad_row, num_proc, name)


def _tokenize(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    job: _Job,
    on_bad_row: OnBadRow,
    num_proc: int | None,
    name: str,
) -> tuple[Dataset, TokenizationReport]:
    check_on_bad_row(on_bad_row)
    check_dataset(dataset, name)
    check_columns(dataset.column_names, job.kind, where=f"The {name} set")
    _check_template(dataset, tokenizer, job)
    dataset = dataset.with_format(None)
    columns = output_features(dataset.features, job.kind)
    # a fingerprint of our own: what the function closes over (settings, a tokenizer that has been used) must not enter it
    fingerprint = content_hash(dataset._fingerprint, tokenizer_fingerprint(tokenizer), repr(job), VERSION)[:32]
    with main_process_first():
        mapped = dataset.map(
            _tokenize_batch,
            batched=True,
            fn_kwargs={"tokenizer": tokenizer, "job": job, "columns": list(columns)},
            remove_columns=[column for column in dataset.column_names if column not in columns],
            features=Features({**columns, **STATUS}),
            num_proc=num_proc if num_proc is None or num_proc <= len(dataset) else len(dataset),
            new_fingerprint=fingerprint,
            desc=f"Tokenizing {name}",
        )
    return _report(mapped, job.kind, on_bad_row, name)


def check_dataset(dataset: Any, name: str) -> None:
    """Refuse anything but a `datasets.Dataset` with rows."""
    if isinstance(dataset, IterableDataset):
        raise ValueError(f"The {name} set is streamed (IterableDataset): load it without streaming.")
    if isinstance(dataset, DatasetDict):
        raise ValueError(f"The {name} set is a DatasetDict: pick one of its splits {sorted(dataset)}.")
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"The {name} set is a {type(dataset).__name__}; pass a datasets.Dataset (Dataset.from_list makes one)."
        )
    if len(dataset) == 0:
        raise ValueError(f"The {name} set has no rows.")


@contextmanager
def main_process_first() -> Iterator[None]:
    """Let the main process, then each node's main process, fill the data cache before the others read it."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        yield
        return
    state = PartialState()
    with state.main_process_first(), state.local_main_process_first():
        yield


def _check_template(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, job: _Job) -> None:
    """Refuse messages without a chat template at the first usable row, before any work is done."""
    for row in dataset.with_format(None):
        try:
            _, group = read_row(row, job.kind, template_strings=job.template_strings)
        except BadRow:
            continue
        if isinstance(group, Group) and isinstance(group.prompt, list):
            check_chat_template(tokenizer)
        return


def _tokenize_batch(
    batch: dict[str, list[Any]], *, tokenizer: PreTrainedTokenizerBase, job: _Job, columns: list[str]
) -> dict[str, list[Any]]:
    size = len(next(iter(batch.values())))
    rows = [{name: values[place] for name, values in batch.items()} for place in range(size)]
    kept, groups = _encode_rows(rows, tokenizer, job)
    results = [_finish(group, tokenizer, job) for group in groups]
    faults = [result if isinstance(result, BadRow) else None for result in results]
    fitted = [None if isinstance(result, BadRow) else result for result in results]
    ids = columns_of([result[0] if result else None for result in fitted], job.kind, tokenizer)
    output = {
        name: ids[name] if name in ids else [row.get(name, placeholder(name)) for row in kept] for name in columns
    }
    return {
        **output,
        "_fault": [fault.reason if fault else None for fault in faults],
        "_detail": [fault.detail if fault else None for fault in faults],
        "_not_prefix": [bool(result) and not result[0].prompt_is_prefix for result in fitted],  # type: ignore[index]
        "_cut": [parts_of(result[1], job.kind) if result else "" for result in fitted],
    }


def _encode_rows(
    rows: list[Row], tokenizer: PreTrainedTokenizerBase, job: _Job
) -> tuple[list[Row], list[EncodedGroup | BadRow]]:
    """The kept columns and the uncut ids of each row, or its fault."""
    kept: list[Row] = []
    groups: list[Any] = []
    for row in rows:
        original = row if job.kind == "prompts" else {}
        try:
            clean, group = read_row(row, job.kind, template_strings=job.template_strings)
        except BadRow as fault:
            clean, group = {}, fault  # type: ignore[assignment]
        kept.append({**original, **clean})
        groups.append(group)
    places = [place for place, group in enumerate(groups) if isinstance(group, Group)]
    for place, encoded in zip(places, encode_groups([groups[place] for place in places], tokenizer)):
        groups[place] = encoded
    return kept, groups


def _finish(
    group: EncodedGroup | BadRow, tokenizer: PreTrainedTokenizerBase, job: _Job
) -> tuple[EncodedGroup, list[int]] | BadRow:
    if isinstance(group, BadRow):
        return group
    if job.strict_prefix and not group.prompt_is_prefix:
        return BadRow(NOT_A_PREFIX, f"they part after {len(group.prompt_ids)} tokens")
    try:
        return fit(group, job.truncation, tokenizer.bos_token_id)
    except BadRow as fault:
        return fault


def _report(mapped: Dataset, kind: Kind, on_bad_row: OnBadRow, name: str) -> tuple[Dataset, TokenizationReport]:
    """Leave out the faulty rows (or raise at the first) and count everything."""
    faults, details = mapped.data.column("_fault").to_pylist(), mapped.data.column("_detail").to_pylist()
    report = TokenizationReport(name, len(mapped), sum(fault is None for fault in faults))
    for row, (fault, detail) in enumerate(zip(faults, details)):
        if fault is None:
            continue
        if on_bad_row == "raise":
            raise ValueError(f"Row {row} of the {name} set: {fault} ({detail}). Mend it, or set `on_bad_row: drop`.")
        report.examples.setdefault(fault, (row, detail))
        report.dropped[fault] = report.dropped.get(fault, 0) + 1
    if not report.rows_kept:
        raise ValueError(f"No row of the {name} set can be used.\n{report.table()}")
    if report.dropped:
        mapped = mapped.select([row for row, fault in enumerate(faults) if fault is None])
    cuts = [cut.split(",") for cut in mapped["_cut"] if cut]
    counts = Counter(part for parts in cuts for part in parts)
    report.rows_cut, report.cut = len(cuts), {part: counts[part] for part in PARTS[kind]}
    report.not_prefix = sum(mapped["_not_prefix"])
    report.lengths = {part: LengthSummary.of(_lengths(mapped, part)) for part in PARTS[kind]}
    return mapped.remove_columns(list(STATUS)), report


def _lengths(mapped: Dataset, part: str) -> Any:
    """Token counts of one part over all kept rows."""
    name = {"responses": "response_ids"}.get(part, f"{part}_ids")
    values = mapped.with_format("arrow")[:][name]
    return pc.list_value_length(pc.list_flatten(values) if part == "responses" else values).to_numpy()
