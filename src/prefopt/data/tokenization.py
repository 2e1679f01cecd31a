"""Tokenised data sets: rows are templated, tokenised, split and cut here, and every row that is lost is counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch.distributed
from accelerate import PartialState
from datasets import Dataset, DatasetDict, Features, IterableDataset, List, Value
from transformers import PreTrainedTokenizerBase

from prefopt.data.encoding import (
    EncodedGroup,
    Group,
    Truncation,
    check_chat_template,
    encode_groups,
    tokenizer_fingerprint,
)
from prefopt.data.messages import (
    EMPTY_COMPLETION,
    IDENTICAL_AFTER_CUT,
    IDENTICAL_COMPLETIONS,
    MISSING_FIELD,
    NO_ROOM,
    NOT_A_PREFIX,
    PROMPT_TOO_LONG,
    BadRow,
    OnBadRow,
    as_messages,
    check_on_bad_row,
)
from prefopt.data.rows import (
    COLUMN_ALIASES,
    METHOD_COLUMNS,
    REFERENCE_COLUMNS,
    Kind,
    Row,
    check_columns,
    check_scores,
    is_tokenised,
    method_values,
    normalise_comparison,
    normalise_pair,
    normalise_prompt,
    number,
    raise_recorded_fault,
    row_id,
)
from prefopt.files import content_hash

IDS = List(Value("int32"))
# the names under which lengths and cuts of a group's parts are reported
PARTS: dict[str, tuple[str, ...]] = {
    "pairs": ("prompt", "chosen", "rejected"),
    "comparisons": ("prompt", "responses"),
    "prompts": ("prompt",),
}


def read_row(
    row: Mapping[str, Any], kind: Kind, *, template_strings: bool = False
) -> tuple[Row, Group | EncodedGroup]:
    """The columns that a row keeps, and its prompt and completions as texts, or as ids where it is tokenised already."""
    raise_recorded_fault(row)
    if is_tokenised(row, kind):
        return _read_ids(row, kind)
    if kind == "pairs":
        clean = normalise_pair(row)
        completions = [clean.pop("chosen"), clean.pop("rejected")]
    elif kind == "comparisons":
        clean = normalise_comparison(row)
        completions = clean.pop("responses")
    else:
        clean, completions = normalise_prompt(row), []
    prompt = clean.pop("prompt")
    if template_strings:
        prompt = as_messages(prompt)
    group = Group(prompt, completions, clean.pop("tools", None), clean.pop("chat_template_kwargs", None))
    return clean, group


def _read_ids(row: Mapping[str, Any], kind: Kind) -> tuple[Row, EncodedGroup]:
    names = ("prompt_ids", "chosen_ids", "rejected_ids") if kind == "pairs" else ("prompt_ids", "response_ids")
    for name in names:
        if row[name] is None:
            raise BadRow(MISSING_FIELD, f"`{name}` is missing")
    prompt = list(row["prompt_ids"])
    if not prompt:
        raise BadRow(MISSING_FIELD, "`prompt_ids` is empty")
    if kind == "pairs":
        completions = [list(row["chosen_ids"]), list(row["rejected_ids"])]
        kept = {"row_id": row.get("row_id") or row_id(prompt, completions, {}), **method_values(row)}  # type: ignore[arg-type]
    else:
        completions = [list(ids) for ids in row["response_ids"]]
        scores = check_scores(row["scores"], len(completions))
        identity = row.get("row_id") or row_id(prompt, completions, {"scores": scores})  # type: ignore[arg-type]
        kept = {"row_id": identity, "scores": scores, "is_adversarial": bool(row.get("is_adversarial"))}
        if row.get("margin") is not None:
            kept["margin"] = number(row["margin"], "margin")
    return kept, EncodedGroup(prompt, completions)


def fit(encoded: EncodedGroup, truncation: Truncation, bos_token_id: int | None) -> tuple[EncodedGroup, list[int]]:
    """The group as it is trained on, and the places of the parts that were cut (0 is the prompt).

    Raises:
        BadRow: nothing is left to tell the completions apart.
    """
    if not encoded.completion_ids:
        limit = truncation.max_length
        if limit is not None and len(encoded.prompt_ids) > limit:
            raise BadRow(PROMPT_TOO_LONG, f"{len(encoded.prompt_ids)} tokens, max_length {limit}")
        return encoded, []
    if not all(encoded.completion_ids):
        raise BadRow(EMPTY_COMPLETION, "a completion has no token of its own")
    if _all_same(encoded.completion_ids):
        raise BadRow(IDENTICAL_COMPLETIONS, "all completions have the same tokens")
    prompt, completions = truncation.cut(encoded.prompt_ids, encoded.completion_ids, bos_token_id)
    if not all(completions):
        raise BadRow(NO_ROOM, f"{len(encoded.prompt_ids)} prompt tokens, max_length {truncation.max_length}")
    if _all_same(completions):
        raise BadRow(IDENTICAL_AFTER_CUT, f"the kept {len(completions[0])} tokens of all completions are the same")
    before, after = [encoded.prompt_ids, *encoded.completion_ids], [prompt, *completions]
    cut = [place for place, (whole, kept) in enumerate(zip(before, after)) if len(kept) < len(whole)]
    return EncodedGroup(prompt, completions, encoded.prompt_is_prefix), cut


def _all_same(completions: Sequence[Sequence[int]]) -> bool:
    return len(completions) > 1 and all(list(ids) == list(completions[0]) for ids in completions[1:])


def columns_of(
    groups: Sequence[EncodedGroup | None], kind: Kind, tokenizer: PreTrainedTokenizerBase
) -> dict[str, list[Any]]:
    """The id columns of a batch; a faulty row (None) gets empty ones."""
    columns: dict[str, list[Any]] = {"prompt_ids": [group.prompt_ids if group else [] for group in groups]}
    if kind == "pairs":
        for place, name in enumerate(("chosen", "rejected")):
            ids = [group.completion_ids[place] if group else [] for group in groups]
            columns[f"{name}_ids"] = ids
            columns[f"{name}_bytes"] = [len(text.encode("utf-8")) for text in scored_texts(ids, tokenizer)]
    elif kind == "comparisons":
        columns["response_ids"] = [group.completion_ids if group else [] for group in groups]
    return columns


def scored_texts(ids: list[list[int]], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of each list of ids, special tokens left out."""
    return list(tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def output_features(features: Mapping[str, Any], kind: Kind) -> Features:
    """The columns of a tokenised data set, given those of its rows."""
    out: dict[str, Any] = {"row_id": Value("string"), "prompt_ids": IDS}
    names = {COLUMN_ALIASES.get(name, name) for name in features}
    if kind == "pairs":
        out |= {
            "chosen_ids": IDS,
            "rejected_ids": IDS,
            "chosen_bytes": Value("int64"),
            "rejected_bytes": Value("int64"),
        }
        out |= {name: Value("float64") for name in METHOD_COLUMNS if name in names}
        out |= {name: features[name] for name in REFERENCE_COLUMNS if name in names}
    elif kind == "comparisons":
        out |= {"response_ids": List(IDS), "scores": List(Value("float64")), "is_adversarial": Value("bool")}
        out |= {"margin": Value("float64")} if "margin" in names else {}
    else:
        out = {**features, **out}
    return Features(out)


def placeholder(name: str) -> Any:
    """What a faulty row holds in a kept column until it is dropped."""
    return {"row_id": "", "scores": [], "is_adversarial": False}.get(name)


def parts_of(cut: Iterable[int], kind: Kind) -> str:
    """The reported names of cut parts, joined by commas."""
    names = PARTS[kind]
    return ",".join(dict.fromkeys(names[min(place, len(names) - 1)] for place in cut))


@dataclass(frozen=True)
class LengthSummary:
    """Lengths in tokens over the kept rows, after cutting."""

    mean: float
    p50: float
    p95: float
    max: int

    @classmethod
    def of(cls, lengths: Sequence[int] | np.ndarray) -> LengthSummary:
        """Summary of at least one length."""
        values = np.asarray(lengths)
        return cls(
            float(values.mean()), float(np.percentile(values, 50)), float(np.percentile(values, 95)), int(values.max())
        )


@dataclass
class TokenizationReport:
    """Counts of one data set.

    Args:
        name: which set ("train", "eval", ...).
        rows_in: rows before anything was dropped.
        rows_kept: rows that are used.
        dropped: rows left out, for each reason.
        examples: for each reason, the first such row (counted from 0) and what was found there.
        cut: kept rows in which this part was cut ("prompt", "chosen", "rejected", "responses").
        rows_cut: kept rows in which anything was cut.
        not_prefix: kept rows whose prompt alone is not a token prefix of prompt + completion.
        lengths: tokens of each part.
    """

    name: str
    rows_in: int
    rows_kept: int
    dropped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, tuple[int, str]] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)
    rows_cut: int = 0
    not_prefix: int = 0
    lengths: dict[str, LengthSummary] = field(default_factory=dict)

    @property
    def rows_dropped(self) -> int:
        """Rows left out for any reason."""
        return sum(self.dropped.values())

    def table(self) -> str:
        """The counts as lines of text."""
        lines = [
            f"{self.name}: {self.rows_in} rows read, {self.rows_kept} kept, {self.rows_dropped} dropped, "
            f"{self.rows_cut} cut"
        ]
        for reason, count in sorted(self.dropped.items(), key=lambda item: (-item[1], item[0])):
            row, detail = self.examples[reason]
            lines.append(f"  dropped  {count:>8}  {reason} (first: row {row}, {detail})")
        for part, count in self.cut.items():
            if count:
                lines.append(f"  cut      {count:>8}  {part}")
        if self.not_prefix:
            lines.append(
                f"  note     {self.not_prefix:>8}  prompts are not a token prefix of prompt + completion; split where "
                "they part"
            )
        if self.lengths:
            lines.append(f"  {'tokens':<10}{'mean':>10}{'p50':>8}{'p95':>8}{'max':>8}")
            for part, summary in self.lengths.items():
                lines.append(
                    f"  {part:<10}{summary.mean:>10.1f}{summary.p50:>8.0f}{summary.p95:>8.0f}{summary.max:>8}"
                )
        return "\n".join(lines)


