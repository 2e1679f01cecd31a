"""Markdown pages and their pictures: tables, and matplotlib where it is installed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Return the lines of a Markdown table."""
    return [
        "".join(f"| {cell} " if cell != "" else "| " for cell in cells) + "|"
        for cells in (head, ["---"] * len(head), *rows)
    ]


def figure_class() -> Any:
    """Import matplotlib's `Figure`, which needs no display; return None without matplotlib (the extra `plots`)."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    return Figure
