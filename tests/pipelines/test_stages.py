"""The runner of stages, with commands of the shell: what is done again, and every way in which a run can end."""

import dataclasses
import errno
import io
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from prefopt import files
from prefopt.files import read_json, write_json
from prefopt.pipelines import state
from prefopt.pipelines.commands import as_script
from prefopt.pipelines.stages import Runner, Stage, table
from prefopt.pipelines.state import LOCK_FILE, PREVIOUS_FILE, STATE_FILE, RunLock

ROOT = Path(__file__).resolve().parents[2]


def shell(run_dir, name, script, *, needs=(), inputs=(), **settings):
    """A stage `name` whose script sees its folder as $OUT and its run as $RUN, and must write $OUT/result."""
    words = ("sh", "-c", f"RUN={run_dir}; OUT={run_dir}/{name}; mkdir -p $OUT; echo {name} >> $RUN/calls; {script}")
    outputs = (f"{name}/result",)
    return Stage(name, words, {"script": script, **settings}, name, outputs, tuple(needs), tuple(inputs))


def chain(run_dir, *, a="1", b="2", c="3"):
    """a -> b -> c, where b keeps only whether a's number is odd; and d beside them."""
    return [
        shell(run_dir, "a", f"echo {a} > $OUT/result"),
        shell(run_dir, "b", f"echo $(($(cat $RUN/a/result) % 2)) {b} > $OUT/result", needs=["a"]),
        shell(run_dir, "c", f"cat $RUN/b/result > $OUT/result; echo {c} >> $OUT/result", needs=["b"]),
        shell(run_dir, "d", "echo d > $OUT/result"),
    ]


def runner(stages, run_dir, **more):
    return Runner(stages, run_dir, console=io.StringIO(), **more)


def calls(run_dir):
    """The stages whose commands were run, in order, since the last look."""
    path = run_dir / "calls"
    lines = path.read_text().split() if path.exists() else []
    path.unlink(missing_ok=True)
    return lines


def actions(plan):
    return {item.stage.name: item.action for item in plan}


def test_stages_run_once_in_order_and_their_output_is_shown_and_kept(tmp_path):
    stages = [shell(tmp_path, "a", "echo to the user; echo 1 > $OUT/result"), *chain(tmp_path)[1:]]
    first = runner(stages, tmp_path)
    first.run()
    assert calls(tmp_path) == ["a", "b", "c", "d"]
    assert "to the user" in first.console.getvalue() and "to the user" in (tmp_path / "logs" / "a.log").read_text()
    runner(stages, tmp_path).run()
    assert calls(tmp_path) == []


def test_a_changed_setting_runs_what_depends_on_it_and_says_so(tmp_path):
    runner(chain(tmp_path), tmp_path).run()
    calls(tmp_path)
    changed = runner(chain(tmp_path, b="9"), tmp_path)
    assert actions(changed.plan()) == {"a": "done", "b": "again", "c": "maybe", "d": "done"}
    changed.run()
    assert calls(tmp_path) == ["b", "c"]
    assert "script was" in changed.console.getvalue() and "new outcome of b" in changed.console.getvalue()
    assert (tmp_path / "c" / "result").read_text().split() == ["1", "9", "3"]


def test_the_same_outcome_of_a_changed_stage_leaves_what_reads_it_alone(tmp_path):
    runner(chain(tmp_path), tmp_path).run()
    calls(tmp_path)
    runner(chain(tmp_path, a="3"), tmp_path).run()  # odd as before: b's outcome does not change
    assert calls(tmp_path) == ["a", "b"]


def test_what_is_only_in_the_command_may_change(tmp_path):
    stage = shell(tmp_path, "a", "echo 1 > $OUT/result")
    runner([stage], tmp_path).run()
    calls(tmp_path)
    other = Stage("a", (*stage.command, "--num_processes=8"), stage.settings, stage.folder, stage.outputs)
    assert actions(runner([other], tmp_path).plan()) == {"a": "done"}


