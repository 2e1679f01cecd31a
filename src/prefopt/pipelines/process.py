"""A stage's process: its own session, its output on the console and in a log, and nothing of it left behind."""

from __future__ import annotations

import codecs
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

import psutil

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

    The process is the leader of a session of its own, so that it can be ended with everything that it has started; it is, however this
    function is left.

    Args:
        words: the command.
        log: a text file; its folder is made.
        mark: what `marked_sessions` finds it by, from any process and after the end of this one.
        keep_open: a file descriptor that the process inherits: the run's lock, which holds as long as any part of the process lives.
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
