"""What a run remembers on disk: which stages are done, with which settings, and what they made; and its lock."""

from __future__ import annotations

import codecs
import fcntl
import hashlib
import json
import os
import platform
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

import psutil

from prefopt.files import content_hash, read_json, write_json

GRACE = 20.0  # seconds between the request to end and the end
PATIENCE = 0.5  # seconds without output after which a process is looked at
MARK = "PREFOPT_STAGE_OF"  # environment variable of every process of a stage: the lock file of its run


def run_logged(
    words: Sequence[str],
    log: Path,
    *,
    mark: str,
    keep_open: int,
    console: TextIO | None = None,
) -> int:
    """Run a command; what it prints goes to the console as it comes and is appended to `log`.

    The process is the leader of a session of its own, so that it can be ended with everything that it has started; it
    is, however this
    function is left.

    Args:
        words: the command.
        log: a text file; its folder is made.
        mark: what `marked_sessions` finds it by, from any process and after the end of this one.
        keep_open: a file descriptor that the process inherits: the run's lock, which holds as long as any part of the
            process lives.
        console: where to show the output; default: standard output.

    Returns:
        The exit status; negative: the signal that ended it.
    """
    console = console or sys.stdout
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as file:
        process = subprocess.Popen(
            list(words),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={
                **os.environ,
                MARK: mark,
                "PYTHONUNBUFFERED": "1",
            },  # lines as they come, not when the pipe's buffer is full
            start_new_session=True,
            pass_fds=(keep_open,),
        )
        try:
            for text in _decoded(process):
                file.write(text)
                file.flush()
                console.write(text)
                console.flush()
            return process.wait()
        finally:
            end_session(process.pid)
            process.wait()
            if process.stdout is not None:
                process.stdout.close()


def _decoded(process: subprocess.Popen[bytes]) -> Iterator[str]:
    """What the process prints, until it has ended: what it has left running may hold the pipe open for ever."""
    assert process.stdout is not None
    pipe = process.stdout.fileno()
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    last_look = float("inf")
    while time.monotonic() < last_look:
        if select.select([pipe], [], [], PATIENCE)[0]:
            if not (block := os.read(pipe, 1 << 16)):
                break
            yield decoder.decode(block)
        elif process.poll() is not None:
            break
        if process.poll() is not None:
            last_look = min(last_look, time.monotonic() + GRACE)
    yield decoder.decode(b"", final=True)


def session_members(session: int) -> list[psutil.Process]:
    """The living processes of a session."""
    members = []
    for process in psutil.process_iter():
        with suppress(ProcessLookupError, PermissionError, psutil.Error):
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                members.append(process)
    return members


