"""Progress of long stages: a bar with rate and time left on a terminal or in a notebook, a line a minute in a log."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TextIO

from tqdm.auto import tqdm

LOG_SECONDS = 60.0


class _Lines:
    """A stream that writes each state of a bar as a line of its own, where nothing can be overwritten."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> None:
        """Write the state without the characters that go back to the start of a line."""
        if state := text.strip("\r\n\x1b[A "):
            self.stream.write(f"{state}\n")

    def flush(self) -> None:
        """Flush the stream."""
        self.stream.flush()


class Progress:
    """Context that shows how far a stage is.

    Args:
        total: number of things to do.
        description: what is done, such as "Scoring under llama-3".
        unit: one of the things.
        shown: False on all processes but one, and with `disable_tqdm`.
    """

    def __init__(self, total: int, description: str, *, unit: str, shown: bool = True) -> None:
        terminal = sys.stderr.isatty() or "ipykernel" in sys.modules
        self._bar = tqdm(
            total=total,
            desc=description,
            unit=f" {unit}",
            disable=not shown,
            file=None if terminal else _Lines(sys.stderr),
            mininterval=0.1 if terminal else LOG_SECONDS,
            maxinterval=10.0 if terminal else LOG_SECONDS,
            ascii=not terminal,
            dynamic_ncols=terminal,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def advance(self, count: int) -> None:
        """Count `count` more things as done."""
        self._bar.update(count)
