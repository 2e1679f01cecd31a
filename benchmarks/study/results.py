"""Finished units of work, one JSON line each, appended at once: a study that is stopped goes on where it was."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from filelock import FileLock

from prefopt.files import content_hash

Row = dict[str, Any]


class Results:
    """A file of units. A unit is known by all of its settings: changed settings make another unit.

    Several processes may add to one file; each sees what the others have added when it reads again.

    Args:
        path: the file; made with the first unit.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows: dict[str, Row] = {}
        self.read()

    def read(self) -> None:
        """Read the file; a last line that a kill has cut off is left out.

        Raises:
            ValueError: a line is no JSON.
        """
        if not self.path.is_file() or not self.path.stat().st_size:
            return
        whole, _, _ = self.path.read_text(encoding="utf-8").rpartition("\n")
        for number, line in enumerate(whole.split("\n"), start=1):
            try:
                row = json.loads(line)
            except ValueError:
                raise ValueError(
                    f"{self.path}, line {number}, is not JSON; remove the line to run it again."
                ) from None
            self._rows[content_hash(row["settings"])] = row

    def __len__(self) -> int:
        return len(self._rows)

    def find(self, settings: Row) -> Row | None:
        """Return the finished unit with exactly these settings, or None."""
        return self._rows.get(content_hash(settings))

    def add(self, settings: Row, outcome: Row, seconds: float, processor_seconds: float) -> Row:
        """Append a finished unit and return it."""
        row = {
            "settings": settings,
            "outcome": outcome,
            "seconds": round(seconds, 2),
            "processor_seconds": round(processor_seconds, 2),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.path}.lock"), open(self.path, "ab+") as file:
            file.seek(0)
            text = file.read()
            file.truncate(text.rfind(b"\n") + 1)  # what a killed process has half written
            file.write((json.dumps(row) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
        self._rows[content_hash(settings)] = row
        return row
