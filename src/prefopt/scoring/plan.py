"""Plan of an epoch: which pairs go into which micro-batch of which rank, as a function of (seed, epoch, step).

Every optimizer step holds the same number of groups (`groups_per_step`), except the last of an epoch, and every rank
runs exactly `micro_batches` micro-batches in it. Within a step, groups are dealt to micro-batches so that ranks and
micro-batches carry nearly the same number of tokens. A micro-batch that gets no group in the last step runs one group
at weight zero, so that each group counts exactly once and no rank waits for another. Nothing here needs communication:
every rank computes the whole plan and takes its own part.
"""

from __future__ import annotations

import heapq
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

SAMPLED_STEPS = 256
"""Optimizer steps whose micro-batches are planned to find the largest one."""


@dataclass(frozen=True)
class MicroBatch:
    """The groups of one forward pass of one rank.

    Attributes:
        rows: indices into the data set, row by row.
        is_filler: no group of this step was left for this micro-batch; its one group weighs zero.
        step_groups: groups of the whole optimizer step, over micro-batches and ranks.
        step_first_tokens: scored tokens of first completions over the whole step (the SFT term divides by it).
        step_ranked_pairs: ranked pairs of completions over the whole step (ranking losses divide by it).
    """

    rows: tuple[tuple[int, ...], ...]
    is_filler: bool
    step_groups: int
    step_first_tokens: int
    step_ranked_pairs: int

    @property
    def indices(self) -> list[int]:
        """Indices into the data set, in batch order."""
        return [index for row in self.rows for index in row]


@dataclass(frozen=True)
class GroupLengths:
    """Token counts of one group: what it costs packed and padded, and what it scores."""

    packed: int  # tokens in a packed row
    longest: int  # longest prompt + completion
    completions: int
    first_scored: int  # tokens of the first completion
    ranked_pairs: int = 1  # pairs of completions of which one is better


