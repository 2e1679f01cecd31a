"""What a run has on a machine: its memory on disk (stages that are done, and what they made), lock and processes."""

from __future__ import annotations

import codecs
import fcntl
import json
import os
import platform
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

import psutil

from prefopt.arguments import masked, without_secrets
from prefopt.files import content_hash, file_hash, read_json, remove_partial_files, write_json

VERSION = 1
STATE_FILE = "state.json"
PREVIOUS_FILE = "state.previous.json"
LOCK_FILE = ".lock"
RUNNING, DONE, FAILED = "running", "done", "failed"
GRACE = 20.0  # seconds between asking a process to end and killing it
TAKE_OVER = GRACE + 10.0  # seconds that the stages of a killed runner get to end
PATIENCE = 0.5  # seconds without output after which it is checked whether the process has ended
MARK = "PREFOPT_STAGE_OF"  # environment variable of every process of a stage: the lock file of its run


# ---- memory


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

    def check(self) -> None:
        """Raise a TypeError where a damaged state file gives an attribute another type."""
        mappings = (self.settings, self.inputs, self.consumed, self.files)
        right = all(isinstance(value, dict) for value in mappings) and isinstance(self.digest, str)
        right = right and isinstance(self.seconds, (int, float)) and self.status in (RUNNING, DONE, FAILED)
        if not right or not all(_is_entry(entry) for entry in self.files.values()):
            raise TypeError(f"a stage with status {self.status!r} is not described as stages are")


def _is_entry(value: Any) -> bool:
    """Return whether a value is [size, mtime in ns, SHA-256], as files are described."""
    return isinstance(value, list) and list(map(type, value)) == [int, int, str]


class RunState:
    """The state file of a run; each change is on disk before anything follows from it.

    Args:
        run_dir: the run's folder.

    Raises:
        ValueError: the state file is damaged or from another version.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / STATE_FILE
        self.stages: dict[str, StageRecord] = self._read() if self.path.exists() else {}

    def _read(self) -> dict[str, StageRecord]:
        remedy = (
            f"Copy {self.path.with_name(PREVIOUS_FILE)} (the state one step earlier) over it, or give another "
            "run_dir to start afresh."
        )
        try:
            value = read_json(self.path)
            version = value["version"]
            records = {name: StageRecord(**record) for name, record in value["stages"].items()}
            for record in records.values():
                record.check()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{self.path} is damaged ({type(error).__name__}: {error}). {remedy}") from error
        if version != VERSION:
            raise ValueError(
                f"{self.path} was written by another version of prefopt (state {version}, not {VERSION})."
            )
        for record in records.values():
            record.settings = without_secrets(record.settings)  # earlier versions wrote them
        return records

    def save(self, name: str, record: StageRecord) -> None:
        """Write a stage's record to disk, and the state before it beside it."""
        self.stages[name] = record
        if self.path.exists():
            write_json(self.path.with_name(PREVIOUS_FILE), without_secrets(read_json(self.path)))
        stages = {name: asdict(record) for name, record in self.stages.items()}
        write_json(self.path, {"version": VERSION, "stages": stages})


