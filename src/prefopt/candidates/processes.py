"""The processes that accelerate launched, and how they tell each other what they know."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch


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
        """Whether this is the process that reports and merges."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """The (picklable) `value` of every process, in rank order, in every process; waits for all."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(values, value, group=self.group)
        return values


_current: Processes | None = None


def current_processes() -> Processes:
    """The processes that accelerate launched; alone where nothing launched this one.

    They talk over CPU sockets and wait for each other for weeks if need be: one may have an hour of work more.
    """
    global _current
    if _current is None:
        from accelerate import PartialState
        from accelerate.utils import parse_flag_from_env

        # without `cpu`, accelerate takes each of several processes on a machine without accelerators to be alone
        use_cpu = bool(parse_flag_from_env("ACCELERATE_USE_CPU")) or not torch.accelerator.is_available()
        state = PartialState(cpu=use_cpu)
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        assert state.num_processes == launched, f"accelerate sees {state.num_processes} of {launched} processes"
        group = None
        if state.num_processes > 1:
            group = torch.distributed.new_group(backend="gloo", timeout=timedelta(days=30))
        _current = Processes(state.process_index, state.num_processes, state.device, group)
    return _current
