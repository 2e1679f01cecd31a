"""Waiting for other processes: it is printed, it ends, and locks of dead processes do not hold it up."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
from torch.utils.file_baton import FileBaton

from prefopt import waiting


@pytest.fixture
def lock(tmp_path, monkeypatch) -> Path:
    """The lock of an extension, as a process leaves it that is killed while it compiles."""
    monkeypatch.setattr(FileBaton, "try_acquire", FileBaton.try_acquire)  # put back at the end
    monkeypatch.setattr(FileBaton, "wait", FileBaton.wait)
    waiting.watch_extension_locks()
    path = tmp_path / "lock"
    child = multiprocessing.get_context("fork").Process(target=_die_with_lock, args=(path,))
    child.start()
    child.join()
    assert path.exists()
    return path


def _die_with_lock(path: Path) -> None:
    assert FileBaton(str(path)).try_acquire()
    os.kill(os.getpid(), signal.SIGKILL)


def make_old(path: Path) -> None:
    os.utime(path, (time.time() - 3600,) * 2)


def test_the_lock_of_a_killed_compilation_is_named_and_removed(lock, capsys):
    make_old(lock)
    baton = FileBaton(str(lock))
    assert baton.try_acquire()
    assert f"{lock}: the process that made this lock is gone; removed" in capsys.readouterr().err
    baton.release()
    assert not lock.exists()


def test_a_young_lock_without_a_holder_is_waited_for_and_named(lock, monkeypatch, capsys):
    """Its maker may be in another container."""
    monkeypatch.setattr(waiting, "AGE_HERE", 1.5)
    monkeypatch.setattr(waiting, "AGE_ON_SHARED_DISK", 1.5)
    monkeypatch.setattr(waiting, "PATIENCE", 0.1)
    assert FileBaton(str(lock)).try_acquire()
    assert f"s for the lock {lock}, which no process here holds" in capsys.readouterr().err


def test_one_of_several_ranks_takes_a_dead_lock_over(lock):
    make_old(lock)
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    children = [context.Process(target=_take, args=(lock, answers)) for _ in range(4)]
    for child in children:
        child.start()
    assert sorted(answers.get(timeout=60) for _ in children) == [False, False, False, True]
    for child in children:
        child.join()


def _take(path: Path, answers) -> None:
    baton = FileBaton(str(path))
    taken = bool(baton.try_acquire())
    answers.put(taken)
    if taken:
        time.sleep(3)
        baton.release()


def test_the_lock_of_a_living_process_is_respected_and_its_end_noticed(lock, monkeypatch, capsys):
    monkeypatch.setattr(waiting, "PATIENCE", 0.1)
    with open(lock) as held:
        make_old(lock)
        baton = FileBaton(str(lock))
        assert not baton.try_acquire()
        monkeypatch.setattr(waiting, "COMPILE_LIMIT", 0.6)
        with pytest.raises(ValueError, match=f"{lock}: another process has compiled an extension for an hour"):
            baton.wait()
        assert f"for another process to compile an extension (lock {lock})" in capsys.readouterr().err
        assert held
    with pytest.raises(ValueError, match=f"{lock}: the process that compiled an extension has ended"):
        baton.wait()
    baton.wait()  # nobody compiles any more


def test_a_long_wait_is_announced_and_a_short_one_is_not(monkeypatch, capsys):
    monkeypatch.setattr(waiting, "PATIENCE", 0.2)
    with waiting.announced_wait("nothing"):
        pass
    time.sleep(0.3)
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "1")
    with waiting.announced_wait("the other ranks"):
        time.sleep(0.5)
    assert capsys.readouterr().err.splitlines() == [
        "prefopt: rank 1 has waited 0 s for the other ranks.",
        "prefopt: rank 1 has waited 0 s for the other ranks.",
    ]
