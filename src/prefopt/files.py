"""Files that are either whole or absent, locks of folders, and hashes of what goes into files."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path` that replaces it when the block ends well, and is removed when it does not.

    The file is flushed to disk before the rename, so a reader sees the old content or the new, never a part.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".partial")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes files that only their owner may read
        os.replace(temporary, target)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` (UTF-8) to `path` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` to `path` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read the JSON value in `path`."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def read_object(path: str | os.PathLike[str], *, remedy: str) -> dict[str, Any]:
    """Read the JSON object in a file that prefopt wrote.

    Raises:
        ValueError: the file is damaged; the message names it and ends with the remedy.
    """
    try:
        value = read_json(path)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): {remedy}.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged (it holds no JSON object): {remedy}.")
    return value


def write_jsonl(path: str | os.PathLike[str], rows: Iterable[dict[str, Any]]) -> None:
    """Write `rows` to `path`, one JSON object a line, atomically; gzip where the name ends in .gz."""
    with atomic_path(path) as temporary, _opener(path)(temporary, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read one JSON object a line from `path`; gzip where the name ends in .gz.

    Raises:
        ValueError: a line is not a JSON object; the message names the file and the line.
    """
    rows = []
    with _opener(path)(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error}).") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: expected a JSON object, found {type(row).__name__}.")
            rows.append(row)
    return rows


def _opener(path: str | os.PathLike[str]) -> Callable[..., IO[str]]:
    return gzip.open if str(path).endswith(".gz") else open  # type: ignore[return-value]


def content_hash(*values: Any) -> str:
    """Compute the SHA-256 (hex, 64 digits) of JSON values; equal values give equal hashes on every machine."""
    text = json.dumps(values, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def file_hash(path: str | os.PathLike[str]) -> str:
    """Compute the SHA-256 (hex, 64 digits) of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def locked(folder: str | os.PathLike[str], *, name: str = ".lock") -> Iterator[None]:
    """Hold the lock of a folder, made if absent, so that no second command writes there.

    The operating system releases it when its holder ends, killed or not; the lock file itself stays.

    Raises:
        ValueError: another process holds it.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    lock = FileLock(Path(folder) / name)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise ValueError(f"{folder}: another command is at work there. Wait for it, or give another folder.") from None
    try:
        yield
    finally:
        lock.release()
