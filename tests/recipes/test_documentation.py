"""docs/recipes.md: its commands parse, and the keys, configs and recipes it names exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from prefopt.cli import arguments_of, method_of
from prefopt.launch import LAUNCH_KEYS, launch_words, split_launch_settings
from prefopt.recipes import packaged_names
from prefopt.recipes.legacy import LEGACY_KEYS
from prefopt.recipes.recipe import load_settings, parse_settings

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "recipes.md").read_text()
COMMANDS = [line for block in re.findall(r"^```bash\n(.*?)^```$", TEXT, re.M | re.S) for line in block.splitlines()]


@pytest.mark.parametrize("line", COMMANDS)
def test_commands(line):
    words = shlex.split(line)
    if words[0] == "accelerate":
        assert (ROOT / words[3]).is_file()
        assert words[4] == "scripts/run_wpo.py"
        words = ["prefopt", "wpo", *words[5:]]
    name, settings = load_settings(words[2:])
    launch, settings = split_launch_settings(settings)
    launch_words(launch)
    method = method_of(settings) if words[1] == "check" else words[1]
    assert parse_settings(name, settings, arguments_of(method)).values["output_dir"]


def test_accelerate_configs():
    table = TEXT.split("| accelerate config |")[1].split("\n\n")[0]
    named = set(re.findall(r"`(\w+)`", "".join(row.split("|")[1] for row in table.splitlines()[2:])))
    assert named - {"use_cpu"} == set(packaged_names("accelerate_configs"))


def test_recipes():
    recipes = packaged_names("training_configs")
    for name in ("llama3/wpo_hb_v2", "gemma2/sppo_27b", "mistral", "llama3_instruct", "quickstart"):
        assert f"`{name}" in TEXT
        assert name in recipes


def test_keys():
    fields = {name for cls in arguments_of("wpo") for name in cls.__dataclass_fields__}
    for row in re.findall(r"^\| (`[a-z_`, ]+`) \|", TEXT, re.M):
        for key in re.findall(r"`(\w+)`", row):
            named = set(packaged_names("accelerate_configs")) | set(packaged_names("training_configs"))
            assert key in fields | LEGACY_KEYS | named | {"mistral", "llama3", "gemma2"}, key
    for key in re.findall(r"`--(\w+)`", TEXT):
        assert key in fields | LAUNCH_KEYS | {"flag"}, key