def describe_files(run_dir: Path, patterns: Sequence[str], known: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Return size, time and SHA-256 of the files that match.

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
            found[name] = _described(path, known.get(name))
    return found


def digest_of(files: dict[str, list[Any]]) -> str:
    """Compute one hash of the contents of described files."""
    return content_hash({name: entry[2] for name, entry in files.items()})


def _described(path: Path, before: list[Any] | None) -> list[Any]:
    """Return [size, mtime in ns, SHA-256] of a file, which is not read again if size and time are as before."""
    stat = path.stat()
    seen = [stat.st_size, stat.st_mtime_ns]
    return before if before is not None and before[:2] == seen else [*seen, file_hash(path)]


class InputHashes:
    """Hashes of what a run reads from outside, kept in the run's folder so that a large file is read once."""

    def __init__(self, run_dir: Path, *, keep: bool) -> None:
        self.path = run_dir / "input_hashes.json"
        self.keep = keep
        self._known: dict[str, list[Any]] = {}
        with suppress(FileNotFoundError, ValueError, AttributeError, RecursionError):
            # only saves time: what is damaged is made again
            self._known = {name: entry for name, entry in read_json(self.path).items() if _is_entry(entry)}

    def of(self, path: Path) -> str:
        """Hash a file, or every file in a folder with its name; checkpoints within a model's folder are left out.

        Raises:
            ValueError: there is nothing.
        """
        if not path.exists():
            raise ValueError(f"{path} is read by this run, but does not exist.")
        place = path.resolve()
        files = sorted(p for p in place.rglob("*") if p.is_file()) if place.is_dir() else [place]
        files = [p for p in files if not any(part.startswith("checkpoint-") for part in p.relative_to(place).parts)]
        found = {str(file): _described(file, self._known.get(str(file))) for file in files}
        if self.keep and not found.items() <= self._known.items():
            write_json(self.path, self._known | found)
        self._known |= found
        return content_hash([[file.relative_to(place).as_posix(), str(found[str(file)][2])] for file in files])


# ---- lock


class RunLock:
    """One runner at a time in a run's folder.

    The lock is the kernel's: it goes when the last process that holds it ends. Stages inherit it, so that a stage that
    outlives a killed runner is noticed; the next runner on that machine ends it and takes over. filelock, which other
    commands use, closes its descriptor in child processes and does not say who holds a lock.
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
            while not _try_lock(file):
                self._check_holder(file)
                if time.monotonic() > deadline:
                    raise ValueError(f"{self.path}: still locked although its runner has ended; try again.")
                self._end_leftovers()
                time.sleep(0.05)
            self._end_leftovers()  # a stage that does not hold the lock may live as well
            self._file = file
            self._sign()
            remove_partial_files(self.path.parent)
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
        """The value of `MARK` in the environment of this run's stages."""
        return str(self.path.resolve())

    def _sign(self) -> None:
        me = {"pid": os.getpid(), "born": _born(os.getpid()), "host": platform.node()}
        self._file.seek(0)
        self._file.truncate()
        self._file.write(json.dumps(me))
        self._file.flush()

    def _check_holder(self, file: Any) -> None:
        """Raise a ValueError if the runner that signed the lock file lives, or is on another machine."""
        holder = _signed(file)
        here = holder.get("host") == platform.node()
        if not here or (holder.get("born") is not None and _born(holder.get("pid", -1)) == holder["born"]):
            who = f"process {holder.get('pid', '?')} on {holder.get('host', 'some machine')}"
            raise ValueError(f"{self.path.parent}: another runner is at work there ({who}). Wait for it, or end it.")

    def _end_leftovers(self) -> None:
        for session in marked_sessions(self.mark) - {os.getsid(0)}:
            print(f"pipeline: ending the stage that a killed runner left at work (session {session}).", flush=True)
            end_session(session)


def _try_lock(file: Any) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _signed(file: Any) -> dict[str, Any]:
    file.seek(0)
    with suppress(json.JSONDecodeError):
        value = json.loads(file.read() or "{}")
        return value if isinstance(value, dict) else {}
    return {}


def _born(pid: int) -> float | None:
    """Return when a living process was started (its id may be given again); None for one that has ended."""
    with suppress(psutil.Error, TypeError, ValueError, OverflowError):  # the lock file may hold anything
        process = psutil.Process(pid)
        return process.create_time() if process.status() != psutil.STATUS_ZOMBIE else None
    return None


# ---- processes


def run_logged(words: Sequence[str], log: Path, *, mark: str, keep_open: int, console: TextIO | None = None) -> int:
    """Run a command; what it prints goes to the console as it comes and is appended to `log`.

    The process leads a session, so that it can be ended with everything that it has started; it is, however this
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
            # Python writes lines to a pipe only when its buffer is full, unless it is unbuffered
            env={**tracker_group(log), **os.environ, MARK: mark, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
            pass_fds=(keep_open,),
        )
        try:
            for output in _output(process):
                text = masked(output)  # its environment and command line may hold secrets
                for stream in (file, console):
                    stream.write(text)
                    stream.flush()
            return process.wait()
        finally:
            end_session(process.pid)
            process.wait()
            if process.stdout is not None:
                process.stdout.close()


def tracker_group(log: Path) -> dict[str, str]:
    """Return the variables by which trackers file a stage under its run's name, as far as the user sets no others.

    TensorBoard needs none: `tensorboard --logdir RUN_DIR` finds every stage below.
    """
    run, stage = log.parent.parent.resolve().name, log.stem
    return {
        "WANDB_RUN_GROUP": run,
        "WANDB_NAME": stage,
        "MLFLOW_EXPERIMENT_NAME": run,
        "MLFLOW_RUN_NAME": stage,
    }


def _output(process: subprocess.Popen[bytes]) -> Iterator[str]:
    """Yield what the process prints, until it has ended: what it has left running may hold the pipe open for ever."""
    assert process.stdout is not None
    pipe = process.stdout.fileno()
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    deadline = float("inf")
    while time.monotonic() < deadline:
        if select.select([pipe], [], [], PATIENCE)[0]:
            if not (block := os.read(pipe, 1 << 16)):
                break
            yield decoder.decode(block)
        elif process.poll() is not None:
            break
        if process.poll() is not None:
            deadline = min(deadline, time.monotonic() + GRACE)
    yield decoder.decode(b"", final=True)


def marked_sessions(mark: str) -> set[int]:
    """Return the sessions of all living processes here that were started as a stage with `mark`, or by one."""
    sessions = set()
    for process in _living(lambda process: process.environ().get(MARK) == mark):
        with suppress(ProcessLookupError):
            sessions.add(os.getsid(process.pid))
    return sessions


def end_session(session: int) -> None:
    """End every process of a session that a stage was started in: SIGTERM first, SIGKILL after a grace."""

    def members() -> list[psutil.Process]:
        return _living(lambda process: os.getsid(process.pid) == session)

    for process in members():
        with suppress(psutil.Error):
            process.terminate()
    deadline = time.monotonic() + GRACE
    while members() and time.monotonic() < deadline:
        time.sleep(0.05)
    for process in members():
        with suppress(psutil.Error):
            process.kill()


def _living(belongs: Callable[[psutil.Process], bool]) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        # those of other users, and those that end meanwhile, are none of a stage
        with suppress(ProcessLookupError, PermissionError, psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE and belongs(process):
                found.append(process)
    return found


def last_lines(log: Path, count: int) -> list[str]:
    """Return the last `count` non-blank lines of a log; of an overwritten line (a progress bar) its last state."""
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
