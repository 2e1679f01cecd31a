"""Metrics as sums on the device, reduced over ranks once per optimizer step, and the watch for non-finite losses."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import torch
import torch.distributed as dist
from accelerate.utils import gather_object


class MetricSums:
    """Sums, minima and maxima of one optimizer step (or one evaluation), kept on the device until they are reduced.

    Every rank must add the same names, as it does by running the same code.
    """

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._weights: dict[str, torch.Tensor] = {}
        self._extremes: dict[str, torch.Tensor] = {}  # maxima; minima are stored negated under "-name"

    def add_mean(self, name: str, values: torch.Tensor, weights: torch.Tensor) -> None:
        """Add to the mean of `values` (any shape), each counting `weights` (same shape; 0 leaves it out)."""
        weights = weights.float()
        # `where`, not a product: a value that is left out (a filler's, say) may be NaN, and NaN * 0 is NaN
        total = torch.where(weights > 0, values.detach().float() * weights, 0.0).sum()
        self._sums[name] = self._sums.get(name, 0.0) + total
        self._weights[name] = self._weights.get(name, 0.0) + weights.sum()

    def add_total(self, name: str, values: torch.Tensor) -> None:
        """Add to the total of `values` (any shape) over the step."""
        self._sums[name] = self._sums.get(name, 0.0) + values.detach().float().sum()

    def add_min(self, name: str, values: torch.Tensor, mask: torch.Tensor) -> None:
        """Keep the smallest of `values` where `mask`."""
        self._extreme(f"-{name}", -values, mask)

    def add_max(self, name: str, values: torch.Tensor, mask: torch.Tensor) -> None:
        """Keep the largest of `values` where `mask`."""
        self._extreme(name, values, mask)

    def _extreme(self, name: str, values: torch.Tensor, mask: torch.Tensor) -> None:
        largest = torch.where(mask, values.detach().float(), float("-inf")).max()
        self._extremes[name] = torch.maximum(self._extremes[name], largest) if name in self._extremes else largest

    def reduce(self) -> dict[str, torch.Tensor]:
        """All-reduce the metrics and return them as 0-d tensors.

        Means of nothing come back as NaN and extremes of nothing as infinite; both are dropped when logged.
        """
        values: dict[str, torch.Tensor] = {}
        if names := sorted(self._sums):
            means = [name for name in names if name in self._weights]
            packed = torch.stack([self._sums[name] for name in names] + [self._weights[name] for name in means])
            if dist.is_initialized():
                dist.all_reduce(packed)
            values = dict(zip(names, packed[: len(names)].unbind()))
            for name, weight in zip(means, packed[len(names) :].unbind()):
                values[name] = values[name] / weight
        if extremes := sorted(self._extremes):
            packed = torch.stack([self._extremes[name] for name in extremes])
            if dist.is_initialized():
                dist.all_reduce(packed, op=dist.ReduceOp.MAX)
            for name, value in zip(extremes, packed.unbind()):
                values[name.removeprefix("-")] = -value if name.startswith("-") else value
        return values


class MetricLog:
    """Reduced metrics of the optimizer steps since the last log, still on the device."""

    def __init__(self) -> None:
        self._steps: dict[str, list[torch.Tensor]] = defaultdict(list)

    def append(self, values: dict[str, torch.Tensor]) -> None:
        """Add one step's reduced metrics."""
        for name, value in values.items():
            self._steps[name].append(value)

    def total(self, name: str) -> float:
        """Return the sum of a metric over the steps since the last log."""
        return sum(value.item() for value in self._steps.get(name, []))

    def drain(
        self, *, minima: Sequence[str] = (), maxima: Sequence[str] = (), totals: Sequence[str] = ()
    ) -> dict[str, float]:
        """Fold each metric over the steps since the last call (a mean, unless named otherwise), in one transfer."""
        folded = {}
        for name, values in self._steps.items():
            steps = torch.stack(values)
            # a step without a kind of row has no value (NaN or infinite); the host cannot choose the others without
            # waiting for the device once for each metric, so they are replaced by what changes nothing
            there = torch.isfinite(steps)
            if name in minima:
                folded[name] = torch.where(there, steps, float("inf")).min()
            elif name in maxima:
                folded[name] = torch.where(there, steps, float("-inf")).max()
            else:
                total = torch.where(there, steps, 0.0).sum()
                folded[name] = total if name in totals else total / there.sum()
        self._steps.clear()
        if not folded:
            return {}
        folds = torch.stack([*folded.values()]).tolist()
        return {name: value for name, value in zip(folded, folds) if math.isfinite(value)}


class FiniteWatch:
    """Notes whose loss is not finite in an optimizer step (or an evaluation); raises before the weights change.

    Nothing here makes the device idle: flags are computed and reduced on it, and the reduced one is copied to the host
    while the backward pass runs, so that the host need not wait for that pass to read it.
    """

    def __init__(self) -> None:
        self._rows: list[tuple[list[str], torch.Tensor]] = []
        self._totals: list[tuple[list[str], torch.Tensor]] = []
        self._any_rank: torch.Tensor | None = None
        self._copied: torch.cuda.Event | None = None

    def see(self, row_ids: list[str], losses: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Note the losses (B,) of the rows where `mask`; return a 0-d tensor, 1 where one of them is not finite."""
        bad = ~torch.isfinite(losses.detach()) & mask
        self._rows.append((row_ids, bad))
        return bad.any().float()

    def see_total(self, row_ids: list[str], loss: torch.Tensor) -> torch.Tensor:
        """Note the () loss of a micro-batch, terms that belong to no row included; return 1 where it is not finite."""
        bad = ~torch.isfinite(loss.detach())
        self._totals.append((row_ids, bad.expand(len(row_ids))))
        return bad.float()

    def end_step(self, any_rank: torch.Tensor) -> None:
        """Start to copy the maximum over all ranks of what was returned in a step, a 0-d tensor, to the host."""
        self._any_rank = any_rank.to("cpu", non_blocking=True)
        if any_rank.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()

    def check(self, *, step: int) -> None:
        """Raise on every rank alike where a loss of the step was not finite, naming the rows.

        Raises:
            FloatingPointError: a loss was not finite.
        """
        if self._any_rank is None:
            return
        if self._copied is not None:
            self._copied.synchronize()
        if self._any_rank.item() > 0:
            raise FloatingPointError(
                f"The loss is not finite in step {step}, in {self.whose()}. The weights are those before this step. "
                "Check these rows, lower `learning_rate`, or use bf16 instead of fp16."
            )

    def whose(self) -> str:
        """Name the rows of all ranks with a loss that is not finite; all ranks call it."""
        for seen, what in ((self._rows, "row(s)"), (self._totals, "a term of no row, in micro-batches of row(s)")):
            bad = [row for ids, flags in seen for row, is_bad in zip(ids, flags.tolist()) if is_bad]
            if rows := sorted(set(gather_object(bad))):
                return f"{what} {', '.join(rows[:8])}{' and others' if len(rows) > 8 else ''} (row_id)"
        return "no row that is known"
