"""Progress of long stages: a bar with rate and time left on a terminal or in a notebook, a line a minute in a log.

`library_bars` silences the bars that libraries draw meanwhile.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TextIO

from tqdm.auto import tqdm

LOG_SECONDS = 60.0


@contextmanager
def library_bars(*, shown: bool) -> Iterator[None]:
    """Silence the bars of `datasets`, transformers and the hub's client within, and restore what was before.

    Args:
        shown: True leaves everything as it is.
    """
    if shown:
        yield
        return
    import datasets  # `prefopt --help` must not wait for these
    import huggingface_hub.utils
    from transformers.utils import logging as weights

    hub: Any = huggingface_hub.utils  # documented there, though its type hints do not export them
    libraries = (
        (datasets.are_progress_bars_disabled(), datasets.disable_progress_bars, datasets.enable_progress_bars),
        (not weights.is_progress_bar_enabled(), weights.disable_progress_bar, weights.enable_progress_bar),
        # last: transformers switches the hub's bars with its own
        (hub.are_progress_bars_disabled(), hub.disable_progress_bars, hub.enable_progress_bars),
    )
    for _, silence, _ in libraries:
        silence()
    try:
        yield
    finally:
        for was_silent, silence, show in libraries:
            (silence if was_silent else show)()


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


def can_redraw() -> bool:
    """Return whether a bar can be drawn over its earlier state: on a terminal and in a notebook."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


def make_bar(total: int, description: str, *, unit: str, done: int = 0, shown: bool = True) -> tqdm:
    """Make a bar, or what writes its state as a line a minute where it cannot be redrawn.

    Args:
        total: number of things to do.
        description: what is done, such as "Scoring under llama-3".
        unit: one of the things.
        done: things that were done before.
        shown: False for a bar that is never drawn.
    """
    redrawn = can_redraw()
    return tqdm(
        total=total,
        initial=done,
        desc=description,
        unit=f" {unit}",
        disable=not shown,
        file=None if redrawn else _Lines(sys.stderr),
        mininterval=0.1 if redrawn else LOG_SECONDS,
        maxinterval=10.0 if redrawn else LOG_SECONDS,
        ascii=not redrawn,
        dynamic_ncols=redrawn,
    )


def print_above_bars(text: str) -> None:
    """Print lines on stdout: above a bar that is being drawn on the same terminal, not at its end."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


class Progress:
    """Context that shows how far a stage is.

    Args:
        total, description, unit: see `make_bar`.
        shown: False on all processes but one, and with `disable_tqdm`.
    """

    def __init__(self, total: int, description: str, *, unit: str, shown: bool = True) -> None:
        self._bar = make_bar(total, description, unit=unit, shown=shown)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def advance(self, count: int) -> None:
        """Count `count` more things as done."""
        self._bar.update(count)
