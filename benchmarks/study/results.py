"""Finished units of work, one JSON line each, appended at once: a study that is stopped goes on where it was."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from prefopt.files import content_hash

Row = dict[str, Any]


class Results:
    """A file of units. A unit is known by all of its settings: changed settings make another unit.

    Args:
        path: the file; made with the first unit.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows: dict[str, Row] = {}
        self._torn = False
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            for number, line in enumerate(text.splitlines(), start=1):
                self._read(line, number, last=number == len(text.splitlines()))

    def _read(self, line: str, number: int, *, last: bool) -> None:
        try:
            row = json.loads(line)
        except ValueError:
            if not last:
                raise ValueError(
                    f"{self.path}, line {number}, is not JSON; remove the line to run it again."
                ) from None
            self._torn = True  # the study was killed while it wrote
            return
        self._rows[content_hash(row["settings"])] = row

    def __len__(self) -> int:
        return len(self._rows)

    def find(self, settings: Row) -> Row | None:
        """Return the finished unit with exactly these settings, or None."""
        return self._rows.get(content_hash(settings))

    def add(self, settings: Row, outcome: Row, seconds: float) -> Row:
        """Append a finished unit and return it."""
        row = {"settings": settings, "outcome": outcome, "seconds": round(seconds, 2)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self._torn:
            whole = [json.dumps(each) for each in self._rows.values()]
            self.path.write_text("".join(f"{line}\n" for line in whole), encoding="utf-8")
            self._torn = False
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._rows[content_hash(settings)] = row
        return row
