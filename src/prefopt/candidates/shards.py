"""Long work over rows, cut into shards: a killed run continues, and work of another run is never taken for one's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from prefopt.candidates.processes import Processes, current_processes
from prefopt.candidates.shard_plan import Row, Shard, ShardFailed, ShardPlan, WorkFunction, shard_seed

__all__ = ["Row", "Shard", "ShardFailed", "ShardPlan", "WorkFunction", "run_shards", "shard_seed"]


def run_shards(
    items: Sequence[Row],
    work_fn: WorkFunction,
    *,
    tool: str,
    settings: Mapping[str, Any],
    output_dir: str | Path,
    shard_size: int,
    seed: int = 0,
    notes: Mapping[str, Any] | None = None,
    row_id: str = "prompt_id",
    processes: Processes | None = None,
) -> ShardPlan:
    """Do `work_fn` on every shard of `items`, sharing the shards among the processes that accelerate launched.

    Every process calls this with the same arguments. `work_fn(shard)` returns one JSON-like row per item, in order;
    load models lazily in it, since it is not called where nothing is left to do. All processes return together.

    Args:
        items, tool, settings, output_dir, shard_size, seed, notes, row_id: see `ShardPlan`.
        work_fn: takes a `Shard`, returns its output rows.
        processes: the processes at work (default: those that accelerate launched).

    Returns:
        The plan, complete: `.rows()` gives the output rows in input order, `.counts()` the summed counters.

    Raises:
        ValueError: see `ShardPlan.pending`; in every process.
        ShardFailed: a shard failed; in every process.
    """
    plan = ShardPlan(
        items,
        tool=tool,
        settings=settings,
        output_dir=output_dir,
        shard_size=shard_size,
        seed=seed,
        notes=notes,
        row_id=row_id,
    )
    team = processes or current_processes()
    with ExitStack() as stack:
        pending, error = [], ""
        if team.is_main:
            try:
                stack.enter_context(plan.locked())
                pending = plan.pending()
            except ValueError as refusal:
                error = str(refusal)
        pending, error = team.gather((pending, error))[0]
        if error:
            raise ValueError(error)
        progress = plan.progress(world=team.world) if team.is_main else None
        failure = ""
        try:
            plan.work(pending[team.rank :: team.world], work_fn, progress)
        except ShardFailed as failed:
            failure = str(failed)
        failures = [text for text in team.gather(failure) if text]
        if failures:
            raise ShardFailed(failures[0])
        if progress is not None and pending:
            progress.start_shard()
            progress.show()
    return plan
