"""Kill real commands at random times, start them again, and compare their ends with those of an undisturbed run.

    python -m tests.faults [--kills 10] [--seed 0] [--only NAME ...] [--jobs 2] [--keep FOLDER]

Each command first runs undisturbed. Then it is started, killed (SIGKILL) at a random moment, started again and perhaps
killed again, up to three times in a row; at last it is left alone, must end well, and what it has made must equal what
the undisturbed run made. A kill is of the command with everything that it started, as a machine's failure would be, or
of the first process alone. The exit status is 0 if nothing was lost.

A command of one process is forked from this one, which has imported everything: so kills come while it works, and not
while it imports. Ranks come from a real `accelerate launch`, and stages of a pipeline are real processes too.
"""

from __future__ import annotations

import os

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}

import argparse
import ctypes
import importlib
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path

import psutil
import torch
from tqdm import tqdm

import prefopt.training  # noqa: F401 - so that forked processes have it
from prefopt import cli
from prefopt.launch import PR_SET_PDEATHSIG
from tests.faults.commands import Command, differences, every_command, write_inputs

PATIENCE = 300  # seconds that a command may take at most: one that waits for ever has lost its run as well
MOST_KILLS = 3  # in a row, before a run is left alone


class Victim:
    """A started command, with its output in a file."""

    def __init__(self, command: Command, run: Path, log: Path) -> None:
        self.log = log
        if command.processes > 1:
            with open(log, "ab") as output:
                program = command.program(run)
                self.process = subprocess.Popen(
                    program,
                    stdout=output,
                    stderr=output,
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                    preexec_fn=_end_with_parent,
                )
            self.pid = self.process.pid
        else:
            self.process = None
            self.pid = os.fork()
            if self.pid == 0:
                _become(command.words(run), log)

    def wait(self, seconds: float) -> int | None:
        """Wait for the end; return the exit status (negative: a signal), or None when it has not come."""
        deadline = time.monotonic() + seconds
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() > deadline:
                return None
            time.sleep(0.005)

    def kill(self, *, alone: bool) -> None:
        """Kill the first process, alone or with everything that it has started."""
        root = psutil.Process(self.pid)
        family = [root] if alone else [root, *root.children(recursive=True)]
        for member in family:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        os.waitpid(self.pid, 0)


def _end_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _become(words: list[str], log: Path) -> None:
    """Turn a forked process into the command."""
    status = 70
    try:
        os.setsid()
        _end_with_parent()
        output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        # tqdm's lock is one for all processes that are forked, and who is killed while it holds it never gives it back
        tqdm.set_lock(threading.RLock())
        torch.set_num_threads(1)
        status = cli.main(words)
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def undisturbed(command: Command, run: Path, log: Path) -> float:
    """Run a command to its end; return how long it took."""
    began = time.monotonic()
    victim = Victim(command, run, log)
    status = victim.wait(PATIENCE)
    if status is None:
        victim.kill(alone=False)
    if status != 0:
        raise RuntimeError(f"ended with status {status}:\n{_tail(log)}")
    return time.monotonic() - began


def _tail(log: Path) -> str:
    return "\n".join(f"    | {line}" for line in log.read_text(errors="replace").splitlines()[-12:])