def test_a_changed_or_missing_output_or_input_is_noticed(tmp_path):
    outside = tmp_path / "prompts"
    outside.mkdir()
    (outside / "train.jsonl").write_text("1")
    run_dir = tmp_path / "run"
    stages = [
        shell(run_dir, "a", "echo 1 > $OUT/result", inputs=[outside]),
        shell(run_dir, "b", "echo 2 > $OUT/result", needs=["a"]),
    ]
    runner(stages, run_dir).run()
    assert actions(runner(stages, run_dir).plan()) == {"a": "done", "b": "done"}
    (run_dir / "b" / "result").write_text("tampered")
    (plan,) = [item for item in runner(stages, run_dir).plan() if item.stage.name == "b"]
    assert plan.action == "again" and "b/result" in plan.reason
    (run_dir / "b" / "result").unlink()
    assert actions(runner(stages, run_dir).plan())["b"] == "again"
    (outside / "train.jsonl").write_text("2")
    assert actions(runner(stages, run_dir).plan()) == {"a": "again", "b": "again"}
    calls(run_dir)
    runner(stages, run_dir).run()
    assert calls(run_dir) == ["a", "b"]


def test_from_and_until(tmp_path):
    stages = chain(tmp_path)
    runner(stages, tmp_path).run(last="b")
    assert calls(tmp_path) == ["a", "b"]
    with pytest.raises(ValueError, match="stage c before it is not done"):
        runner(stages, tmp_path).run(first="d")
    runner(stages, tmp_path).run(first="b", last="c")
    assert calls(tmp_path) == ["b", "c"]
    with pytest.raises(ValueError, match="there is no such stage; there are a, b, c, d"):
        runner(stages, tmp_path).plan(first="e")
    with pytest.raises(ValueError, match="comes after"):
        runner(stages, tmp_path).plan(first="c", last="a")


def test_from_may_name_a_group_of_stages(tmp_path):
    stages = [shell(tmp_path, f"iteration-{n}/{part}", "echo 1 > $OUT/result") for n in (1, 2) for part in "ab"]
    run = runner(stages, tmp_path)
    run.run()
    assert actions(run.plan(first="iteration-2")) == {
        "iteration-1/a": "done", "iteration-1/b": "done", "iteration-2/a": "again", "iteration-2/b": "again",
    }  # fmt: skip
    assert len(run.plan(last="iteration-1")) == 2


def test_a_rule_ends_the_run_early_each_time_alike(tmp_path):
    def rule(stage):
        return "good enough" if stage.name == "b" else None

    stages = chain(tmp_path)
    assert runner(stages, tmp_path, stop_after=rule).run() == "good enough"
    assert runner(stages, tmp_path, stop_after=rule).run() == "good enough"
    assert calls(tmp_path) == ["a", "b"]


def test_what_comes_at_the_end_comes_after_an_early_end_too(tmp_path):
    """Of the stages for the end, those whose needs were done; and each once."""
    at_end = [
        dataclasses.replace(shell(tmp_path, f"push/{n}", "echo 1 > $OUT/result", needs=[n]), at_end=True) for n in "bc"
    ]
    for _ in range(2):
        run = runner(
            [*chain(tmp_path), *at_end], tmp_path, stop_after=lambda s: "good enough" if s.name == "b" else None
        )
        assert run.run() == "good enough"
    assert calls(tmp_path) == ["a", "b", "push/b"]


# ---- ways to end badly


def test_a_failed_stage_stops_the_run_with_its_log_and_is_continued_in_its_folder(tmp_path):
    work = "touch $OUT/kept; echo it breaks here >&2; test -e $RUN/mended || exit 3; echo 1 > $OUT/result"
    stages = [shell(tmp_path, "a", work), *chain(tmp_path)[1:]]
    failing = runner(stages, tmp_path)
    with pytest.raises(ValueError, match=r"the stage a ended with status 3 .*it breaks here .*logs/a\.log"):
        failing.run()
    assert calls(tmp_path) == ["a"]
    assert "  | it breaks here" in failing.console.getvalue()
    (tmp_path / "mended").touch()
    assert runner(stages, tmp_path).plan()[0].action == "continue"
    runner(stages, tmp_path).run()
    assert calls(tmp_path) == ["a", "b", "c", "d"] and (tmp_path / "a" / "kept").exists()


