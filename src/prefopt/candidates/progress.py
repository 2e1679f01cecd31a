"""How far a long run is: rows, tokens a second, time left."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import TextIO


class Progress:
    """Prints a line now and then about work that several processes share.

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
        """Forget what was reported within the shard before: it counts as finished now."""
        self.rows, self.tokens = 0.0, 0

    def advance(self, *, rows: float = 0, tokens: int = 0) -> None:
        """Add rows and tokens done within the present shard, and print where a line is due; threads may call this at once."""
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
        """Rows done, tokens a second since the start of this run, and the time left at this run's speed."""
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
    """Seconds as a person says them: `45 s`, `12 min`, `3 h 20 min`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
