"""docs/reports.md: its commands run, and the keys, files and variables that it names exist."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path

import prefopt
from prefopt import run
from prefopt.cli import main
from prefopt.files import write_json
from prefopt.pipelines.state import tracker_group
from prefopt.recipes.arguments import RunArguments
from prefopt.training import DROPPED_FILE
from tests.reports.runs import write_run

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "reports.md").read_text()


def test_its_commands_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "a", "b"):
        write_run(Path("outputs") / name)
    evaluation = {"win_rates": {}, "lengths": {}, "preference": None, "samples": [], "stop": None}
    write_json(Path("runs/my-loop/iteration-1/evaluate/evaluation.json"), evaluation)
    commands = re.findall(r"^    prefopt (report .+?)(?:  +#.*)?$", PAGE, re.M)
    assert len(commands) == 3
    for command in commands:
        assert main(shlex.split(command)) == 0, capsys.readouterr().err
    for folder in ("outputs/mine", "outputs/a-and-b", "runs/my-loop"):
        assert (Path(folder) / "report.html").is_file() and (Path(folder) / "report.md").is_file()


def test_what_it_names_exists():
    names = set(re.findall(r"`([^`\n]+)`", PAGE))
    files = {run.RECIPE_FILE, run.RUN_FILE, run.LOG_FILE, run.SAMPLES_FILE, run.TRAIN_FIGURES, run.EVAL_FIGURES}
    assert files | {run.VERSIONS_FILE, DROPPED_FILE} <= names
    assert set(tracker_group(Path("runs/x/logs/y.log"))) <= names
    assert "sample_completions: 4" in PAGE
    assert any(field.name == "sample_completions" for field in dataclasses.fields(RunArguments))
    assert "prefopt import SampleCompletionsCallback" in PAGE and prefopt.SampleCompletionsCallback
    installed = {key[1] for key in run.NEEDS_PACKAGE if key[0] == "report_to"}
    assert installed == {"wandb", "tensorboard", "trackio", "mlflow"}
    assert all(f"pip install {name}`" in PAGE for name in installed)
