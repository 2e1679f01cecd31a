"""A resumable run of stages: each a command, done once, and again only where what decides its result has changed.

A loop (`prefopt.pipelines.self_play`, ...) is a list of `Stage`; `Runner` plans and runs any such list. Nothing here
knows what a stage computes.
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from prefopt.arguments import changed_keys, masked, setting_changes
from prefopt.pipelines.state import (
    DONE,
    FAILED,
    RUNNING,
    InputHashes,
    RunLock,
    RunState,
    StageRecord,
    describe_files,
    digest_of,
    ended_by_signals,
    last_lines,
    run_logged,
)

FORCED = "asked for with --from"
TAIL = 15  # lines of a failed stage's log


@dataclass(frozen=True)
class Stage:
    """One command of a run.

    Attributes:
        name: unique, such as "iteration-1/rank".
        command: the words that are run, as a person could type them.
        settings: everything in it that decides the result (JSON values; paths within the run relative to it). A stage
            whose settings have changed is done again; what is only in `command` (numbers of processes, ports) may
            change freely.
        folder: where it alone writes, relative to the run's folder. It is emptied before the stage is done again, and
            kept where the same stage continues, which its command must be able to do.
        outputs: patterns relative to the run's folder, of the files that other stages read; each must match when the
            stage has ended.
        needs: names of the earlier stages whose outputs it reads.
        inputs: files and folders outside the run that it reads.
        at_end: whether it is also done after a rule has ended the run early, if what it needs was done before.
    """

    name: str
    command: tuple[str, ...]
    settings: Mapping[str, Any]
    folder: str | None = None
    outputs: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    inputs: tuple[Path, ...] = ()
    at_end: bool = False

    def __post_init__(self) -> None:
        # JSON turns tuples into lists and keys into strings: compared with the state file, both must look alike
        object.__setattr__(self, "settings", json.loads(json.dumps(dict(self.settings))))

    @property
    def line(self) -> str:
        """Return the command as one line for a shell, with secrets masked, as it goes to console, logs and scripts."""
        return masked(shlex.join(self.command))


@dataclass
class Planned:
    """Planned action of a stage: done, run, continue, again, or maybe (depends on the outputs of earlier stages)."""

    stage: Stage
    action: str
    reason: str = ""


@dataclass
class Runner:
    """Plans and runs stages in the order in which they are given.

    Args:
        stages: each after all that it needs.
        run_dir: the folder of the run: state, logs, and the stages' folders.
        stop_after: called with each stage that is done; a sentence ends the run there, for that reason, but for stages
            with `at_end`.
        begin: called when a run may start: nobody else is at work there, and it is planned.
        programs: first word of a command -> the words that really start it.
        console: where everything is shown; default: standard output.
    """

    stages: Sequence[Stage]
    run_dir: Path
    stop_after: Callable[[Stage], str | None] = lambda stage: None
    begin: Callable[[], object] = lambda: None
    programs: Mapping[str, Sequence[str]] = field(
        default_factory=lambda: {
            "prefopt": (sys.executable, "-m", "prefopt"),
            "hf": (sys.executable, "-m", "huggingface_hub.cli.hf"),
        }
    )
    console: TextIO | None = None

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for stage in self.stages:
            assert stage.name not in seen and seen.issuperset(stage.needs), f"{stage.name} is out of order"
            seen.add(stage.name)
        folders = [stage.folder for stage in self.stages if stage.folder is not None]
        assert len(folders) == len(set(folders)), "two stages share a folder"

    # ---- planning

    def plan(self, first: str | None = None, last: str | None = None) -> list[Planned]:
        """Plan what a run would do now; nothing is written.

        Args:
            first: stages from this one on are done again; those before must be done. A name, or its beginning
                ("iteration-2").
            last: the run ends after this one.

        Raises:
            ValueError: no such stage, a stage before `first` that is not done, or a damaged state.
        """
        return self._plan(RunState(self.run_dir), InputHashes(self.run_dir, keep=False), first, last)

    def _plan(self, state: RunState, hashes: InputHashes, first: str | None, last: str | None) -> list[Planned]:
        begin, end = self._range(first, last)
        planned: list[Planned] = []
        for place, stage in enumerate(self.stages[:end]):
            item = self._assess(stage, state, hashes, {p.stage.name for p in planned if p.action != "done"})
            if first is not None and place >= begin and item.action in ("done", "maybe"):
                item = Planned(stage, "again", FORCED)
            if place < begin and item.action != "done":
                raise ValueError(f"--from {first}: the stage {stage.name} before it is not done ({item.reason}).")
            planned.append(item)
        return planned

    def selected(self, first: str | None, last: str | None) -> Sequence[Stage]:
        """Return the stages from `first` to `last`, named as for `plan`."""
        begin, end = self._range(first, last)
        return self.stages[begin:end]

    def _range(self, first: str | None, last: str | None) -> tuple[int, int]:
        begin = self._place(first, "--from")[0] if first is not None else 0
        end = self._place(last, "--until")[1] if last is not None else len(self.stages)
        if begin >= end:
            raise ValueError(f"--from {first} comes after --until {last}.")
        return begin, end

    def _place(self, name: str, flag: str) -> tuple[int, int]:
        """Find where the stages called `name`, or beginning with it, start and end."""
        places = [n for n, stage in enumerate(self.stages) if stage.name == name or stage.name.startswith(f"{name}/")]
        if not places:
            raise ValueError(
                f"{flag} {name}: there is no such stage; there are {', '.join(s.name for s in self.stages)}."
            )
        return places[0], places[-1] + 1

    def _assess(self, stage: Stage, state: RunState, hashes: InputHashes, pending: set[str]) -> Planned:
        record = state.stages.get(stage.name)
        if record is None:
            if stage.folder is not None and _holds_anything(self.run_dir / stage.folder):
                raise ValueError(
                    f"{self.run_dir / stage.folder} holds something, but this run has not made it: move it away, or "
                    "give another run_dir."
                )
            return Planned(stage, "run", "not done yet")
        if changed := setting_changes(record.settings, stage.settings):
            return Planned(stage, "again", f"changed: {'; '.join(changed)}")
        inputs = {str(path): hashes.of(path) for path in stage.inputs}
        if inputs != record.inputs:
            return Planned(stage, "again", f"changed input: {', '.join(changed_keys(record.inputs, inputs))}")
        waiting = [name for name in stage.needs if name in pending]
        if not waiting:
            consumed = {name: state.stages[name].digest for name in stage.needs}
            if consumed != record.consumed:
                return Planned(stage, "again", f"new outcome of {', '.join(changed_keys(record.consumed, consumed))}")
        if record.status != DONE:
            why = "it failed" if record.status == FAILED else "it was stopped before its end"
            return Planned(stage, "continue", why)
        try:
            files = describe_files(self.run_dir, stage.outputs, record.files)
        except FileNotFoundError as missing:
            return Planned(stage, "again", f"nothing matches {missing} any more")
        if digest_of(files) != record.digest:
            return Planned(stage, "again", f"changed since: {', '.join(changed_keys(record.files, files))}")
        if waiting:
            return Planned(stage, "maybe", f"if the outcome of {', '.join(waiting)} changes")
        return Planned(stage, "done")

    # ---- running

    def run(self, first: str | None = None, last: str | None = None) -> str | None:
        """Run what is planned, stage after stage.

        Returns:
            Why it ended early by `stop_after`, or None.

        Raises:
            ValueError: another runner is at work, a damaged state, or a stage that failed; the message ends with its
                log's last lines.
            SystemExit: ended by Ctrl-C, SIGTERM or SIGHUP; the stage at work is ended with it.
        """
        with RunLock(self.run_dir).held() as lock, ended_by_signals():
            try:
                return self._run(lock, first, last)
            except KeyboardInterrupt as signal:
                again = f" without --from {first}" if first is not None else ""
                self._say(
                    f"\npipeline: stopped{f' by {signal}' if str(signal) else ''}; the same command{again} continues."
                )
                raise SystemExit(130) from None

    def _run(self, lock: RunLock, first: str | None, last: str | None) -> str | None:
        state, hashes = RunState(self.run_dir), InputHashes(self.run_dir, keep=True)
        planned = self._plan(state, hashes, first, last)
        self.begin()
        self._say(table(planned))
        started, reason, done = time.monotonic(), None, set()
        for number, item in enumerate(planned, start=1):
            if reason is not None and not (item.stage.at_end and done.issuperset(item.stage.needs)):
                continue
            now = self._assess(item.stage, state, hashes, set())
            if now.action == "done" and item.reason == FORCED:
                now = item
            if now.action != "done":
                self._say(f"\n=== {number} of {len(planned)}: {item.stage.name} ({now.reason})\n$ {item.stage.line}")
                self._do(item.stage, now.action, state, hashes, lock)
            done.add(item.stage.name)
            if reason is None and (reason := self.stop_after(item.stage)) is not None:
                self._say(f"pipeline: ends early after {item.stage.name}: {reason}")
        self._say(f"pipeline: {len(done)} stages done in {self.run_dir} ({time.monotonic() - started:.0f} s).")
        return reason

    def _do(self, stage: Stage, action: str, state: RunState, hashes: InputHashes, lock: RunLock) -> None:
        before = state.stages.get(stage.name)
        if action == "again" and stage.folder is not None:
            # what could not be removed would be continued as if it were of the new settings: an error ends the run
            with suppress(FileNotFoundError):
                shutil.rmtree(self.run_dir / stage.folder)
        record = StageRecord(
            RUNNING,
            dict(stage.settings),
            {str(path): hashes.of(path) for path in stage.inputs},
            {name: state.stages[name].digest for name in stage.needs},
            seconds=before.seconds if before is not None and action == "continue" else 0.0,
        )
        state.save(stage.name, record)
        log = self.log_path(stage)
        status, seconds = self._execute(stage, log, lock)
        record.seconds += seconds
        fault = _fault(status)
        if not fault:
            try:
                record.files = describe_files(self.run_dir, stage.outputs, {})
            except FileNotFoundError as missing:
                fault = f"ended well, but nothing matches {missing} in {self.run_dir}"
        record.status, record.digest = (FAILED, "") if fault else (DONE, digest_of(record.files))
        state.save(stage.name, record)
        if fault:
            tail = "\n".join(f"  | {line}" for line in last_lines(log, TAIL))
            self._say(f"\npipeline: the end of {log}:\n{tail}")
            last = next(iter(last_lines(log, 1)), "its log is empty")
            raise ValueError(
                f"the stage {stage.name} {fault} after {seconds:.0f} s: {last} (the whole log is {log}; once the "
                "cause is removed, the same command, without any --from, continues here.)"
            )

    def _execute(self, stage: Stage, log: Path, lock: RunLock) -> tuple[int, float]:
        words = [*self.programs.get(stage.command[0], stage.command[:1]), *stage.command[1:]]
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a", encoding="utf-8") as file:
            file.write(f"\n=== {datetime.now().isoformat(' ', 'seconds')}\n$ {stage.line}\n")
        started = time.monotonic()
        try:
            status = run_logged(words, log, mark=lock.mark, keep_open=lock.descriptor, console=self.console)
        except FileNotFoundError as error:
            raise ValueError(
                f"the stage {stage.name}: there is no command {words[0]!r} ({error.strerror})."
            ) from error
        return status, time.monotonic() - started

    def log_path(self, stage: Stage) -> Path:
        """Return the file that keeps the output of a stage."""
        return self.run_dir / "logs" / f"{stage.name.replace('/', '-')}.log"

    def _say(self, text: str) -> None:
        print(text, file=self.console or sys.stdout, flush=True)


def table(planned: Sequence[Planned]) -> str:
    """Format a plan: a line for each stage, with why it will be done."""
    width = max((len(item.stage.name) for item in planned), default=0)
    lines = [
        f"  {item.stage.name:<{width}}  {item.action}{f' ({item.reason})' if item.reason else ''}" for item in planned
    ]
    return "\n".join([f"pipeline: {len(planned)} stages", *lines])


def _fault(status: int) -> str:
    if status < 0:
        return f"was ended by signal {-status}"
    return f"ended with status {status}" if status else ""


def _holds_anything(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())
