"""The harness that kills commands: it sees what is unequal; and docs/reliability.md names what exists."""

from __future__ import annotations

import re
from pathlib import Path

from prefopt.cli import COMMANDS
from prefopt.files import write_json
from tests.faults.commands import differences, every_command, hashes, stages, without_times

ROOT = Path(__file__).resolve().parents[2]


def test_what_is_unequal_is_named_and_times_are_not_compared(tmp_path):
    for name, text in (("whole", "1"), ("end", "2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text(text)
    assert len(differences(hashes(tmp_path / "whole", "train.*"), hashes(tmp_path / "end", "train.*"))) == 1
    assert not differences(hashes(tmp_path / "whole", "*"), hashes(tmp_path / "whole", "*"))
    assert differences({"log": [1.0]}, {}) and differences({}, {"log": [1.0]})
    log = [{"loss": 1.0, "train_runtime": 3.0, "perf/updates_lost": 0.1, "step": 1}]
    assert without_times(log) == [{"loss": 1.0, "step": 1}]
    write_json(tmp_path / "state.json", {"stages": {"a": {"status": "done", "files": {"a/x": [1, 2, "hash"]}}}})
    assert stages(tmp_path) == {"a": ["done", {"a/x": "hash"}]}


def test_every_command_that_is_killed_exists():
    commands = every_command(Path("inputs"))
    for name, command in commands.items():
        words = command.words(Path("run"))
        assert words[0] in COMMANDS, name
    assert {"generate", "rank", "build-pairs", "score-references", "train", "pipeline", "sweep"} <= set(commands)


def test_the_page_names_tests_that_exist():
    page = (ROOT / "docs" / "reliability.md").read_text()
    paths = set(re.findall(r"`(tests/[\w/]+\.py)`", page))
    assert len(paths) > 5 and all((ROOT / path).exists() for path in paths), paths
    named = set(re.findall(r"^\| `([\w-]+)` \|", page.split("## Kills")[1], re.M))
    assert named == set(every_command(Path("inputs")))
