"""Starting on several processes: which words go to the launcher, and what the user reads when it fails."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from accelerate.commands import launch as accelerate_launch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from prefopt import launch
from prefopt.recipes.source import Setting

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