def faults_of(name: str, command: Command, folder: Path, kills: int, rng: random.Random) -> dict[str, object]:
    """Kill one command so many times; return what happened."""
    run, whole, log = folder / "run", folder / "whole", folder / "undisturbed.log"
    folder.mkdir(parents=True)
    duration = undisturbed(command, run, log)
    expected = command.ends(run)
    run.rename(whole)  # every run has the same path, which some results hold
    done, lost = 0, []
    trial = 0
    while done < kills and trial < 10 * kills + 10:
        trial += 1
        log, moments = folder / f"trial-{trial}.log", []
        for _ in range(min(rng.randint(1, MOST_KILLS), kills - done)):
            moment, alone = rng.uniform(0.0, duration), rng.random() < 0.5
            victim = Victim(command, run, log)
            if (status := victim.wait(moment)) is not None:
                if status != 0:
                    lost.append(f"ended with status {status} by itself, killed at {moments} before:\n{_tail(log)}")
                break
            victim.kill(alone=alone)
            moments.append(f"{moment:.2f} s{' alone' if alone else ''}")
            done += 1
        try:
            undisturbed(command, run, log)
            unequal = differences(expected, command.ends(run))
            if unequal:
                lost.append(f"killed at {moments}: " + "\n  ".join(unequal[:5]))
        except Exception as error:
            lost.append(f"killed at {moments}: {error}")
        print(f"  {name}: killed at {', '.join(moments) or 'no time'}: {'LOST' if lost else 'equal'}", flush=True)
        if lost:
            break  # the folder is kept as it is
        shutil.rmtree(run)
    return {"name": name, "seconds": round(duration, 1), "kills": done, "lost": lost}


def every_fault(args: argparse.Namespace, folder: Path) -> list[dict[str, object]]:
    """Share the kills out among the commands, and run so many of these at a time."""
    for name in cli.COMMANDS:
        importlib.import_module(cli.COMMANDS[name].module)  # once, here, and not in every process
    inputs = folder / "inputs"
    write_inputs(inputs)
    commands = every_command(inputs)
    for name, result in (("generate", "candidates"), ("rank", "ranked")):
        undisturbed(commands[name], inputs / result, folder / f"{result}.log")
    names = args.only or list(commands)
    waiting = [(n, args.kills // len(names) + (place < args.kills % len(names))) for place, n in enumerate(names)]
    waiting = [(name, kills) for name, kills in reversed(waiting) if kills]  # the longest are the last in the table
    working: dict[int, str] = {}
    results = []
    while waiting or working:
        while waiting and len(working) < args.jobs:
            name, kills = waiting.pop(0)
            if (pid := os.fork()) == 0:
                _drive(name, commands[name], folder, kills, random.Random(f"{args.seed} {name}"))
            working[pid] = name
        pid, _ = os.wait()
        name = working.pop(pid)
        results.append(json.loads((folder / f"{name}.json").read_text()))
        print(_line(results[-1]), flush=True)
    return results


def _drive(name: str, command: Command, folder: Path, kills: int, rng: random.Random) -> None:
    try:
        result = faults_of(name, command, folder / name, kills, rng)
    except BaseException as error:
        result = {"name": name, "seconds": 0.0, "kills": 0, "lost": [f"{type(error).__name__}: {error}"]}
    (folder / f"{name}.json").write_text(json.dumps(result))
    os._exit(0)


def _line(result: dict[str, object]) -> str:
    lost = result["lost"]
    end = "nothing lost" if not lost else "LOST\n  " + "\n  ".join(lost)  # type: ignore[arg-type]
    return f"{result['name']:<17} {result['kills']:>4} kills ({result['seconds']} s undisturbed): {end}"


def main() -> int:
    """Read the command line, and report."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", help="commands; default: all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--keep", help="folder for everything; default: a temporary one, kept after a loss")
    args = parser.parse_args()
    known = every_command(Path())
    if unknown := [name for name in args.only or [] if name not in known]:
        parser.error(f"unknown command {unknown[0]!r}; there are {', '.join(known)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    folder = Path(args.keep or tempfile.mkdtemp(prefix="prefopt-faults-")).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    results = every_fault(args, folder)
    lost = [result for result in results if result["lost"]]
    kills = sum(int(str(result["kills"])) for result in results)
    print(f"{kills} kills, seed {args.seed}, {time.monotonic() - began:.0f} s: {len(lost) or 'nothing'} lost")
    if lost:
        print(f"everything is in {folder}")
    elif not args.keep:
        shutil.rmtree(folder)
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
