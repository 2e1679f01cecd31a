"""Sharded, resumable map over rows, shared by processes; shards made with other settings or inputs are rejected."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any, TextIO

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from prefopt import __version__
from prefopt.arguments import setting_changes
from prefopt.files import (
    content_hash,
    file_hash,
    iterate_jsonl,
    locked,
    read_json,
    write_json,
    write_jsonl,
    write_text,
)
from prefopt.waiting import announced_wait

Row = dict[str, Any]
FAILED = ".failed"  # there as soon as a shard has failed, in whichever process
# what is read of a manifest; `seconds` may be a whole number in JSON
MANIFEST_TYPES: dict[str, Any] = {"settings": dict, "counts": dict, "row_ids": list, "seconds": (int, float)}


class ShardFailed(ValueError):
    """A shard's work raised an error; the message names the shard, the error, and the log with the traceback."""


@dataclass
class Shard:
    """One slice of the work, as the work function sees it.

    Attributes:
        index: number of the shard, from 0.
        seed: seed of this shard, a function of the run's seed and the index alone.
        items: the rows of this shard, in input order.
        counts: what the work function counted (tokens, truncated rows, ...); summed over shards at the end.
    """

    index: int
    seed: int
    items: Sequence[Row]
    counts: Counter[str] = field(default_factory=Counter)
    progress: Progress | None = None

    def count(self, name: str, number: int = 1) -> None:
        """Add `number` to the counter `name`."""
        self.counts[name] += number

    def advance(self, *, rows: float = 0, tokens: int = 0) -> None:
        """Report that `rows` more rows (a part of a row counts as a fraction) and `tokens` more tokens are done."""
        if self.progress is not None:
            self.progress.advance(rows=rows, tokens=tokens)


WorkFunction = Callable[[Shard], Sequence[Row]]


def shard_seed(seed: int, index: int) -> int:
    """Return the seed of shard `index`: 31 bits, the same on every machine and for any number of processes."""
    return int(content_hash("shard", seed, index)[:12], 16) % 2**31


