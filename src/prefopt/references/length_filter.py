"""Keep the rows whose texts are neither very short nor too long for any of several tokenizers.

Lengths are templated: prompt with generation prompt, prompt + chosen, prompt + rejected. The longest count over the
tokenizers decides, so one row is in or out for all models alike. N rows, M tokenizers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from prefopt.data.normalise import normalise_rows
from prefopt.data.tokenization import tokenize_pairs


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
    """Rows that pass three filters, one after the other.

    With p, c, r the largest counts over the tokenizers of prompt, prompt + chosen and prompt + rejected: first p above its
    `percentile`; then c - p and r - p, each above its own percentile among the rows that are left; then c and r at most
    `max_length`. A row that some tokenizer cannot take counts as infinitely long.

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
    counts = [int((~keep).sum())]
    thresholds = [_percentile(prompt[keep], percentile)]
    keep, dropped = _narrow(keep, prompt > thresholds[0])
    counts.append(dropped)
    with np.errstate(invalid="ignore"):  # infinite rows are out already
        replies = chosen - prompt, rejected - prompt
    thresholds += [_percentile(reply[keep], percentile) for reply in replies]
    keep, dropped = _narrow(keep, (replies[0] > thresholds[1]) & (replies[1] > thresholds[2]))
    counts.append(dropped)
    keep, dropped = _narrow(keep, np.maximum(chosen, rejected) <= max_length)
    counts.append(dropped)
    report = LengthFilterReport(len(rows), *counts, *thresholds)
    if not keep.any():
        raise ValueError(f"No row passes the length filter ({report}): raise `max_length` or lower the percentile.")
    return rows.select(np.flatnonzero(keep)), report


def _longest(rows: Dataset, tokenizers: Sequence[PreTrainedTokenizerBase], num_proc: int | None) -> np.ndarray:
    """(3, N) largest counts over the tokenizers: prompt, prompt + chosen, prompt + rejected."""
    longest = np.zeros((3, len(rows)))
    for tokenizer in tokenizers:
        tokenised, _ = tokenize_pairs(rows, tokenizer, max_length=None, num_proc=num_proc, name="rows")
        found = {
            row_id: (len(prompt), len(prompt) + len(chosen), len(prompt) + len(rejected))
            for row_id, prompt, chosen, rejected in zip(
                tokenised["row_id"], tokenised["prompt_ids"], tokenised["chosen_ids"], tokenised["rejected_ids"]
            )
        }
        counts = [found.get(row_id, (np.inf,) * 3) for row_id in rows["row_id"]]
        longest = np.maximum(longest, np.array(counts).T)
    return longest


def _percentile(values: np.ndarray, percentile: float) -> float:
    return float(np.percentile(values, percentile)) if len(values) else float("nan")


def _narrow(keep: np.ndarray, condition: np.ndarray) -> tuple[np.ndarray, int]:
    narrowed = keep & condition
    return narrowed, int(keep.sum() - narrowed.sum())
