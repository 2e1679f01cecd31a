"""Files that are either whole or absent, YAML read strictly, locks of folders, and hashes."""

from __future__ import annotations

import errno
import gzip
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import yaml
from filelock import FileLock, Timeout

YAML_DEPTH = 50  # of lists and mappings within each other, aliases included
YAML_VALUES = 100_000  # once every alias is written out


# a disk or a quota that is full, a limit on a file's size, a read-only or failing disk, a folder without permission
_STORAGE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM)
# the same in the words of torch and safetensors, which raise other errors
_STORAGE_WORDS = re.compile(
    r"os error (28|122|27|30|5|13|1)\)|file write failed|iostream error|enforce fail.*(write|unexpected pos)"
)


def storage_fault(error: BaseException, folder: str | os.PathLike[str], needed: float = 0) -> str | None:
    """Describe in one sentence why `folder` could not be written, if that is what `error` is about; else None.

    Args:
        error: what was raised while something was written.
        folder: where.
        needed: bytes that were to be written, if known.
    """
    lost = not Path(folder).exists()
    known = isinstance(error, OSError) and error.errno in _STORAGE_ERRORS
    if not (known or _STORAGE_WORDS.search(str(error)) or (lost and isinstance(error, (OSError, RuntimeError)))):
        return None
    if lost and not known:
        return f"{folder} was removed while it was written to."
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
    where = error.filename if isinstance(error, OSError) and error.filename else folder
    room = f"; about {needed / 2**30:.2f} GiB were to be written" if needed else ""
    disk = next(path for path in (Path(folder), *Path(folder).absolute().parents) if path.exists())
    return f"{where} cannot be written: {reason} ({shutil.disk_usage(disk).free / 2**30:.2f} GiB are free{room})."


def user_path(path: str | os.PathLike[str]) -> Path:
    """Return a path with `~` written out; unlike `Path.expanduser`, one of an unknown user stays as it is."""
    return Path(os.path.expanduser(path))


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
    except OSError as error:
        if error.errno in _STORAGE_ERRORS and error.filename in (None, name):  # which names nothing that a user knows
            raise OSError(error.errno, error.strerror, str(target)) from error
        raise
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
    return list(iterate_jsonl(path))


def iterate_jsonl(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """Read one JSON object a line from `path`, each when it is asked for; see `read_jsonl`."""
    number = 0
    try:
        with _opener(path)(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"{path}, line {number}: expected a JSON object, found {type(row).__name__}.")
                yield row
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {number}: not JSON ({error}).") from error
    except RecursionError:
        raise ValueError(f"{path}, line {number}: JSON of too many levels.") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, after line {number}: not text in UTF-8 ({error.reason}).") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}, after line {number}: the compressed file is damaged ({error}).") from error


def _opener(path: str | os.PathLike[str]) -> Callable[..., IO[str]]:
    return gzip.open if str(path).endswith(".gz") else open  # type: ignore[return-value]