def test_a_stage_that_writes_nothing_has_failed(tmp_path):
    stage = shell(tmp_path, "a", "true")
    with pytest.raises(ValueError, match="ended well, but nothing matches a/result"):
        runner([stage], tmp_path).run()
    assert runner([stage], tmp_path).plan()[0].action == "continue"


@pytest.mark.parametrize("left", ["sleep 300", "while sleep 0.1; do echo still here; done"])
def test_a_stage_has_ended_when_its_command_has(tmp_path, monkeypatch, left):
    """A worker that outlives its parent (killed for memory, say) keeps the pipe open: it is ended."""
    monkeypatch.setattr(state, "GRACE", 2.0)
    stages = [shell(tmp_path, "a", f"({left}) & echo $! > $RUN/worker; echo the end; exit 3")]
    began = time.monotonic()
    with pytest.raises(ValueError, match="the stage a ended with status 3"):
        runner(stages, tmp_path).run()
    assert time.monotonic() - began < 60 and "the end" in (tmp_path / "logs" / "a.log").read_text()
    worker = int((tmp_path / "worker").read_text())
    assert not psutil.pid_exists(worker) or psutil.Process(worker).status() == psutil.STATUS_ZOMBIE


def test_a_command_that_does_not_exist(tmp_path):
    with pytest.raises(ValueError, match="the stage a: there is no command 'no-such-program'"):
        runner([Stage("a", ("no-such-program",), {})], tmp_path).run()


def test_a_stage_whose_old_files_cannot_be_removed_is_not_started(tmp_path, monkeypatch):
    """Its command would continue them."""
    runner(chain(tmp_path), tmp_path).run()
    calls(tmp_path)

    def busy(path):
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))

    monkeypatch.setattr("shutil.rmtree", busy)
    with pytest.raises(OSError, match="busy"):
        runner(chain(tmp_path, b="9"), tmp_path).run()
    assert calls(tmp_path) == []
    monkeypatch.undo()
    runner(chain(tmp_path, b="9"), tmp_path).run()
    assert calls(tmp_path) == ["b", "c"]


def test_a_folder_that_this_run_has_not_made_is_left_alone(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "precious").write_text("x")
    with pytest.raises(ValueError, match="this run has not made it"):
        runner(chain(tmp_path), tmp_path).run()
    assert (tmp_path / "a" / "precious").read_text() == "x"


