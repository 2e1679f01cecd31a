"""Waiting for other processes: what for is printed after 30 seconds, and locks of dead processes are removed."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from filelock import FileLock
from torch.utils.file_baton import FileBaton

PATIENCE = 30.0  # seconds of silence
COMPILE_LIMIT = 3600.0  # seconds that another process may take to compile an extension
# Seconds after which a lock that no process here holds is that of a dead one. A process in another container is not
# visible, nor is one on another machine, which can only be at work on a file system that both have.
AGE_HERE, AGE_ON_SHARED_DISK = 60.0, 600.0
SHARED_FILE_SYSTEMS = ("nfs", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb", "afs", "9p", "fuse")


@contextmanager
def announced_wait(what: str) -> Iterator[None]:
    """Print what a block waits for after 30 seconds, and again after twice, four times, ... as long.

    Args:
        what: continues "waits for".
    """
    ended = threading.Event()

    def announce() -> None:
        waited = PATIENCE
        while not ended.wait(waited if waited == PATIENCE else waited / 2):
            where = f"rank {os.environ['RANK']}" if "RANK" in os.environ else f"process {os.getpid()}"
            print(f"prefopt: {where} has waited {waited:.0f} s for {what}.", file=sys.stderr, flush=True)
            waited *= 2

    thread = threading.Thread(target=announce, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()


# ---- torch's locks of extensions


def watch_extension_locks() -> None:
    """Let the locks of torch's extensions, which DeepSpeed compiles its operations as, end with their process.

    torch's lock is a file that exists, so a launch that was killed while it compiled would leave all later ones
    waiting for ever, without a word.
    """
    FileBaton.try_acquire = _try_acquire  # type: ignore[method-assign, assignment]
    FileBaton.wait = _wait  # type: ignore[method-assign, assignment]


_acquire_of_torch = FileBaton.try_acquire


def _try_acquire(baton: FileBaton) -> bool | None:
    """Take the lock if it is free or its holder is gone."""
    if _acquire_of_torch(baton):
        return True
    path = Path(baton.lock_file_path)
    with announced_wait(f"the lock {path}, which no process here holds"):
        # one process at a time, so that none removes the lock that another has just taken
        with FileLock(path.with_name(".takeover")):
            while path.exists() and not _is_open(path):
                if _is_abandoned(path):
                    print(f"prefopt: {path}: the process that made this lock is gone; removed.", file=sys.stderr)
                    path.unlink(missing_ok=True)
                    return _acquire_of_torch(baton)
                time.sleep(0.5)
    return False


def _wait(baton: FileBaton) -> None:
    """Wait until another process has compiled the extension.

    Raises:
        ValueError: it was killed meanwhile, or takes longer than an hour.
    """
    path = Path(baton.lock_file_path)
    deadline = time.monotonic() + COMPILE_LIMIT
    with announced_wait(f"another process to compile an extension (lock {path})"):
        while path.exists():
            if _is_abandoned(path):
                path.unlink(missing_ok=True)
                raise ValueError(
                    f"{path}: the process that compiled an extension has ended before its end; start again."
                )
            if time.monotonic() > deadline:
                raise ValueError(
                    f"{path}: another process has compiled an extension for an hour; if there is none, delete this "
                    "file and start again."
                )
            time.sleep(0.5)


def _is_abandoned(path: Path) -> bool:
    """Return whether a lock file is old and no living process holds it open, as its maker does."""
    with suppress(FileNotFoundError):
        limit = AGE_ON_SHARED_DISK if _is_on_shared_disk(path) else AGE_HERE
        return time.time() - path.stat().st_mtime > limit and not _is_open(path)
    return False


def _is_open(path: Path) -> bool:
    place = os.path.realpath(path)
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):  # of another user, or it has just ended
            if any(file.path == place for file in process.open_files()):
                return True
    return False


def _is_on_shared_disk(path: Path) -> bool:
    place = os.path.realpath(path)
    mounts = [part for part in psutil.disk_partitions(all=True) if Path(place).is_relative_to(part.mountpoint)]
    return (
        max(mounts, key=lambda part: len(part.mountpoint)).fstype.startswith(SHARED_FILE_SYSTEMS) if mounts else True
    )