class _YamlLoader(yaml.SafeLoader):
    """SafeLoader without implicit dates and `=`, which are text."""

    yaml_implicit_resolvers = {  # noqa: RUF012  # yaml looks for it here
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":timestamp", ":value"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def read_yaml(path: str | os.PathLike[str]) -> tuple[Any, dict[str, int]]:
    """Read a YAML file as `parse_yaml` does.

    Raises:
        ValueError: it is not UTF-8, or not YAML; the message names the file and the line.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a text file in UTF-8.") from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, name: str) -> tuple[Any, dict[str, int]]:
    """Parse one YAML document strictly: plain values only, each key once, and aliases only as far as they end.

    Args:
        text: the document.
        name: what messages call it: a path, for instance.

    Returns:
        Its value, and the line of each key if that is a mapping.

    Raises:
        ValueError: one line that says where and why.
    """
    try:
        loader = _YamlLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None, {}
        _check_yaml(node, name, loader, {}, ())
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        lines = {key.value: key.start_mark.line + 1 for key, _ in pairs}
        return loader.construct_document(node), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        reason = " ".join((error.problem or error.context or "no reason known").split())
        raise ValueError(f"{name} is not valid YAML{at}: {reason}; {_YAML_ADVICE}") from None
    except yaml.YAMLError as error:  # characters that no text holds
        raise ValueError(f"{name} is not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ValueError(f"{name} is nested too deeply; at most {YAML_DEPTH} lists and mappings may do.") from None


_YAML_ADVICE = "close every [ { and quote, and quote text that begins with one of @ % & * ! ` [ {"


def _check_yaml(
    node: yaml.Node,
    name: str,
    loader: _YamlLoader,
    known: dict[int, tuple[int, int]],
    above: tuple[int, ...],
) -> tuple[int, int]:
    """Return how many values a node stands for and how deep they are; raise for what a recipe must not hold."""
    at = f"{name}, line {node.start_mark.line + 1}"
    if id(node) in above:
        raise ValueError(f"{at}: an alias stands within its own anchor, so the value has no end; write it out.")
    if id(node) in known:
        return known[id(node)]
    if isinstance(node, yaml.ScalarNode):
        _check_scalar(node, at, loader)
        return 1, 0
    if node.tag not in (loader.DEFAULT_MAPPING_TAG, loader.DEFAULT_SEQUENCE_TAG):
        raise ValueError(f"{at}: the tag {node.tag} is not allowed; write a plain list or mapping.")
    lines: dict[str, int] = {}
    values, depth = 1, len(above) + 1
    for part in node.value:
        key, value = part if isinstance(part, tuple) else (None, part)
        if key is not None:
            _check_key(key, name, lines, loader)
        size, height = _check_yaml(value, name, loader, known, (*above, id(node)))
        values, depth = values + size, max(depth, len(above) + 1 + height)
        if values > YAML_VALUES or depth > YAML_DEPTH:
            limit = f"{YAML_VALUES:,} values" if values > YAML_VALUES else f"{YAML_DEPTH} levels"
            raise ValueError(f"{at}: more than {limit} once its aliases are written out; write less, or a data file.")
    known[id(node)] = values, depth - len(above)
    return known[id(node)]


def _check_key(key: yaml.Node, name: str, lines: dict[str, int], loader: _YamlLoader) -> None:
    line = key.start_mark.line + 1
    if not isinstance(key, yaml.ScalarNode):
        raise ValueError(f"{name}, line {line}: a key must be text, not a list or mapping.")
    if key.value in lines:
        raise ValueError(f"{name}, line {line}: {key.value!r} was already given in line {lines[key.value]}.")
    lines[key.value] = line
    if key.tag.endswith((":bool", ":null")):
        key.tag = loader.DEFAULT_SCALAR_TAG  # `on`, `no` and `null` as keys are names
    if not key.tag.endswith(":merge"):
        _check_scalar(key, f"{name}, line {line}", loader)


def _check_scalar(node: yaml.ScalarNode, at: str, loader: _YamlLoader) -> None:
    kind = node.tag.removeprefix("tag:yaml.org,2002:")
    fits = {loader.resolve(yaml.ScalarNode, node.value, (True, False)).removeprefix("tag:yaml.org,2002:"), "str"}
    if kind not in (fits | {"float"} if "int" in fits else fits):
        raise ValueError(f"{at}: {node.value[:40]!r} cannot have the tag {node.tag}; write a plain value.")
    try:
        loader.construct_object(node, deep=True)
    except (ValueError, OverflowError) as error:  # a number that is too long, or has no digits
        raise ValueError(f"{at}: {node.value[:40]!r} is no number: {error}; quote it if it is text.") from None


def content_hash(*values: Any) -> str:
    """Compute the SHA-256 (hex, 64 digits) of JSON values; equal values give equal hashes on every machine."""
    text = json.dumps(values, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def file_hash(path: str | os.PathLike[str]) -> str:
    """Compute the SHA-256 (hex, 64 digits) of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Seconds that a lock is waited for: what a killed command has left (workers that notice its end, a GPU's memory) takes
# some to end.
LOCK_WAIT = 5.0
NO_LOCKS = frozenset({errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK})


@contextmanager
def locked(folder: str | os.PathLike[str], *, name: str = ".lock", remove: bool = False) -> Iterator[None]:
    """Hold the lock of a folder, made if absent, so that no second command writes there.

    It is released when its holder ends, however it ends; half-written files that a killed holder left are removed.
    On a file system without locks a line says so, and the block runs without one.

    Args:
        folder: what is locked.
        name: the lock's file in it.
        remove: delete that file at the end; otherwise it stays, empty.

    Raises:
        ValueError: another process holds it, and still does after `LOCK_WAIT` seconds.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    lock = FileLock(Path(folder) / name)
    if not _acquired(lock):
        raise ValueError(f"{folder}: another command is at work there. Wait for it, or give another folder.")
    remove_partial_files(folder)
    try:
        yield
    finally:
        if remove:  # before the release, so that nobody can be holding the file that is removed
            Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def remove_partial_files(folder: str | os.PathLike[str]) -> None:
    """Remove half-written files that killed writers left in a folder; only the holder of its lock may."""
    for leftover in Path(folder).glob(".*.partial"):
        leftover.unlink(missing_ok=True)


def _acquired(lock: FileLock) -> bool:
    deadline = time.monotonic() + LOCK_WAIT
    while True:
        try:
            lock.acquire(blocking=False)
            return True
        except Timeout:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        except (OSError, NotImplementedError) as error:
            if isinstance(error, OSError) and error.errno not in NO_LOCKS:
                raise
            print(f"prefopt: {lock.lock_file}: no locks here, so a second command is not noticed.", file=sys.stderr)
            return True
