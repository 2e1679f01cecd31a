"""The data of a study: one pool of rows that every tokenizer can take, split anew for each seed into train, validation and test.

All seeds share the pool, so it is scored once, and they are not independent: compare runs within a seed.

Reference: the released notebooks of arXiv 2512.10040 (length filter, 7,000 rows drawn with seed 858, 5,000/1,000/1,000 by a permutation per
seed). There rows are permuted; here prompts are, so that no prompt is in two parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from prefopt.data import DataArguments, DataSource, load_datasets
from prefopt.data.loading import prompt_key
from prefopt.data.rows import CONTEXT_COLUMNS
from prefopt.files import content_hash, read_json, read_jsonl, write_json, write_jsonl
from prefopt.pipelines.state import InputHashes
from prefopt.references.length_filter import filter_by_length
from prefopt.references.models import load_tokenizer

POOL_FILE, REPORT_FILE = "pool.jsonl", "pool.json"
PARTS = ("train", "validation", "test")


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
    """Write the pool's rows to `folder`, unless they are there, from the same settings and local files.

    Returns:
        What was left out, and the hash of the pool's settings and of the files that it comes from.

    Raises:
        ValueError: fewer rows pass than are wanted.
    """
    local = Path(pool.source.path).expanduser()
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
            f"pool_rows is {pool.rows}, but only {len(rows)} of the {rows_in} rows of {pool.source} can be used: ask for fewer."
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
    """Write train.jsonl, validation.jsonl and test.jsonl of one seed, unless they are there.

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
    parts = split_rows([prompt_key(row) for row in rows], sizes, seed)
    note.unlink(missing_ok=True)
    for name, indices in zip(PARTS, parts):
        write_jsonl(place / f"{name}.jsonl", [rows[index] for index in indices])
    write_json(note, done)
    return place


def split_rows(prompts: Sequence[str], sizes: Sequence[int], seed: int) -> list[list[int]]:
    """Places of the rows of each part, in the order of a permutation of the prompts; rows of one prompt stay together.

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
    groups: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(row)
    members = list(groups.values())
    parts: list[list[int]] = [[] for _ in sizes]
    part = 0
    for number in np.random.default_rng(seed).permutation(len(members)):
        while part < len(sizes) and len(parts[part]) >= sizes[part]:
            part += 1
        if part == len(sizes):
            break
        parts[part] += members[number]
    if not all(parts):
        raise ValueError(f"{len(members)} prompts are too few for parts of {', '.join(map(str, sizes))} rows.")
    return parts
