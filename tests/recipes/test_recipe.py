"""Recipes and the command line together: sources, their order, and the lines that users read."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import pytest
import yaml

from prefopt.cli import arguments_of
from prefopt.files import parse_yaml
from prefopt.recipes import build, read_recipe
from prefopt.recipes.recipe import resolved_yaml
from prefopt.recipes.source import split_recipe


@dataclass
class Training:
    beta: float = 0.1
    learning_rate: float = 1e-6
    loss_type: list[str] = field(default_factory=lambda: ["sigmoid"])
    use_cpu: bool = False
    warmup_steps: float = 0
    gradient_accumulation_steps: int = 1
    run_name: str | None = None
    hub_token: str | None = None
    resume_from_checkpoint: str | None = None

    def __post_init__(self):
        if self.beta <= 0:
            raise ValueError("beta must be positive.")


@dataclass
class Data:
    dataset_name: str | None = None
    dataset_test_split: str | None = None
    dataset_mixer: dict[str, float] | None = None
    dataset_splits: list[str] | None = None
    test_split_size: float | None = None
    global_batch_size: int | None = None


BOTH = (Training, Data)


def write(path, text):
    path.write_text(text)
    return str(path)


def values(*words):
    return read_recipe(list(words), BOTH).values


def problem(*words):
    with pytest.raises(ValueError, match=r".") as error:
        build(read_recipe(list(words), BOTH), BOTH)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_command_line_wins_in_both_spellings(tmp_path):
    recipe = write(tmp_path / "a.yaml", "beta: 0.5\nlearning_rate: 1e-6\nloss_type: sigmoid\n")
    assert values(recipe, "--beta", "0.01", "--learning-rate=5e-7") == {
        "beta": 0.01,
        "learning_rate": 5e-7,
        "loss_type": ["sigmoid"],
    }


def test_recipe_by_config_flag(tmp_path):
    recipe = write(tmp_path / "a.yaml", "beta: 0.5\n")
    assert values("--config", recipe, "--use_cpu") == {"beta": 0.5, "use_cpu": True}
    assert values("--use_cpu", "--config=" + recipe) == {"beta": 0.5, "use_cpu": True}


def test_two_recipes_are_refused():
    with pytest.raises(ValueError, match=r"two recipes: a\.yaml and --config"):
        split_recipe(["a.yaml", "--config", "b.yaml"])


def test_several_words_and_negative_numbers():
    assert values("--loss_type", "sigmoid", "sft", "--warmup_steps", "-1")["loss_type"] == ["sigmoid", "sft"]
    assert values("--warmup_steps", "-1")["warmup_steps"] == -1


def test_base_recipes_in_order(tmp_path):
    write(tmp_path / "base.yaml", "beta: 0.5\nlearning_rate: 1\nrun_name: base\n")
    write(tmp_path / "other.yaml", "learning_rate: 2\n")
    recipe = write(tmp_path / "a.yaml", "base_recipe: [base.yaml, other.yaml]\nrun_name: top\n")
    assert values(recipe, "--beta", "3") == {"beta": 3.0, "learning_rate": 2.0, "run_name": "top"}


def test_base_recipe_in_a_circle(tmp_path):
    write(tmp_path / "a.yaml", "base_recipe: b.yaml\n")
    write(tmp_path / "b.yaml", "base_recipe: a.yaml\n")
    assert "leads back to this file" in problem(str(tmp_path / "a.yaml"))


def test_env_is_set_before_anything_else(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFOPT_TEST_VARIABLE", "old")
    recipe = write(tmp_path / "a.yaml", "env:\n  PREFOPT_TEST_VARIABLE: 7\nbeta: 1\n")
    assert values(recipe) == {"beta": 1.0}
    assert os.environ["PREFOPT_TEST_VARIABLE"] == "7"


def test_a_later_way_of_saying_it_replaces_an_earlier(tmp_path):
    recipe = write(
        tmp_path / "a.yaml", "dataset_mixer: {old: 1.0}\ndataset_splits: [train_prefs]\nglobal_batch_size: 64\n"
    )
    read = read_recipe([recipe, "--dataset_name", "new", "--gradient_accumulation_steps", "4"], BOTH)
    assert read.values == {"dataset_name": "new", "gradient_accumulation_steps": 4}
    assert any("dataset_name replaces dataset_mixer" in notice for notice in read.notices)


def test_a_hold_out_replaces_the_recipes_test_split(tmp_path):
    recipe = write(tmp_path / "a.yaml", "dataset_name: x\ndataset_test_split: test\n")
    assert values(recipe, "--test_split_size", "0.1") == {"dataset_name": "x", "test_split_size": 0.1}


def test_problems_name_file_line_and_nearest_key(tmp_path):
    recipe = write(tmp_path / "a.yaml", "beta: 0.5\n\nlearning_rte: 1\n")
    assert problem(recipe) == f"{recipe}, line 3: unknown key 'learning_rte'; did you mean 'learning_rate'?"
    assert problem("--beat", "1") == "the command line: unknown key 'beat'; did you mean 'beta'?"
    wrong = write(tmp_path / "b.yaml", "learning_rate: fast\n")
    assert problem(wrong) == f"{wrong}, line 1: learning_rate: expected a number, found 'fast'."


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("- beta\n", "must hold `key: value` lines"),
        ("beta: [1\n", "is not valid YAML"),
        ("beta: 1\nbeta: 2\n", "line 2: 'beta' was already given in line 1"),
        ("dataset_mixer:\n  a: 1\n  b: 1\n  a: 0.5\n", "line 4: 'a' was already given in line 2"),
        ("datasets: [{path: a,\n path: b}]\n", "line 2: 'path' was already given in line 1"),
        ("env: 3\n", "env must map names"),
        ("env: {'': 1}\n", "env: '' cannot be an environment variable"),
        ("env: {a=b: 1}\n", "env: 'a=b' cannot be an environment variable"),
        ("base_recipe: 3\n", "base_recipe must name a recipe"),
        ("dataset_name: a\ndataset_mixer: {b: 1}\n", "two ways to say one thing"),
        ("warmup_ratio: 0.1\nwarmup_steps: 10\n", "warmup_steps is given twice"),
        ("beta: -1\n", "beta must be positive."),
        ("beta: .nan\n", "line 1: beta: expected a number, found nan"),
    ],
)
def test_bad_files(tmp_path, text, message):
    assert message in problem(write(tmp_path / "a.yaml", text))


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join(9 * [f'*{old}'])}]\n" for old, new in zip("abcdefghi", "bcdefghij")
)
CHAIN = "k0: &k0 [x]\n" + "".join(f"k{i + 1}: &k{i + 1} [*k{i}]\n" for i in range(80))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("beta: 1\nrun_name: @x\n", "a.yaml is not valid YAML (line 2, column 11): "),
        ("beta: 1\nrun_name: [a\nloss_type: b\n", "line 3, column 10"),
        ("run_name: a: b\n", "line 1, column 12"),
        ("beta: \x07\n", "a.yaml is not valid YAML: unacceptable character"),
        ("beta: 1\n---\nbeta: 2\n", "line 2"),
        ("beta: 1\nloss_type: &x [a, *x]\n", "line 2: an alias stands within its own anchor"),
        ("dataset_mixer: &x {a: *x}\n", "line 1: an alias stands within its own anchor"),
        ("loss_type: *nowhere\n", "undefined alias"),
        (LAUGHS, "more than 100,000 values once its aliases are written out"),
        (CHAIN, "more than 50 levels once its aliases are written out"),
        ("loss_type: " + 60 * "[" + 60 * "]" + "\n", "more than 50 levels"),
        ("loss_type: " + 5000 * "[" + "\n", "nested too deeply"),
        ("loss_type: " + 5000 * "{a: ", "nested too deeply"),
        ("beta: 1\nrun_name: !!timestamp x\n", "line 2: 'x' cannot have the tag tag:yaml.org,2002:timestamp"),
        ("run_name: !!python/object:os.system x\n", "line 1: 'x' cannot have the tag"),
        ("run_name: !mine x\n", "line 1: 'x' cannot have the tag !mine"),
        ("beta: !!int x\n", "line 1: 'x' cannot have the tag"),
        ("beta: !!bool x\n", "line 1: 'x' cannot have the tag"),
        ("loss_type: !!set {a, b}\n", "line 1: the tag tag:yaml.org,2002:set is not allowed"),
        ("beta: " + 5000 * "9" + "\n", "is no number: Exceeds the limit"),
        ("beta: 0x_\n", "line 1: '0x_' is no number"),
        ("? [a, b]\n: c\n", "line 1: a key must be text"),
        ("dataset_mixer:\n  ? {a: 1}\n  : 2\n", "line 2: a key must be text"),
        ("!!timestamp x: 1\n", "line 1: 'x' cannot have the tag"),
        ("beta: 1\n\non: 3\n", "a.yaml, line 3: unknown key 'on'"),
        ("loss_type: <<\n", "not valid YAML (line 1"),
        ("<<: 3\n", "not valid YAML (line 1"),
    ],
)
def test_yaml_that_is_no_recipe(tmp_path, text, message):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    found = problem(str(path))
    assert message in found
    assert str(path) in found


def test_files_that_are_no_text(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"beta: \xff\xfe\n")
    assert "a.yaml is not a text file in UTF-8" in problem(str(tmp_path / "a.yaml"))


def test_dates_and_names_are_text(tmp_path):
    recipe = write(tmp_path / "a.yaml", "run_name: 2024-05-01\ndataset_mixer: {no: 1, on: 0.5, null: 1, 7: 1}\n")
    assert values(recipe) == {"run_name": "2024-05-01", "dataset_mixer": {"no": 1, "on": 0.5, "null": 1, "7": 1}}
    assert values("--run_name", "2024-99-99", "--dataset_mixer", "{=: 1}") == {
        "run_name": "2024-99-99", "dataset_mixer": {"=": 1},
    }  # fmt: skip


def test_aliases_that_end_are_fine(tmp_path):
    text = "dataset_mixer: &x {a: 1}\ndatasets: [{<<: *x, b: 2}]\n"
    recipe = write(tmp_path / "a.yaml", text.splitlines()[0] + "\n")
    assert values(recipe) == {"dataset_mixer": {"a": 1}}
    (tmp_path / "b.yaml").write_text(text)
    assert parse_yaml(text, "x")[0]["datasets"] == [{"a": 1, "b": 2}]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--dataset_mixer={a: 1", "the command line: dataset_mixer: the value is not valid YAML (line 1, column 6)"),
        ("--dataset_mixer={a: @x}", "column 5"),
        ("--dataset_mixer={a: &x {b: *x}}", "an alias stands within its own anchor"),
        ("--dataset_mixer={a: !!timestamp x}", "cannot have the tag"),
        ("--dataset_mixer=" + 4000 * "{a: ", "nested too deeply"),
        ("--loss_type=[a, b", "the command line: loss_type: the value is not valid YAML"),
        ("--loss_type=[1]/model", "the value is not valid YAML"),
        ("--dataset_mixer={a: 1, a: 2}", "'a' was already given in line 1"),
        ("--beta=@x", "expected a number, found '@x'"),
    ],
)
def test_words_that_are_no_yaml(word, message):
    found = problem(word)
    assert message in found
    assert len(found) < 400


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["no_such.yaml"], "neither a file nor one of the packaged training_configs"),
        (["/no/such.yaml"], "/no/such.yaml does not exist"),
        (["/tmp"], "is a folder"),
        (["--beta", "1", "--beta=2"], "--beta is given twice"),
        (["--beta"], "--beta needs a value"),
        (["--", "x"], "belongs to no key"),
        (["--config"], "--config needs the path"),
    ],
)
def test_bad_words(words, message):
    assert message in problem(*words)


def test_resolved_recipe_reads_back_as_itself_without_secrets(tmp_path):
    recipe = read_recipe(["--beta", "0.3", "--hub_token", "secret", "--dataset_mixer", "{a: 0.5}"], BOTH)
    text = resolved_yaml(recipe, BOTH)
    assert "secret" not in text
    again = read_recipe([write(tmp_path / "r.yaml", text)], BOTH)
    expected = build(recipe, BOTH)
    expected[0].hub_token = None
    assert build(again, BOTH) == expected
    assert yaml.safe_load(text)["learning_rate"] == 1e-6  # defaults are written down as well


def test_resume_takes_a_path_or_true(tmp_path):
    assert values("--resume_from_checkpoint")["resume_from_checkpoint"] is True
    assert values("--resume_from_checkpoint", "out/checkpoint-3")["resume_from_checkpoint"] == "out/checkpoint-3"


def test_null_is_no_second_way_of_saying_a_thing(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("global_batch_size: null\ngradient_accumulation_steps: 4\noutput_dir: out\n")
    recipe = read_recipe([str(path)], arguments_of("wpo"))
    assert recipe.values["gradient_accumulation_steps"] == 4 and recipe.values["global_batch_size"] is None
