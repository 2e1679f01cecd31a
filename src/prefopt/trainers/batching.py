"""From settings and lengths to batches: which layout serves, how much a row holds, and the loader that follows the plan."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch.utils.data import DataLoader
from transformers import PretrainedConfig

from prefopt.scoring.attention import why_not_packed
from prefopt.scoring.layouts import Layout, PackedLayout, PaddedLayout
from prefopt.scoring.plan import GroupLengths

CPU_ROW_TOKENS = 1024
"""Capacity of a packed row on a CPU where its mask is dense: it costs the square of the row."""


def choose_layout(
    wanted: str,
    config: PretrainedConfig,
    *,
    pad_token_id: int,
    pad_to_multiple_of: int,
    share_prompt: bool,
    longest_sequence: int,
    against_packing: str | None,
) -> tuple[Layout, str | None]:
    """The layout of a run, and why it is padded where packing would have been tried.

    Args:
        wanted: "auto", "packed" or "padded".
        config: the model's config, with its attention implementation.
        pad_token_id, pad_to_multiple_of: of the padded layout.
        share_prompt: of the packed layout.
        longest_sequence: longest prompt + completion of the data, in tokens.
        against_packing: a reason that the caller knows.

    Raises:
        ValueError: "packed" was demanded and cannot be exact.
    """
    padded = PaddedLayout(pad_token_id, pad_to_multiple_of=pad_to_multiple_of)
    if wanted == "padded":
        return padded, None
    reason = against_packing or why_not_packed(
        config, implementation=config._attn_implementation, longest_sequence=longest_sequence
    )
    if reason is None:
        return PackedLayout(pad_token_id, share_prompt=share_prompt), None
    if wanted == "packed":
        raise ValueError(
            f"`batch_layout: packed` cannot be exact for this model: {reason}. Use `batch_layout: padded`."
        )
    return padded, reason


def row_capacity(lengths: Sequence[GroupLengths], *, groups_per_row: int, dense: bool) -> int:
    """Tokens of a packed row where the recipe sets none.

    Args:
        lengths: of all groups.
        groups_per_row: groups that one micro-batch holds on average.
        dense: the mask is, so rows are short; otherwise one row a micro-batch, in which attention skips what other pairs own.
    """
    longest = max(group.packed for group in lengths)
    if dense:
        return max(longest, CPU_ROW_TOKENS)
    mean = sum(group.packed for group in lengths) / len(lengths)
    return math.ceil(max(longest, 1.5 * mean * groups_per_row + longest / 2) / 1024) * 1024


class PlannedLoader(DataLoader):
    """A data loader that passes its epoch on to its plan."""

    def set_epoch(self, epoch: int) -> None:
        """Have the plan draw the order of `epoch`."""
        self.batch_sampler.set_epoch(epoch)
