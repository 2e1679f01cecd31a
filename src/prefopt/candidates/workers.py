"""Run one vLLM engine per group of GPUs in child processes; a failing child stops the others."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from prefopt.candidates.shards import ShardFailed, ShardPlan
from prefopt.files import locked

VISIBLE = "CUDA_VISIBLE_DEVICES"


def work_in_children(
    plan: ShardPlan, target: Callable[[Any, list[int]], None], argument: Any, *, workers: int, devices_each: int
) -> None:
    """Do the plan's pending shards in child processes.

    Args:
        plan: the shards.
        target: called as `target(argument, shard indices)` in each child; at the top level of its module.
        argument: handed over (picklable).
        workers: number of children.
        devices_each: accelerators of one child.

    Raises:
        ValueError: too few accelerators; or what `ShardPlan.pending` raises.
        ShardFailed: a child failed; the others are stopped.
    """
    devices = _devices(workers * devices_each)
    with locked(plan.folder):
        pending = plan.pending()
        progress = plan.progress()
        children: list[tuple[BaseProcess, Path]] = []
        try:
            for number in range(min(workers, len(pending))):
                share = devices[number * devices_each : (number + 1) * devices_each]
                log = plan.folder / f"worker_{number}.out"
                with _environment(VISIBLE, ",".join(share) if share else None):
                    child: BaseProcess = multiprocessing.get_context("spawn").Process(
                        target=_child, args=(target, argument, pending[number::workers], log, os.getpid())
                    )
                    child.start()
                children.append((child, log))
            while any(child.is_alive() for child, _ in children):
                time.sleep(0.5)
                progress.advance()
                _check(plan, children)
            _check(plan, children)
        finally:
            for child, _ in children:
                end_group(child.pid)
                child.kill()  # where it had no time yet to make a group of its own
                child.join()
    if pending:
        progress.show()


def _check(plan: ShardPlan, children: Sequence[tuple[BaseProcess, Path]]) -> None:
    for child, output in children:
        if child.exitcode:
            log = next(iter(sorted(plan.folder.glob("*.log"))), None)
            if log is not None:
                reason = log.read_text(encoding="utf-8").strip().splitlines()[-1]
                raise ShardFailed(plan.failure(int(log.stem), reason))
            raise ShardFailed(f"{plan.tool}: a worker ended with status {child.exitcode}; its output is {output}.")


def _devices(needed: int) -> list[str]:
    """Return the names of the accelerators to hand out; none on a machine without any."""
    visible = os.environ.get(VISIBLE)
    if visible is not None and visible.strip():
        names = [name.strip() for name in visible.split(",")]
    else:
        names = [str(number) for number in range(torch.cuda.device_count())]
    if names and len(names) < needed:
        raise ValueError(
            f"data_parallel_size x tensor_parallel_size asks for {needed} accelerators, but there are {len(names)}."
        )
    return names


@contextmanager
def _environment(name: str, value: str | None) -> Iterator[None]:
    before = os.environ.get(name)
    if value is not None:
        os.environ[name] = value
    try:
        yield
    finally:
        if value is not None:
            os.environ.pop(name) if before is None else os.environ.update({name: before})


def end_group(group: int | None) -> None:
    """Kill a child with all that it started: an engine starts further processes, which would outlive it."""
    assert group is not None
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def _child(
    target: Callable[[Any, list[int]], None], argument: Any, indices: list[int], log: Path, parent: int
) -> None:
    os.setpgid(0, 0)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    status = 0
    try:
        target(argument, indices)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # an ordinary exit waits for the engine's processes, which wait for this one; the parent ends them
    os._exit(status)


def _end_with(parent: int) -> None:
    """End this child's process group when the command that started it is gone, so that it writes no more shards."""
    while os.getppid() == parent:
        time.sleep(1)
    end_group(os.getpgid(0))
