"""The data of a study: one pool of rows that every tokenizer can take, split anew for each seed.

All seeds share the pool, so it is scored once, and they are not independent: compare runs within a seed.

Reference: the released notebooks of arXiv 2512.10040 (length filter, 7,000 rows drawn with seed 858, 5,000/1,000/1,000
by a permutation per seed). There rows are permuted; here prompts are, so that no prompt is in two parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from prefopt.data import DataArguments, DataSource, load_datasets, tokenize_pairs
from prefopt.data.encoding import load_tokenizer
from prefopt.data.holdout import fill_with_prompts, prompt_name
from prefopt.data.loading import normalise_rows
from prefopt.data.rows import CONTEXT_COLUMNS
from prefopt.files import content_hash, read_json, read_jsonl, user_path, write_json, write_jsonl
from prefopt.pipelines.state import InputHashes
from prefopt.references.filling import pair_lengths

POOL_FILE, REPORT_FILE = "pool.jsonl", "pool.json"
PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class LengthFilterReport:
    """Rows left out at each stage, and the thresholds (in tokens) that were used."""

    rows_in: int
    unusable: int
    short_prompts: int
    short_replies: int
    too_long: int
    prompt_threshold: float
    chosen_threshold: float
    rejected_threshold: float

    @property
    def rows_kept(self) -> int:
        """Rows that are left."""
        return self.rows_in - self.unusable - self.short_prompts - self.short_replies - self.too_long


def filter_by_length(
    rows: Dataset,
    tokenizers: Sequence[PreTrainedTokenizerBase],
    *,
    max_length: int,
    percentile: float = 2.5,
    num_proc: int | None = None,
) -> tuple[Dataset, LengthFilterReport]:
    """Keep the rows that pass three filters, one after the other.

    With p, c, r the largest counts over the tokenizers of prompt, prompt + chosen and prompt + rejected: first p above
    its `percentile`; then c - p and r - p, each above its own percentile among the rows that are left; then c and r at
    most `max_length`. A row that some tokenizer cannot take counts as infinitely long.

    Args:
        rows: preference rows in any form.
        tokenizers: M tokenizers with their chat templates.
        max_length: in tokens.
        percentile: 0 to 100, inclusive: a row at the percentile goes; 0 removes the shortest rows only.
        num_proc: processes that tokenise.

    Returns:
        The rows that are left, normalised, and what was left out.

    Raises:
        ValueError: no row is left, or a tokenizer has no chat template.

    Reference: the released notebooks of arXiv 2512.10040 (percentile 2.5, max_length 1024, seven tokenizers).
    """
    rows = normalise_rows(rows, "pairs", num_proc=num_proc)
    lengths = _longest(rows, tokenizers, num_proc)
    prompt, chosen, rejected = lengths
    keep = np.isfinite(lengths).all(axis=0)
    thresholds: list[float] = []

    def long_enough(values: np.ndarray) -> np.ndarray:
        thresholds.append(float(np.percentile(values[keep], percentile)) if keep.any() else float("nan"))
        return values > thresholds[-1]

    with np.errstate(invalid="ignore"):  # infinite rows are out already
        replies = chosen - prompt, rejected - prompt
    left = [len(rows), keep.sum()]
    keep &= long_enough(prompt)
    left.append(keep.sum())
    keep &= long_enough(replies[0]) & long_enough(replies[1])
    left.append(keep.sum())
    keep &= np.maximum(chosen, rejected) <= max_length
    left.append(keep.sum())
    report = LengthFilterReport(len(rows), *(-np.diff(left)).tolist(), *thresholds)
    if not keep.any():
        raise ValueError(f"No row passes the length filter ({report}): raise `max_length` or lower the percentile.")
    return rows.select(np.flatnonzero(keep)), report


def _longest(rows: Dataset, tokenizers: Sequence[PreTrainedTokenizerBase], num_proc: int | None) -> np.ndarray:
    """Return (3, N) largest counts over the tokenizers: prompt, prompt + chosen, prompt + rejected."""
    longest = np.zeros((3, len(rows)))
    for tokenizer in tokenizers:
        tokenised, _ = tokenize_pairs(rows, tokenizer, max_length=None, num_proc=num_proc, name="rows")
        found = dict(zip(tokenised["row_id"], pair_lengths(tokenised).T))
        longest = np.maximum(longest, np.array([found.get(row_id, (np.inf,) * 3) for row_id in rows["row_id"]]).T)
    return longest


@dataclass(frozen=True)
class Pool:
    """Which rows a study is about.

    Attributes:
        source: where they come from.
        tokenizers: the models whose tokenizers must take them.
        rows: how many are drawn.
        seed: of the draw.
        max_length: longest prompt + completion in tokens of any of the models; None: no limit.
        percentile: prompts and replies at or below it are too short (2.5 in the paper).
    """

    source: DataSource
    tokenizers: tuple[str, ...]
    rows: int
    seed: int
    max_length: int | None
    percentile: float


def make_pool(pool: Pool, folder: Path) -> dict[str, Any]:
    """Write the pool's rows to `folder`, unless it holds them, made from the same settings and local files.

    Returns:
        Counts of the rows left out, and the hash of the pool's settings and of the files that it comes from.

    Raises:
        ValueError: fewer rows pass than are wanted.
    """
    local = user_path(pool.source.path)
    settings = content_hash(asdict(pool), InputHashes(folder, keep=False).of(local) if local.exists() else "")
    report_path = folder / REPORT_FILE
    if report_path.is_file() and (folder / POOL_FILE).is_file():
        report: dict[str, Any] = read_json(report_path)
        if report["settings"] == settings:
            return report
    rows, _ = load_datasets(DataArguments(train=[pool.source]))
    rows_in = len(rows)
    limit = pool.max_length if pool.max_length is not None else np.iinfo(np.int64).max
    tokenizers = [load_tokenizer(name) for name in pool.tokenizers]
    rows, left_out = filter_by_length(rows, tokenizers, max_length=int(limit), percentile=pool.percentile)
    if len(rows) < pool.rows:
        raise ValueError(
            f"pool_rows is {pool.rows}, but only {len(rows)} of the {rows_in} rows of {pool.source} can be used: "
            "ask for fewer."
        )
    drawn = np.sort(np.random.default_rng(pool.seed).permutation(len(rows))[: pool.rows])
    report_path.unlink(missing_ok=True)  # the rows of another pool
    write_jsonl(folder / POOL_FILE, _texts(rows.select(drawn)))
    report = {"settings": settings, "rows": pool.rows, **asdict(left_out), "rows_kept": left_out.rows_kept}
    write_json(report_path, report)
    return report


def _texts(rows: Dataset) -> list[dict[str, Any]]:
    kept = ("prompt", "chosen", "rejected", *CONTEXT_COLUMNS)
    return [{name: row[name] for name in kept if row.get(name) is not None} for row in rows]


def split_pool(folder: Path, seed: int, sizes: Sequence[int]) -> Path:
    """Write train.jsonl, validation.jsonl and test.jsonl of one seed, unless they exist.

    Args:
        folder: where `make_pool` has written.
        seed: of the permutation.
        sizes: rows of train, validation and test.

    Returns:
        Their folder.

    Raises:
        ValueError: the pool is too small.
    """
    place = folder / f"seed-{seed}"
    done = {"pool": read_json(folder / REPORT_FILE)["settings"], "sizes": list(sizes)}
    note = place / "split.json"
    if note.is_file() and read_json(note) == done:
        return place
    rows = read_jsonl(folder / POOL_FILE)
    parts = split_rows([prompt_name(row).same for row in rows], sizes, seed)
    note.unlink(missing_ok=True)
    for name, indices in zip(PARTS, parts):
        write_jsonl(place / f"{name}.jsonl", [rows[index] for index in indices])
    write_json(note, done)
    return place


def split_rows(prompts: Sequence[str], sizes: Sequence[int], seed: int) -> list[list[int]]:
    """Return the places of each part's rows, by a permutation of the prompts; rows of one prompt stay together.

    A part is filled until it has its size, to within one prompt's rows; the last part takes no more than its size.

    Args:
        prompts: (N,) names of the rows' prompts.
        sizes: of the parts.
        seed: of the permutation.

    Raises:
        ValueError: too few rows for the sizes.
    """
    if sum(sizes) > len(prompts):
        raise ValueError(f"{' + '.join(map(str, sizes))} rows are wanted of a pool of {len(prompts)}.")
    different = list(dict.fromkeys(prompts))
    order = [different[number] for number in np.random.default_rng(seed).permutation(len(different))]
    parts = fill_with_prompts(prompts, sizes, order)
    if not all(parts):
        raise ValueError(f"{len(different)} prompts are too few for parts of {', '.join(map(str, sizes))} rows.")
    return parts