def describe_sample(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any]) -> str:
    """One tokenised row as text, special tokens shown and the scored tokens between ⟦ and ⟧.

    Args:
        tokenizer: the tokenizer that made the ids.
        row: a row of tokenised pairs (`prompt_ids`, `chosen_ids`, `rejected_ids`) or comparisons (`response_ids`).
    """
    prompt = list(row["prompt_ids"])
    if "response_ids" in row:
        parts = {
            f"response {number} (score {score:g})": ids
            for number, (ids, score) in enumerate(zip(row["response_ids"], row["scores"]))
        }
    else:
        parts = {"chosen": row["chosen_ids"], "rejected": row["rejected_ids"]}
    lines = [f"row {row['row_id']}: {len(prompt)} prompt tokens, then the scored tokens between ⟦ and ⟧"]
    context = str(tokenizer.decode(prompt))
    lines.append(f"prompt\n{context}")
    for name, ids in parts.items():
        whole = str(tokenizer.decode([*prompt, *ids]))
        text = whole[len(context) :] if whole.startswith(context) else tokenizer.decode(list(ids))
        lines.append(f"{name}, {len(ids)} tokens\n⟦{text}⟧")
    return "\n".join(lines)


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
        strict_prefix: treat a row whose prompt is not a token prefix of prompt + completion as one that cannot be
            used.
        num_proc: processes.
        name: what the report calls this set.

    Returns:
        A data set with `row_id`, `prompt_ids`, `chosen_ids`, `rejected_ids`, `chosen_bytes`, `rejected_bytes` (UTF-8
        bytes
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
        A data set with `row_id`, `prompt_ids`, `response_ids` (a list for each response), `scores`, `is_adversarial`,
        and
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
    # a fingerprint of our own: what the function closes over (settings, a tokenizer that has been used) must not enter
    # it
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
