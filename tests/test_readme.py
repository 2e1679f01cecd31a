"""README.md, the Makefile and the packaged files say what is there: every command parses, the notebook lines run."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import yaml

import prefopt
from prefopt.cli import COMMANDS, arguments_of, method_of
from prefopt.data import tokenize_pairs
from prefopt.launch import launch_words, split_launch_settings
from prefopt.recipes import locate, packaged_names
from prefopt.recipes.recipe import load_settings, parse_settings
from tests.tiny import tiny_tokenizer
from tests.tiny_runs import pair_rows, write_model

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
RECIPES = (ROOT / "docs" / "recipes.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


COMMAND_LINES = [
    line.partition("#")[0].strip() for block in blocks("bash") for line in block.splitlines() if line.strip()
]


def test_the_readme_has_commands_to_check():
    programs = {line.split()[0] for line in COMMAND_LINES}
    assert programs == {"make", "accelerate", "prefopt"}, programs


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_every_command_of_the_readme_can_be_started(line):
    program, *words = shlex.split(line)
    if program == "make":
        assert subprocess.run(["make", "--dry-run", *words], cwd=ROOT, capture_output=True).returncode == 0
        return
    if program == "accelerate":
        assert words[:2] == ["launch", "--config_file"] and (ROOT / words[2]).is_file()
        script = (ROOT / words[3]).read_text()
        name, words = re.search(r'script\("(.*)"\)', script)[1], words[4:]
    else:
        name, words = words[0], words[1:]
    recipe_name, settings = load_settings(words)
    launch, settings = split_launch_settings(settings)
    launch_words(launch)
    method = method_of(list(settings)) if name == "check" else name
    recipe = parse_settings(recipe_name, settings, arguments_of(method))
    assert recipe.values["output_dir"]


def test_the_notebook_lines_run(tmp_path, monkeypatch):
    (source,) = blocks("python")
    assert len(source.splitlines()) == 5
    write_model(tmp_path / "model")
    rows = datasets.Dataset.from_list(pair_rows(4))
    # only what would be downloaded is replaced, and where the model is saved
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: rows)
    source = source.replace('"Qwen/Qwen2.5-0.5B-Instruct"', repr(str(tmp_path / "model")))
    options = "max_steps=1, use_cpu=True, bf16=False, save_strategy='no', report_to='none', disable_tqdm=True"
    source = source.replace('WPOConfig("out")', f"WPOConfig({str(tmp_path / 'out')!r}, {options})")
    names: dict = {}
    exec(compile(source, "README.md", "exec"), names)
    assert names["trainer"].state.global_step == 1


def test_the_row_of_the_readme_is_accepted():
    (text,) = blocks("json")
    row = ast.literal_eval(text)
    assert set(row) == {"prompt", "chosen", "rejected"}
    kept, report = tokenize_pairs(datasets.Dataset.from_list([row]), tiny_tokenizer(), max_length=None)
    assert len(kept) == 1 and report.rows_kept == 1


def test_every_name_of_the_readme_exists():
    for command in re.findall(r"`prefopt ([a-z-]+)`", README):
        assert command in COMMANDS
    for trainer in re.findall(r"`(\w+Trainer)`", README):
        assert getattr(prefopt, trainer).__name__ == trainer
    for link in re.findall(r"\]\((?!http)([^)]*)\)", README):
        assert (ROOT / link).exists(), link
    assert README.count("\n") <= 150
    recipes_table = RECIPES.split("## The packaged recipes")[1].split("\n## ")[0]
    recipes = set(packaged_names("training_configs"))
    for pattern in re.findall(
        r"`([\w./*-]+)`", " ".join(re.findall(r"^\| (`.*?) \|", recipes_table, flags=re.MULTILINE))
    ):
        assert any(Path(name).match(pattern) for name in recipes), pattern
    hardware = RECIPES.split("| accelerate config |")[1].split("\n\n")[0]
    for name in re.findall(r"`((?:cpu|single|multi|deepspeed|fsdp)\w+)`", hardware):
        assert locate(name, "accelerate_configs").is_file()


def test_the_methods_table_lists_every_method():
    table = README.split("## Methods")[1].split("\n## ")[0]
    for name, command in COMMANDS.items():
        if command.is_method:
            assert f"`prefopt {name}`" in table and f"`{command.function}`" in table
            assert importlib.import_module(command.module)


def test_the_file_tree_is_up_to_date():
    done = subprocess.run([sys.executable, "docs/file_tree.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_reading_list_is_true():
    """The functions that a row passes on its way to the loss, found by running it, are those that the page lists."""
    command = [sys.executable, "docs/reading_list.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_ci_calls_the_same_targets():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    jobs = {name: job for name, job in workflow["jobs"].items() if name != "audit"}
    steps = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert steps == [
        "make setup",
        "make quality",
        "make test",
        "make quickstart",
        "make ${{ matrix.target }}",
        ".ci/run",
    ]
    for target in workflow["jobs"]["versions"]["strategy"]["matrix"]["target"]:
        assert re.search(rf"^[\w -]*\b{target}\b[\w -]*:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for step in steps[:4]:
        assert f"\n{step.split()[1]}: " in (ROOT / "Makefile").read_text()
    script = (ROOT / ".ci" / "run").read_text()
    for target in ("quality", "test", "quickstart"):
        assert f" make {target}\n" in script
