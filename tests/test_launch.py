"""Starting on several processes: which words go to the launcher, and what the user reads when it fails."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from accelerate.commands import launch as accelerate_launch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from prefopt import files, launch
from prefopt.cli import main
from prefopt.recipes.source import Setting
from tests.tiny_runs import tiny_recipe, write_model, write_pairs

TYPED = "the command line"


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)


def settings(**values):
    return [Setting(key, value, TYPED, 1) for key, value in values.items()]


def test_launcher_settings_are_taken_out():
    found, rest = launch.split_launch_settings(settings(num_processes="8", beta="1", accelerate_config="fsdp2"))
    assert found == {"num_processes": "8", "accelerate_config": "fsdp2"}
    assert [setting.key for setting in rest] == ["beta"]


def test_under_a_launcher_they_are_an_error_on_the_command_line_only(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ValueError, match="a launcher has already started this process"):
        launch.split_launch_settings(settings(num_processes="8"))
    in_recipe = [Setting("num_processes", 8, "recipe.yaml, line 3", 0), *settings(beta="1")]
    assert launch.split_launch_settings(in_recipe) == ({}, settings(beta="1"))


def test_words_for_the_processes():
    words = ["llama3/wpo", "--num_processes", "8", "--beta", "1", "--accelerate-config=fsdp2", "--loss_type", "a", "b"]
    assert launch.without_launch_words(words) == ["llama3/wpo", "--beta", "1", "--loss_type", "a", "b"]


def test_words_for_the_launcher():
    words = launch.launch_words(
        {"num_processes": "4", "accelerate_config": "deepspeed_zero3", "main_process_port": "0"}
    )
    assert Path(words[1]).name == "deepspeed_zero3.yaml"
    assert words[2:] == ["--num_processes", "4", "--main_process_port", "0"]
    assert Path(launch.launch_words({"num_processes": "4"})[1]).name == "multi_gpu.yaml"
    assert Path(launch.launch_words({"num_processes": "1"})[1]).name == "single_gpu.yaml"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_processes": "many"}, "--num_processes must be a whole number, found 'many'"),
        ({"num_processes": "0"}, "--num_processes must be at least 1"),
        ({"num_machines": "0"}, "--num_machines must be at least 1"),
        ({"num_processes": "9", "num_machines": "2"}, "9 cannot be divided over --num_machines 2"),
        ({"accelerate_config": "deepspeed_zero4"}, r"did you mean deepspeed_zero"),
    ],
)
def test_bad_launcher_settings(given, message):
    with pytest.raises(ValueError, match=message):
        launch.launch_words(given)


def fails(error):
    def run(arguments):
        run.arguments = arguments
        raise error

    return run


def test_the_processes_status_is_ours_without_the_launchers_report(monkeypatch):
    failures = {0: ProcessFailure(0, 1, 2, "<none>"), 1: ProcessFailure(1, 2, -15, "<none>")}
    run = fails(ChildFailedError("prefopt", failures))
    monkeypatch.setattr(accelerate_launch, "launch_command", run)
    assert launch.launch({"num_processes": "2"}, ["wpo", "recipe.yaml", "--beta", "1"]) == 2
    assert run.arguments.module
    assert (run.arguments.training_script, run.arguments.training_script_args) == (
        "prefopt",
        ["wpo", "recipe.yaml", "--beta", "1"],
    )
    monkeypatch.setattr(accelerate_launch, "launch_command", fails(subprocess.CalledProcessError(1, "python")))
    assert launch.launch({"num_processes": "1"}, ["wpo"]) == 1


def test_only_the_first_process_speaks(monkeypatch, capsys):
    launch.print_on_main("hello")
    monkeypatch.setenv("RANK", "1")
    launch.print_on_main("hello again")
    assert capsys.readouterr().err == "prefopt: hello\n"


def trains_for_long(folder: Path) -> Path:
    """A recipe that trains for minutes."""
    model, data = write_model(folder / "model"), write_pairs(folder / "data", {"train": 8})
    return tiny_recipe(folder, model, data, max_steps=100_000, save_strategy="steps", save_steps=3)


def started(words: list[str], *, launcher: bool) -> subprocess.Popen[str]:
    """A training in two processes through `accelerate launch`, or in one."""
    config = Path(__file__).resolve().parents[1] / "accelerate_configs" / "cpu_ddp_2ranks.yaml"
    start = ["-m", "accelerate.commands.launch", "--config_file", str(config), "--main_process_port", "0"]
    return subprocess.Popen(
        [sys.executable, *(start if launcher else []), "-m", "prefopt", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )


def wait_for(condition, process: subprocess.Popen[str], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_both_ranks_end_within_seconds_of_a_killed_launcher_and_the_run_goes_on(tmp_path):
    """And a second run is stopped while the first is at work, with one line."""
    recipe = trains_for_long(tmp_path)
    first = started(["wpo", str(recipe)], launcher=True)
    wait_for(lambda: list((tmp_path / "out").glob("checkpoint-*/trainer_state.json")), first)
    ranks = psutil.Process(first.pid).children(recursive=True)
    assert len(ranks) >= 2
    second = started(["wpo", str(recipe), "--resume_from_checkpoint", "true"], launcher=False)
    output = second.communicate()[0]
    assert second.returncode == 2 and "out: another command is at work there" in output.splitlines()[-1]
    first.kill()
    _, alive = psutil.wait_procs(ranks, timeout=10)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
    first.communicate()
    begun = max(int(path.name.split("-")[1]) for path in (tmp_path / "out").glob("checkpoint-*"))
    more = ["--resume_from_checkpoint", "true", "--max_steps", str(begun + 3)]
    third = started(["wpo", str(recipe), *more], launcher=True)
    output = third.communicate()[0]
    assert third.returncode == 0, output[-3000:]
    assert (tmp_path / "out" / "model.safetensors").exists() and not (tmp_path / "out" / "_lock").exists()


def test_a_run_holds_the_lock_of_its_folder_and_leaves_nothing_after_a_mistake(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(files, "LOCK_WAIT", 0.2)
    model, data = write_model(tmp_path / "model"), write_pairs(tmp_path / "data", {"train": 4})
    recipe = tiny_recipe(tmp_path, model, data, output_dir=str(tmp_path / "runs" / "out"))
    with files.locked(tmp_path / "runs" / "out", name="_lock", remove=True):
        assert main(["wpo", str(recipe)]) == 2
    assert "another command is at work there" in capsys.readouterr().err
    (tmp_path / "runs" / "out").rmdir()
    (tmp_path / "runs").rmdir()
    assert main(["wpo", str(recipe), "--model_name_or_path", str(tmp_path / "absent")]) == 2
    assert not (tmp_path / "runs").exists()


def test_a_process_ends_when_its_launcher_has(monkeypatch, capsys):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(os, "getppid", lambda: launch.PARENT + 1)
    launch.check_launcher()
    assert not ended  # nothing launched it: it may outlive its shell
    monkeypatch.setenv("LOCAL_RANK", "0")
    launch.check_launcher()
    assert ended == [launch.LAUNCHER_ENDED] and "the launcher" in capsys.readouterr().err


def test_a_file_system_without_locks_is_named_and_does_not_stop_the_run(tmp_path, monkeypatch, capsys):
    def no_locks(*args):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr("fcntl.flock", no_locks)
    with files.locked(tmp_path):
        pass
    assert "no locks here" in capsys.readouterr().err