def test_a_damaged_state_says_how_to_go_on(tmp_path):
    runner(chain(tmp_path), tmp_path).run()
    state = tmp_path / STATE_FILE
    whole = state.read_text()
    record = '{"version": 1, "stages": {"a": {"status": "done", "settings": %s, "inputs": {}, "consumed": {}%s}}}'
    for damaged in (
        *(whole[: len(whole) // 2], "", "\0", "[]", "null", "1", '{"version": 1}', '{"version": 1, "stages": []}'),
        *('{"version": 1, "stages": {"a": {"status": "done"}}}', '{"version": 1, "stages": {"a": null}}'),
        *(record % ("null", ""), record % ("{}", ', "more": 1'), record % ("{}", ', "files": {"a/result": 1}')),
        *(record.replace("done", "odd") % ("{}", ""), record % ("{}", ', "digest": 7'), "[" * 100_000),
    ):
        state.write_text(damaged)
        with pytest.raises(ValueError, match=rf"{STATE_FILE} is damaged .*{PREVIOUS_FILE}"):
            runner(chain(tmp_path), tmp_path).run()
    state.write_text(whole.replace('"version": 1', '"version": 99'))
    with pytest.raises(ValueError, match="another version"):
        runner(chain(tmp_path), tmp_path).run()
    # the remedy works: one step back, the last stage is entered again
    calls(tmp_path)
    state.write_text((tmp_path / PREVIOUS_FILE).read_text())
    runner(chain(tmp_path), tmp_path).run()
    assert calls(tmp_path) == ["d"]


@pytest.mark.parametrize("content", ["", "\0", "[1]", "null", '{"x": 1}', '{"x": ["a", 2, 3]}', "[" * 100_000])
def test_damaged_notes_cost_time_only(tmp_path, content):
    """Hashes of inputs, and who holds the lock."""
    (tmp_path / "in").write_text("1")
    run_dir = tmp_path / "run"
    stages = [shell(run_dir, "a", "echo 1 > $OUT/result", inputs=[tmp_path / "in"])]
    runner(stages, run_dir).run()
    (run_dir / "input_hashes.json").write_text(content.replace("x", str(tmp_path / "in")))
    (run_dir / LOCK_FILE).write_text(content or '{"pid": "x", "born": null}')
    calls(run_dir)
    runner(stages, run_dir).run()
    assert calls(run_dir) == []


def test_a_full_disk_stops_the_run_and_harms_nothing(tmp_path, monkeypatch):
    stages = chain(tmp_path)
    runner(stages, tmp_path).run(last="a")
    before = (tmp_path / STATE_FILE).read_text()

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        runner(stages, tmp_path).run()
    assert (tmp_path / STATE_FILE).read_text() == before
    monkeypatch.undo()
    calls(tmp_path)
    runner(stages, tmp_path).run()
    assert calls(tmp_path) == ["b", "c", "d"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_stage_on_a_full_disk_fails_with_its_own_words(tmp_path):
    with pytest.raises(ValueError, match="No space left on device"):
        runner(
            [shell(tmp_path, "a", "cat /dev/zero | head -c 100 > /dev/full && echo 1 > $OUT/result || exit 1")],
            tmp_path,
        ).run()


def test_only_one_runner_at_a_time(tmp_path):
    with (
        RunLock(tmp_path).held(),
        pytest.raises(ValueError, match=rf"another runner is at work there \(process {os.getpid()}"),
    ):
        runner(chain(tmp_path), tmp_path).run()
    assert calls(tmp_path) == []
    runner(chain(tmp_path), tmp_path).run()


def test_the_lock_file_of_a_runner_that_is_gone_stops_nobody(tmp_path):
    (tmp_path / LOCK_FILE).write_text(json.dumps({"pid": 1, "born": 1.0, "host": "elsewhere"}))
    runner(chain(tmp_path), tmp_path).run()
    assert calls(tmp_path) == ["a", "b", "c", "d"]


# ---- killed

SCRIPT = """
    import sys
    from pathlib import Path
    from prefopt.pipelines.stages import Runner
    from tests.pipelines.test_stages import slow_stages
    Runner(slow_stages(Path(sys.argv[1])), Path(sys.argv[1])).run()
"""


def slow_stages(run_dir):
    """Stages that add lines to their result, one at a time, and continue where they find some."""
    count = (
        "n=$(cat $OUT/part 2>/dev/null | wc -l); while [ $n -lt 12 ]; do echo $n >> $OUT/part; n=$((n+1)); sleep "
        "0.05; done; "
    )
    return [
        shell(run_dir, "a", count + "mv $OUT/part $OUT/result"),
        shell(run_dir, "b", count + "cat $RUN/a/result $OUT/part > $OUT/result", needs=["a"]),
    ]


def start(run_dir):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), str(run_dir)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
    )


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def lines(path):
    return len(path.read_text().split()) if path.exists() else 0


@pytest.mark.parametrize("stage", ["a", "b"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_continues_to_the_same_result(tmp_path, stage, how):
    run_dir = tmp_path / "run"
    first = start(run_dir)
    wait_for(lambda: lines(run_dir / stage / "part") >= 4)
    shells = psutil.Process(first.pid).children(recursive=True)
    first.send_signal(how)
    output = first.communicate()[0] if how == signal.SIGTERM else ""
    first.wait()
    if how == signal.SIGTERM:
        assert first.returncode == 130 and "stopped by SIGTERM; the same command continues" in output
        assert not any(child.is_running() and child.status() != "zombie" for child in shells)
    second = runner(slow_stages(run_dir), run_dir)
    second.run()
    assert not any(child.is_running() and child.status() != "zombie" for child in shells)
    runner(slow_stages(tmp_path / "whole"), tmp_path / "whole").run()
    for name in "ab":
        assert (run_dir / name / "result").read_text() == (tmp_path / "whole" / name / "result").read_text()
    assert second.plan()[0].action == second.plan()[1].action == "done"


@pytest.mark.parametrize("holds_lock", [True, False])
def test_what_a_dead_stage_has_left_at_work_is_ended_as_well(tmp_path, holds_lock):
    """Runner and stage are killed; a process that the stage started, in a session of its own, lives on."""
    code = (
        f"import os, time; {'' if holds_lock else 'os.closerange(3, 1000);'} os.mkdir('{tmp_path}/at_work'); "
        "time.sleep(300)"
    )
    work = f'setsid {sys.executable} -c "{code}" & echo $! > $RUN/orphan; wait'
    stage = shell(tmp_path, "a", f"test -e $RUN/at_work || {{ {work}; }}; echo 1 > $OUT/result")
    child = os.fork()
    if child == 0:
        runner([stage], tmp_path).run()
        os._exit(0)
    wait_for((tmp_path / "at_work").exists)
    orphan = psutil.Process(int((tmp_path / "orphan").read_text()))
    stage_process = next(p for p in psutil.Process(child).children() if p.name() == "sh")
    os.kill(child, signal.SIGKILL)
    stage_process.kill()
    wait_for(lambda: psutil.Process(child).status() == psutil.STATUS_ZOMBIE)  # as where nothing waits for it
    runner([stage], tmp_path).run()
    os.waitpid(child, 0)
    assert not orphan.is_running() or orphan.status() == psutil.STATUS_ZOMBIE
    assert calls(tmp_path) == ["a", "a"]


def test_output_is_shown_line_by_line(tmp_path):
    """A Python program's prints arrive while it runs, although it writes to a pipe."""
    code = (
        "import pathlib, time\nprint('first', flush=False)\nfor _ in range(500):\n    if "
        "pathlib.Path('seen').exists(): break\n    time.sleep(0.02)\nelse: raise SystemExit('not shown')"
    )

    class Console(io.StringIO):
        def write(self, text):
            if "first" in text:
                (tmp_path / "seen").touch()
            return super().write(text)

    stage = Stage("a", ("sh", "-c", f'cd {tmp_path} && {sys.executable} -c "{code}"'), {})
    Runner([stage], tmp_path, console=Console()).run()


def test_secrets_of_a_stage_reach_its_command_and_no_file(tmp_path):
    """Of its settings, its command line, its output, and of a state that an earlier version wrote."""
    secret = "hf_aVerySecretToken1234567"
    script = "echo $0 > $RUN/../told; echo $0; env | grep MY_TOKEN; echo 1 > $OUT/result"
    plain = shell(tmp_path / "run", "a", script)
    words = (*plain.command, f"--hub_token={secret}")
    stage = dataclasses.replace(plain, command=words, settings={"script": script})
    run = runner([stage], tmp_path / "run")
    run.run()
    assert (tmp_path / "told").read_text().strip() == f"--hub_token={secret}"
    state = read_json(tmp_path / "run" / STATE_FILE)
    state["stages"]["a"]["settings"]["hub_token"] = secret
    write_json(tmp_path / "run" / STATE_FILE, state)
    (planned,) = runner([stage], tmp_path / "run").plan()
    assert planned.action == "done"
    runner([stage], tmp_path / "run").run(first="a")
    shown = run.console.getvalue() + as_script([stage]) + table([planned])
    files = {path: path.read_text() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert len(files) > 4
    for name, text in {**files, "shown": shown}.items():
        assert secret not in text, name
    assert "--hub_token=***" in shown