class ShardPlan:
    """The shards of one run: which exist already, which are pending, and where they are.

    Args:
        items: JSON-like rows, each with a string `prompt_id` (or another `row_id` column).
        tool: name of the command, part of the folder's name: `<output_dir>/<tool>_shards`.
        settings: everything that changes the result (JSON-like). A finished shard with other settings is rejected.
        output_dir: where the results go.
        shard_size: rows in a shard, at least 1; None for 16 to 256, by the number of rows.
        seed: the run's seed; each shard gets `shard_seed(seed, index)`.
        notes: what is worth recording but does not change the result (batch size, device).
        row_id: the column that names a row in the manifests.

    Raises:
        ValueError: no items, or a shard size below 1.
    """

    def __init__(
        self,
        items: Sequence[Row],
        *,
        tool: str,
        settings: Mapping[str, Any],
        output_dir: str | Path,
        shard_size: int | None = None,
        seed: int = 0,
        notes: Mapping[str, Any] | None = None,
        row_id: str = "prompt_id",
    ) -> None:
        if shard_size is None:
            shard_size = min(max(len(items) // 64, 16), 256)
        if shard_size < 1:
            raise ValueError(f"shard_size is {shard_size}; it must be at least 1.")
        if not items:
            raise ValueError(f"{tool}: there are no rows to work on.")
        self.items = items
        self.tool = tool
        self.shard_size = shard_size
        self.seed = seed
        self.notes = dict(notes or {})
        self.row_id = row_id
        self.settings = json.loads(json.dumps({**settings, "seed": seed, "shard_size": shard_size}))
        self.folder = Path(output_dir) / f"{tool}_shards"
        self.num_shards = -(-len(items) // shard_size)
        self._finished: dict[int, tuple[int, int]] = {}

    def rows_of(self, index: int) -> Sequence[Row]:
        """Return the input rows of shard `index`."""
        return self.items[index * self.shard_size : (index + 1) * self.shard_size]

    def data_path(self, index: int) -> Path:
        """Return the path of the output rows of shard `index`."""
        return self.folder / f"{index:05d}.jsonl"

    def manifest_path(self, index: int) -> Path:
        """Return the path of a shard's manifest; it is written last, so a shard without one is not finished."""
        return self.folder / f"{index:05d}.json"

    def log_path(self, index: int) -> Path:
        """Return the path of the traceback of shard `index`, if its work failed."""
        return self.folder / f"{index:05d}.log"

    def pending(self) -> list[int]:
        """Check what is in the folder, delete what a killed run left half-written, and list the shards to make.

        Raises:
            ValueError: a shard there belongs to another tool, other settings or other input; says how to fix it.
        """
        for leftover in [*self.folder.glob("*.log"), *self.folder.glob(".*.partial"), *self.folder.glob(FAILED)]:
            leftover.unlink()
        for path in sorted(self.folder.glob("[0-9]*.json")):
            if not path.stem.isdigit() or int(path.stem) >= self.num_shards:
                raise ValueError(
                    f"{path}: this run has {self.num_shards} shards and none of that name. " + self._remedy("it")
                )
        return [index for index in range(self.num_shards) if not self._is_finished(index)]

    def _is_finished(self, index: int) -> bool:
        path = self.manifest_path(index)
        try:
            manifest = read_json(path)
        except FileNotFoundError:
            return False
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
            path.unlink()  # cut off by a crash of the machine: the shard is made again
            return False
        if not isinstance(manifest, dict) or manifest.get("tool") != self.tool or "settings" not in manifest:
            raise ValueError(f"{path}: not a manifest of `prefopt {self.tool}`. " + self._remedy("the folder"))
        for name, kind in MANIFEST_TYPES.items():
            value = manifest.get(name)
            if not isinstance(value, kind) or (
                name == "counts" and not all(isinstance(n, int) for n in value.values())
            ):
                raise ValueError(
                    f"{path}: damaged, as its `{name}` is {str(value)[:80]!r}. Delete this file to make it again."
                )
        changes = setting_changes(manifest["settings"], self.settings)
        if changes:
            raise ValueError(
                f"{path}: this shard was made with other settings ({'; '.join(changes)}). Set them back; or "
                + self._remedy("the folder")
            )
        rows = self.rows_of(index)
        if manifest.get("input_hash") != content_hash(list(rows)):
            raise ValueError(
                f"{path}: this shard was made from other input rows ({self._first_difference(manifest, rows)}). "
                + self._remedy("the folder")
            )
        with suppress(FileNotFoundError):
            return file_hash(self.data_path(index)) == manifest.get("data_sha256")
        return False

    def _remedy(self, what: str) -> str:
        return f"Give another output_dir, or delete {what} ({self.folder}) to start again."

    def _first_difference(self, manifest: Row, rows: Sequence[Row]) -> str:
        before, now = manifest.get("row_ids", []), [row[self.row_id] for row in rows]
        for old, new in zip(before, now):
            if old != new:
                return f"row {old!r} there, {new!r} now"
        return f"{len(before)} rows there, {len(now)} now" if len(before) != len(now) else "same ids, other content"

    def work(self, indices: Sequence[int], work_fn: WorkFunction, progress: Progress | None = None) -> None:
        """Make the shards `indices` one after another; stop as soon as a shard fails, here or in another process.

        Raises:
            ShardFailed: `work_fn` raised; its traceback is in the shard's log.
        """
        for index in indices:
            if (self.folder / FAILED).exists():  # one file, as listing the folder for each shard takes ever longer
                return
            shard = Shard(index, shard_seed(self.seed, index), self.rows_of(index), progress=progress)
            if progress is not None:
                progress.start_shard()
            started = time.monotonic()
            try:
                rows = work_fn(shard)
                assert len(rows) == len(shard.items), f"{len(rows)} rows out of {len(shard.items)}"
                self._finish(shard, rows, time.monotonic() - started)
            except Exception as error:
                write_text(self.log_path(index), f"{self.tool}, shard {index}\n{traceback.format_exc()}")
                (self.folder / FAILED).touch()
                raise ShardFailed(self.failure(index, error)) from error

    def failure(self, index: int, error: BaseException | str) -> str:
        """Return the error message about a failed shard."""
        reason = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
        return (
            f"{self.tool}: shard {index} of {self.num_shards} failed ({reason.strip()}). Its log is "
            f"{self.log_path(index)}; finished shards are kept, and the same command continues after them."
        )

    def _finish(self, shard: Shard, rows: Sequence[Row], seconds: float) -> None:
        write_jsonl(self.data_path(shard.index), rows)
        manifest = {
            "tool": self.tool,
            "prefopt": __version__,
            "shard": shard.index,
            "num_shards": self.num_shards,
            "settings": self.settings,
            "shard_seed": shard.seed,
            "input_hash": content_hash(list(shard.items)),
            "row_ids": [item[self.row_id] for item in shard.items],
            "data_sha256": file_hash(self.data_path(shard.index)),
            "counts": dict(shard.counts),
            "seconds": round(seconds, 3),
            "notes": self.notes,
        }
        write_json(self.manifest_path(shard.index), manifest)

    def progress(self, *, world: int = 1) -> Progress:
        """Start the progress lines of this run, shared by `world` processes."""
        return Progress(self.tool, len(self.items), self._finished_totals, world=world)

    def _finished_totals(self) -> tuple[int, int]:
        """Count rows and tokens in finished shards; each manifest is read once."""
        for index in range(self.num_shards):
            if index not in self._finished:
                with suppress(FileNotFoundError):
                    manifest = read_json(self.manifest_path(index))
                    self._finished[index] = (len(self.rows_of(index)), manifest["counts"].get("tokens", 0))
        return sum(rows for rows, _ in self._finished.values()), sum(tokens for _, tokens in self._finished.values())

    def rows(self) -> Iterator[Row]:
        """Iterate over the output rows of all shards in input order."""
        for index in range(self.num_shards):
            yield from iterate_jsonl(self.data_path(index))

    def counts(self) -> Counter[str]:
        """Sum the counters of all finished shards, and `seconds`, the work time over all processes."""
        total: Counter[str] = Counter()
        for index in range(self.num_shards):
            manifest = read_json(self.manifest_path(index))
            total.update(manifest["counts"])
            total["seconds"] += manifest["seconds"]
        return total

    def report(self) -> Row:
        """Return what a command's report says about the run: counters, seconds of work, settings and notes."""
        counts = self.counts()
        seconds = counts.pop("seconds")
        return {
            "counts": dict(counts),
            "seconds of work": round(seconds, 1),
            "settings": self.settings,
            "notes": self.notes,
        }


@dataclass
class Processes:
    """This process among its peers.

    Attributes:
        rank: number of this process, from 0.
        world: number of processes.
        device: the device of this process.
    """

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    group: Any = None

    @property
    def is_main(self) -> bool:
        """True in the process that reports and merges."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Collect the (picklable) `value` of every process, in rank order, in every process; waits for all."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        with announced_wait("the other processes"):  # which may have an hour of work more
            torch.distributed.all_gather_object(values, value, group=self.group)
        return values


@lru_cache(maxsize=1)
def current_processes() -> Processes:
    """Return the processes that accelerate launched; this one alone where nothing launched it.

    Uses a gloo group with a 30-day timeout, since processes may finish hours apart; accelerate's own collectives run
    on the default group, where a process that waits for minutes fails.
    """
    # without `cpu`, accelerate takes each of several processes on a machine without accelerators to be alone
    use_cpu = bool(parse_flag_from_env("ACCELERATE_USE_CPU")) or not torch.accelerator.is_available()
    with announced_wait("the other processes to start"):
        state = PartialState(cpu=use_cpu)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    assert state.num_processes == launched, f"accelerate sees {state.num_processes} of {launched} processes"
    group = None
    if state.num_processes > 1:
        group = torch.distributed.new_group(backend="gloo", timeout=timedelta(days=30))
    return Processes(state.process_index, state.num_processes, state.device, group)


def run_shards(
    items: Sequence[Row],
    work_fn: WorkFunction,
    *,
    tool: str,
    settings: Mapping[str, Any],
    output_dir: str | Path,
    shard_size: int | None = None,
    seed: int = 0,
    notes: Mapping[str, Any] | None = None,
    row_id: str = "prompt_id",
    processes: Processes | None = None,
) -> ShardPlan:
    """Do `work_fn` on every shard of `items`, sharing the shards among the processes that accelerate launched.

    Every process calls this with the same arguments. `work_fn(shard)` returns one JSON-like row per item, in order;
    load models lazily in it, since it is not called where nothing is left to do. All processes return together.

    Args:
        items: as for `ShardPlan`, like all others but these two:
        work_fn: takes a `Shard`, returns its output rows.
        tool: name of the command.
        settings: everything that changes the result.
        output_dir: where the results go.
        shard_size: rows in a shard.
        seed: the run's seed.
        notes: recorded with each shard.
        row_id: the column that names a row.
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
                stack.enter_context(locked(plan.folder))
                pending = plan.pending()
            except ValueError as rejection:
                error = str(rejection)
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


class Progress:
    """Progress lines about work that several processes share.

    Args:
        name: the command's name.
        total: rows of the whole run.
        finished: returns rows and tokens in finished shards, of all processes.
        world: number of processes; each is taken to be as far within its shard as this one.
        every: seconds between two lines.
        stream: where the lines go (default: standard error).
        clock: a clock in seconds.
    """

    def __init__(
        self,
        name: str,
        total: int,
        finished: Callable[[], tuple[int, int]],
        *,
        world: int = 1,
        every: float = 10.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self.total = total
        self.finished = finished
        self.world = world
        self.every = every
        self.stream = stream or sys.stderr
        self.clock = clock
        self.first = finished()
        self.started = self.last = clock()
        self.rows, self.tokens = 0.0, 0
        self.lock = threading.Lock()

    def start_shard(self) -> None:
        """Reset what was reported within the previous shard: it counts as finished now."""
        self.rows, self.tokens = 0.0, 0

    def advance(self, *, rows: float = 0, tokens: int = 0) -> None:
        """Add rows and tokens done within the present shard, and print a line when due. Thread-safe."""
        with self.lock:
            self.rows += rows
            self.tokens += tokens
            if self.clock() - self.last >= self.every:
                self.show()

    def show(self) -> None:
        """Print a line."""
        self.last = self.clock()
        print(self.line(), file=self.stream, flush=True)

    def line(self) -> str:
        """Format rows done, tokens a second since the start of this run, and the time left at this run's speed."""
        rows, tokens = self.finished()
        rows_now = min(self.total, rows + self.rows * self.world)
        seconds = max(self.clock() - self.started, 1e-6)
        new_rows = rows_now - self.first[0]
        new_tokens = tokens + self.tokens * self.world - self.first[1]
        parts = [f"{self.name}: {rows_now:.0f} of {self.total} rows ({100 * rows_now / self.total:.0f}%)"]
        if new_tokens:
            parts.append(f"{new_tokens / seconds:,.0f} tokens/s")
        if new_rows > 0:
            parts.append(f"{duration((self.total - rows_now) * seconds / new_rows)} left")
        return ", ".join(parts)


def duration(seconds: float) -> str:
    """Format seconds as `45 s`, `12 min` or `3 h 20 min`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