def marked_sessions(mark: str) -> set[int]:
    """The sessions of all living processes on this machine that were started as a stage with `mark`, or by one."""
    sessions = set()
    for process in psutil.process_iter():
        with suppress(ProcessLookupError, PermissionError, psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == mark:
                sessions.add(os.getsid(process.pid))
    return sessions


def end_session(session: int) -> int:
    """End every process of a session that a stage was started in: asked first, killed after a grace; returns how many there were."""
    members = session_members(session)
    for process in members:
        with suppress(psutil.Error):
            process.terminate()
    deadline = time.monotonic() + GRACE
    while session_members(session) and time.monotonic() < deadline:
        time.sleep(0.05)
    for process in session_members(session):
        with suppress(psutil.Error):
            process.kill()
    return len(members)


def last_lines(log: Path, count: int) -> list[str]:
    """The last `count` lines of a log that hold anything; of a line that was overwritten (a progress bar) its last state."""
    with suppress(FileNotFoundError):
        text = log.read_text(encoding="utf-8", errors="replace")
        lines = [line.rstrip().rsplit("\r", 1)[-1] for line in text.split("\n")]
        return [line for line in lines if line.strip()][-count:]
    return []


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the block as Ctrl-C does, so that stages are ended with their runner."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


VERSION = 1
STATE_FILE = "state.json"
PREVIOUS_FILE = "state.previous.json"
LOCK_FILE = ".lock"
RUNNING, DONE, FAILED = "running", "done", "failed"
TAKE_OVER = GRACE + 10.0  # seconds that the stages of a killed runner get to end


@dataclass
class StageRecord:
    """What is known of one stage.

    Attributes:
        status: running (or killed while it ran), done, or failed.
        settings: what decided its result.
        inputs: path -> hash of what it read from outside the run.
        consumed: earlier stage -> digest of the outputs that it read.
        files: path within the run -> [size, mtime in ns, SHA-256] of what it made.
        digest: one hash of all files' contents.
        seconds: how long it took, over all attempts.
    """

    status: str
    settings: dict[str, Any]
    inputs: dict[str, str]
    consumed: dict[str, str]
    files: dict[str, list[Any]] = field(default_factory=dict)
    digest: str = ""
    seconds: float = 0.0


class RunState:
    """The state file of a run; each change is on disk before anything follows from it.

    Args:
        run_dir: the run's folder.

    Raises:
        ValueError: the state file is damaged or from another version.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.path = run_dir / STATE_FILE
        self.stages: dict[str, StageRecord] = {}
        if self.path.exists():
            self.stages = self._read()

    def _read(self) -> dict[str, StageRecord]:
        remedy = (
            f"Copy {self.path.with_name(PREVIOUS_FILE)} (the state one step earlier) over it, or give another "
            "run_dir to start afresh."
        )
        try:
            value = read_json(self.path)
            version = value["version"]
            records = {name: StageRecord(**record) for name, record in value["stages"].items()}
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.path} is damaged ({type(error).__name__}: {error}). {remedy}") from error
        if version != VERSION:
            raise ValueError(
                f"{self.path} was written by another version of prefopt (state {version}, not {VERSION})."
            )
        return records

    def save(self, name: str, record: StageRecord) -> None:
        """Put a stage's record on disk."""
        self.stages[name] = record
        self.run_dir.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            write_json(self.path.with_name(PREVIOUS_FILE), read_json(self.path))
        write_json(
            self.path, {"version": VERSION, "stages": {name: asdict(record) for name, record in self.stages.items()}}
        )


def describe_files(run_dir: Path, patterns: Sequence[str], known: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Size, time and SHA-256 of the files that match; a file whose size and time are as in `known` is not read again.

    Raises:
        FileNotFoundError: a pattern that matches nothing.
    """
    found: dict[str, list[Any]] = {}
    for pattern in patterns:
        paths = sorted(path for path in run_dir.glob(pattern) if path.is_file())
        if not paths:
            raise FileNotFoundError(pattern)
        for path in paths:
            name = path.relative_to(run_dir).as_posix()
            stat = path.stat()
            seen = [stat.st_size, stat.st_mtime_ns]
            before = known.get(name)
            found[name] = before if before is not None and before[:2] == seen else [*seen, sha256(path)]
    return found


def digest_of(files: dict[str, list[Any]]) -> str:
    """One hash of the contents of described files."""
    return content_hash({name: entry[2] for name, entry in files.items()})


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


class InputHashes:
    """Hashes of what a run reads from outside, kept in the run's folder so that a large file is read once."""

    def __init__(self, run_dir: Path, *, keep: bool) -> None:
        self.path = run_dir / "input_hashes.json"
        self.keep = keep
        self._known: dict[str, list[Any]] = {}
        with suppress(FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
            self._known = read_json(self.path)  # only saves time: a damaged one is made again

    def of(self, path: Path) -> str:
        """Hash of a file, or of every file in a folder with its name; checkpoints within a model's folder are left out.

        Raises:
            ValueError: there is nothing.
        """
        if not path.exists():
            raise ValueError(f"{path} is read by this run, but does not exist.")
        place = path.resolve()
        files = sorted(p for p in place.rglob("*") if p.is_file()) if place.is_dir() else [place]
        files = [p for p in files if not any(part.startswith("checkpoint-") for part in p.relative_to(place).parts)]
        before = dict(self._known)
        value = content_hash([[file.relative_to(place).as_posix(), self._file(file)] for file in files])
        if self.keep and self._known != before:
            write_json(self.path, self._known)
        return value

    def _file(self, path: Path) -> str:
        stat = path.stat()
        seen = [stat.st_size, stat.st_mtime_ns]
        entry = self._known.get(str(path))
        if entry is None or entry[:2] != seen:
            entry = self._known[str(path)] = [*seen, sha256(path)]
        return str(entry[2])


class RunLock:
    """One runner at a time in a run's folder.

    The lock is the kernel's: it goes when the last process that holds it ends. Stages inherit it, so that a stage that
    outlives a killed
    runner is noticed; the next runner on that machine ends it and takes over.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / LOCK_FILE
        self._file: Any = None

    @contextmanager
    def held(self) -> Iterator[RunLock]:
        """Hold the lock for a block; whatever a killed runner has left at work is ended first.

        Raises:
            ValueError: another runner is at work there.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a+", encoding="utf-8") as file:
            deadline = time.monotonic() + TAKE_OVER
            while not _try(file):
                self._refuse_living(file)
                if time.monotonic() > deadline:
                    raise ValueError(f"{self.path}: still locked although its runner has ended; try again.")
                self._end_leftovers()
                time.sleep(0.05)
            self._end_leftovers()  # a stage that does not hold the lock may live as well
            self._file = file
            self._sign()
            try:
                yield self
            finally:
                self._file = None

    @property
    def descriptor(self) -> int:
        """The open lock file, for stages to inherit."""
        return int(self._file.fileno())

    @property
    def mark(self) -> str:
        """What the processes of this run's stages are found by."""
        return str(self.path.resolve())

    def _sign(self) -> None:
        """Write down who holds the lock."""
        me = {"pid": os.getpid(), "born": _born(os.getpid()), "host": platform.node()}
        self._file.seek(0)
        self._file.truncate()
        self._file.write(json.dumps(me))
        self._file.flush()

    def _refuse_living(self, file: Any) -> None:
        holder = _holder(file)
        here = holder.get("host") == platform.node()
        if not here or (holder.get("born") is not None and _born(holder.get("pid", -1)) == holder["born"]):
            who = f"process {holder.get('pid', '?')} on {holder.get('host', 'some machine')}"
            raise ValueError(f"{self.path.parent}: another runner is at work there ({who}). Wait for it, or end it.")

    def _end_leftovers(self) -> None:
        for session in marked_sessions(self.mark) - {os.getsid(0)}:
            print(f"pipeline: ending the stage that a killed runner left at work (session {session}).", flush=True)
            end_session(session)


def _try(file: Any) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _holder(file: Any) -> dict[str, Any]:
    file.seek(0)
    with suppress(json.JSONDecodeError):
        value = json.loads(file.read() or "{}")
        return value if isinstance(value, dict) else {}
    return {}


def _born(pid: int) -> float | None:
    """When a living process was started; None for one that has ended, waited for or not."""
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        return process.create_time() if process.status() != psutil.STATUS_ZOMBIE else None
    return None
