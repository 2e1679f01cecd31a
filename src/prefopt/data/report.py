"""What became of the rows: counts of kept, cut and dropped rows, lengths, and one decoded sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase


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
            f"{self.name}: {self.rows_in} rows read, {self.rows_kept} kept, {self.rows_dropped} dropped, {self.rows_cut} cut"
        ]
        for reason, count in sorted(self.dropped.items(), key=lambda item: (-item[1], item[0])):
            row, detail = self.examples[reason]
            lines.append(f"  dropped  {count:>8}  {reason} (first: row {row}, {detail})")
        for part, count in self.cut.items():
            if count:
                lines.append(f"  cut      {count:>8}  {part}")
        if self.not_prefix:
            lines.append(
                f"  note     {self.not_prefix:>8}  prompts are not a token prefix of prompt + completion; split where they part"
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
