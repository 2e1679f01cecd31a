"""docs/evaluation.md: its commands and its suite are accepted, and the keys that it names exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from prefopt.candidates.generate import GenerateArguments
from prefopt.cli import COMMANDS, arguments_of, with_current_names
from prefopt.evaluation import lm_eval
from prefopt.evaluation.settings import KINDS, JudgeSettings
from prefopt.evaluation.suite import SuiteArguments, suite_entries
from prefopt.launch import LAUNCH_KEYS
from prefopt.recipes.recipe import build, load_settings, parse_settings

TEXT = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.M | re.S)


COMMAND_LINES = [line for block in blocks("bash") for line in block.splitlines()]


@pytest.mark.parametrize("line", [line for line in COMMAND_LINES if "suite.yaml" not in line])
def test_commands(line, monkeypatch):
    monkeypatch.setattr(lm_eval, "import_lm_eval", lambda: None)
    words = shlex.split(line)
    assert words[0] == "prefopt" and words[1] in COMMANDS
    name, settings = load_settings(words[2:])
    classes = arguments_of(words[1])
    build(parse_settings(name, with_current_names(words[1], settings), classes), classes)


def test_the_suite():
    (text,) = blocks("yaml")
    entries = suite_entries(SuiteArguments(**yaml.safe_load(text)))
    assert len(entries) == 9 and entries[-1].settings.annotations == "results/sppo/annotations.json"


def test_kinds_and_keys():
    assert set(re.findall(r"^\| `([a-z][a-z-]+)` \|", TEXT, re.M)) == set(KINDS)
    known = {name for cls in (SuiteArguments, GenerateArguments, JudgeSettings) for name in cls.__dataclass_fields__}
    for key in re.findall(r"`--(\w+)", TEXT):
        assert key in known | LAUNCH_KEYS, key


def test_the_python_snippet():
    (code,) = blocks("python")
    compile(code, "docs/evaluation.md", "exec")