class BatchPlan(torch.utils.data.Sampler):
    """Batch sampler that yields one `[MicroBatch]` after another for one rank; see the module's docstring.

    Args:
        lengths: token counts of every group of the data set.
        groups_per_micro_batch: mean number of groups of one micro-batch (`per_device_train_batch_size`).
        micro_batches: micro-batches per optimizer step and rank (`gradient_accumulation_steps`).
        groups_per_step: groups of one optimizer step, where its micro-batches are counted in tokens and need not
            divide it evenly (`fewest_micro_batches`); instead of `groups_per_micro_batch`.
        world_size, rank: number of ranks, and which one this is.
        seed: seed of the shuffles; ignored without `shuffle`.
        max_tokens_per_row: packed rows hold at most this many tokens; None plans for the padded layout.
        shuffle: draw a new order each epoch.
        drop_last: leave out the last, smaller step of an epoch.

    Raises:
        ValueError: a group is longer than `max_tokens_per_row`, or there is no group.
    """

    def __init__(
        self,
        lengths: Sequence[GroupLengths],
        *,
        groups_per_micro_batch: int = 1,
        micro_batches: int = 1,
        groups_per_step: int | None = None,
        world_size: int = 1,
        rank: int = 0,
        seed: int = 0,
        max_tokens_per_row: int | None = None,
        shuffle: bool = True,
        drop_last: bool = False,
    ) -> None:
        if not lengths:
            raise ValueError("There are no rows to make batches of.")
        if max_tokens_per_row is not None and (longest := max(group.packed for group in lengths)) > max_tokens_per_row:
            raise ValueError(
                f"A pair has {longest} tokens, more than `max_tokens_per_row` = {max_tokens_per_row}; raise it to at "
                f"least {longest}, "
                "or lower `max_length`."
            )
        self.lengths = lengths
        self.micro_batches = micro_batches
        self.world_size = world_size
        self.rank = rank
        self.seed = seed
        self.max_tokens_per_row = max_tokens_per_row
        self.shuffle = shuffle
        self.groups_per_step = groups_per_step or groups_per_micro_batch * micro_batches * world_size
        full, rest = divmod(len(lengths), self.groups_per_step)
        self.num_steps = full + (rest > 0 and not (drop_last and full > 0))
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of `epoch`; the trainer calls it before every epoch, on resume too."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_steps * self.micro_batches

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        for step in range(self.num_steps):
            for micro_batch in self.step(self.epoch, step)[self.rank]:
                yield [micro_batch]

    def step(self, epoch: int, step: int) -> list[list[MicroBatch]]:
        """Return the micro-batches of one optimizer step, [rank][micro-batch]."""
        order = _permutation(len(self.lengths), self.seed, epoch) if self.shuffle else range(len(self.lengths))
        indices = list(order[step * self.groups_per_step : (step + 1) * self.groups_per_step])
        tokens = sum(self.lengths[index].first_scored for index in indices)
        ranked = sum(self.lengths[index].ranked_pairs for index in indices)
        bins = self._deal(indices)
        plan: list[list[MicroBatch]] = [[] for _ in range(self.world_size)]
        for number, members in enumerate(bins):
            rows = self._rows(members or [indices[0]])
            plan[number % self.world_size].append(MicroBatch(rows, not members, len(indices), tokens, ranked))
        return plan

    def tokens(self, micro_batch: MicroBatch) -> int:
        """Return the tokens that a forward pass of a micro-batch computes, padding included."""
        groups = [self.lengths[index] for index in micro_batch.indices]
        if self.max_tokens_per_row is None:
            return sum(group.completions for group in groups) * max(group.longest for group in groups)
        fills = [sum(self.lengths[index].packed for index in row) for row in micro_batch.rows]
        return len(fills) * max(fills)

    def load_ratio(self, *, steps: int = 16) -> float:
        """Return how many times the lightest rank's tokens the heaviest one computes in a step.

        Args:
            steps: of the first epoch; the median of that many is taken.
        """
        ratios = []
        for step in range(min(steps, self.num_steps)):
            loads = [sum(map(self.tokens, micro_batches)) for micro_batches in self.step(0, step)]
            ratios.append(max(loads) / max(min(loads), 1))
        return statistics.median(ratios)

    def heaviest(self, *, epochs: int = 1) -> int:
        """Return the most tokens of a micro-batch in up to `SAMPLED_STEPS` steps, evenly spread over the epochs."""
        steps = epochs * self.num_steps
        sampled = range(0, steps, max(1, steps // SAMPLED_STEPS))
        plans = (self.step(*divmod(number, self.num_steps)) for number in sampled)
        return max(self.tokens(micro_batch) for plan in plans for rank in plan for micro_batch in rank)

    def _deal(self, indices: list[int]) -> list[list[int]]:
        """Divide a step's groups among all micro-batches; neighbours in the list run at the same time on all ranks."""
        parts = self.micro_batches * self.world_size
        if self.max_tokens_per_row is None:
            # groups of like length share a padded micro-batch; sizes differ by at most one
            ordered = sorted(indices, key=lambda index: (-self.lengths[index].longest, index))
            small, extra = divmod(len(ordered), parts)
            bins, start = [], 0
            for part in range(parts):
                size = small + (part < extra)
                bins.append(ordered[start : start + size])
                start += size
            return bins
        # first the ranks get equal tokens, then each rank's micro-batches; heavy ones run at the same time
        sizes = {index: self.lengths[index].packed for index in indices}
        ranks = [balance(members, sizes, self.micro_batches) for members in balance(indices, sizes, self.world_size)]
        return [members for turn in zip(*ranks) for members in turn]

    def _rows(self, members: list[int]) -> tuple[tuple[int, ...], ...]:
        if self.max_tokens_per_row is None:
            return (tuple(members),)
        return pack_rows(members, [self.lengths[index].packed for index in members], self.max_tokens_per_row)


def fewest_micro_batches(plan: Callable[..., BatchPlan], tokens: int, *, epochs: int = 1) -> tuple[int, int]:
    """Find the fewest micro-batches a step of which none holds more than so many tokens.

    Args:
        plan: makes the plan of the run for a number of `micro_batches`.
        tokens: that a micro-batch may hold.
        epochs: that are trained.

    Returns:
        The number of micro-batches per step and rank, and the tokens of the largest one of the steps that were
        planned (`BatchPlan.heaviest`), which are more than `tokens` where a single group is larger.
    """
    first = plan(micro_batches=1)
    low, high = 1, -(-first.groups_per_step // first.world_size)  # at most a group each
    while low < high:
        middle = (low + high) // 2
        if plan(micro_batches=middle).heaviest(epochs=epochs) <= tokens:
            high = middle
        else:
            low = middle + 1
    return low, plan(micro_batches=low).heaviest(epochs=epochs)


def balance(members: Sequence[int], sizes: Mapping[int, int], parts: int) -> list[list[int]]:
    """Divide members into parts of nearly equal size: longest first, each to the part that is lightest so far.

    Args:
        members: what to divide.
        sizes: tokens of each member.
        parts: how many parts; some stay empty where there are fewer members.

    Returns:
        The parts, heaviest first.
    """
    divided: list[list[int]] = [[] for _ in range(parts)]
    heap = [(0, part) for part in range(parts)]
    for member in sorted(members, key=lambda member: (-sizes[member], member)):
        load, part = heapq.heappop(heap)
        divided[part].append(member)
        heapq.heappush(heap, (load + sizes[member], part))
    return sorted(divided, key=lambda part: -sum(sizes[member] for member in part))


def pack_rows(members: Sequence[int], sizes: Sequence[int], capacity: int) -> tuple[tuple[int, ...], ...]:
    """Pack members into as few rows as first-fit-decreasing finds, then level the rows.

    Args:
        members: what to pack.
        sizes: tokens of each member, at most `capacity`.
        capacity: tokens of a row.

    Returns:
        The rows; every member is in exactly one.
    """
    order = sorted(range(len(members)), key=lambda i: (-sizes[i], members[i]))
    rows: list[list[int]] = []
    fills: list[int] = []
    for i in order:
        place = next((row for row, fill in enumerate(fills) if fill + sizes[i] <= capacity), None)
        if place is None:
            rows.append([])
            fills.append(0)
            place = len(rows) - 1
        rows[place].append(i)
        fills[place] += sizes[i]
    # all rows of a forward are padded to the longest: levelling them costs nothing and shortens it
    levelled: list[list[int]] = [[] for _ in rows]
    level = [0] * len(rows)
    for i in order:
        place = level.index(min(level))
        levelled[place].append(i)
        level[place] += sizes[i]
    best = levelled if max(level) <= max(fills) else rows
    return tuple(tuple(members[i] for i in row) for row in best)


@lru_cache(maxsize=2)
def _permutation(size: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(size, generator=generator).tolist()


def row_capacity(lengths: Sequence[GroupLengths], *, tokens: float) -> int:
    """Return the capacity of a packed row that is to hold so many tokens, or the longest group."""
    longest = max(group.packed for group in lengths)
    return math.ceil(max(longest, tokens) / 1024) * 1024
