"""Older recipes: every key is read as what it means today, with one notice each, and the run works."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from prefopt.cli import arguments_of, main
from prefopt.files import read_jsonl, write_jsonl
from prefopt.recipes import build, read_recipe
from tests.recipes import legacy_recipes
from tests.tiny_runs import write_model, write_pairs


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = write_pairs(tmp_path_factory.mktemp("data"), {"train_prefs": 8, "test_prefs": 4})
    for path in folder.iterdir():  # the columns of the SPPO repository, which other methods leave alone
        probabilities = {"chosen_probs": 0.8, "chosen_probs_win": 0.7, "chosen_probs_lose": 0.3}
        write_jsonl(path, [row | probabilities for row in read_jsonl(path)])
    return folder


def read(tmp_path, command, text, *words):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return read_recipe([str(path), *words], arguments_of(command))


def test_notices_and_values(tmp_path):
    recipe = read(tmp_path, "wpo", legacy_recipes.WPO)
    assert len(recipe.notices) == 4  # torch_dtype, preprocessing_num_workers, evaluation_strategy, warmup_ratio
    assert [notice.count("is an older key") for notice in recipe.notices] == [1] * 4
    expected = {
        "dtype": "float32",
        "dataset_num_proc": 12,
        "eval_strategy": "steps",
        "warmup_steps": 0.1,
        "max_prompt_length": 1800,
    }
    assert {key: recipe.values[key] for key in expected} == expected
    assert not {"torch_dtype", "preprocessing_num_workers", "evaluation_strategy", "warmup_ratio"} & set(recipe.values)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("use_flash_attention_2: true", {"attn_implementation": "flash_attention_2"}),
        ("use_flash_attention_2: false", {}),
        ("torch_dtype: bfloat16", {"dtype": "bfloat16"}),
        ("torch_dtype: torch.float16", {"dtype": "float16"}),
        ("warmup_ratio: 0", {"warmup_steps": 0.0}),
        ("no_cuda: true", {"use_cpu": True}),
        ("hub_model_revision: v2", {"hub_revision": "v2"}),
        ("save_safetensors: true", {}),
        ("auto_insert_empty_system_msg: false", {}),
        ("label_pad_token_id: -100", {}),
        ("gamma_beta_ratio: 0.3", {"gamma_beta_ratio": 0.3, "loss_type": ["simpo"]}),
        ("gamma_beta_ratio: 0.3\nloss_type: hinge", {"gamma_beta_ratio": 0.3, "loss_type": ["hinge"]}),
        ("gamma_beta_ratio: 0.3\nsft_weight: 0", {"gamma_beta_ratio": 0.3, "loss_type": ["simpo"]}),
        ("do_eval: 'no'\neval_strategy: no", {"do_eval": False, "eval_strategy": "no"}),
        ("overwrite_output_dir: true", {"overwrite_output_dir": True}),
    ],
)
def test_single_keys(tmp_path, old, new):
    assert read(tmp_path, "dpo", old + "\n").values == new


@pytest.mark.parametrize(
    ("old", "message"),
    [
        ("warmup_ratio: 5", "expected a share of the steps below 1, found 5"),
        ("warmup_ratio: much", "expected a number, found 'much'"),
        ("torch_dtype: double", "expected one of auto, bfloat16, float16, float32"),
        ("reference_free: true", "only False is possible"),
        ("auto_insert_empty_system_msg: true", "only False is possible"),
        ("rpo_alpha: 0.2", "write loss_type: [sigmoid, sft]"),
        ("max_completion_length: 256", "set max_length and max_prompt_length"),
        ("sft_weight: 0.1", "write loss_type: [simpo, sft] and loss_weights: [1, SFT_WEIGHT]"),
        ("streaming: true", "only False is possible"),
        ("truncation_side: right", "only left is possible"),
        ("warmup_ratio: 0.1\nwarmup_steps: 3", "given twice"),
    ],
)
def test_meaningless_values(tmp_path, old, message):
    with pytest.raises(ValueError, match=r"recipe\.yaml, line") as error:
        read(tmp_path, "dpo", old + "\n")
    assert message in str(error.value)


def test_command_line_wins_over_older_names(tmp_path):
    words = ["--torch_dtype", "float16", "--warmup_steps=7", "--eval_strategy", "no"]
    values = read(tmp_path, "wpo", legacy_recipes.WPO, *words).values
    assert (values["dtype"], values["warmup_steps"], values["eval_strategy"]) == ("float16", 7.0, "no")


def test_adapter_recipe_is_understood(tmp_path):
    recipe = read(tmp_path, "dpo", legacy_recipes.HANDBOOK_QLORA, "--use_cpu", "true")
    config, data_args, model_args, _ = build(recipe, arguments_of("dpo"))
    assert (model_args.lora_r, model_args.load_in_4bit, model_args.dtype) == (128, True, "bfloat16")
    assert config.optim == "paged_adamw_32bit"
    assert [source.split for source in data_args.resolve(evaluates=True, seed=1).test] == ["test_prefs"]


@pytest.mark.parametrize("name", legacy_recipes.RECIPES)
def test_runs_with_model_data_and_hardware_replaced(tmp_path, model, data, name, capsys):
    command, text, words = legacy_recipes.RECIPES[name]
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    output = tmp_path / "out"
    source = (
        f"--dataset_mixture={{datasets: [{{id: {data}, split: train_prefs, columns: [prompt, chosen, rejected]}}], "
        "test_split_size: 2}"
        if "dataset_mixture" in text
        else f"--dataset_mixer={{{data}: 1.0}}"
    )
    hardware = [
        "--use_cpu",
        "true",
        "--bf16=false",
        "--attn_implementation=sdpa",
        "--dataset_num_proc=none",
        "--max_steps=1",
    ]
    status = main(
        [command, str(path), f"--model_name_or_path={model}", source, *hardware, f"--output_dir={output}", *words]
    )
    assert status == 0, capsys.readouterr().err
    printed = capsys.readouterr()
    assert (output / "model.safetensors").exists()
    resolved = yaml.safe_load((output / "recipe.yaml").read_text())
    losses = {"simpo": ["simpo"], "simpo-gemma": ["simpo"], "sppo": ["sppo"], "handbook-apo": ["apo_zero"]}
    assert resolved["loss_type"] == losses.get(name, ["sigmoid"])
    assert resolved["warmup_steps"] == 0.1
    assert "warmup_ratio is an older key" in printed.err
    assert (output / "eval_results.json").exists() == (
        name not in ("sppo", "handbook-apo")
    )  # which say do_eval: false


PAGE = (Path(__file__).parents[2] / "docs" / "how_to" / "migrating.md").read_text(encoding="utf-8")
# section of the page -> the file that its command names, and what decides the run in it
ROUTES = {
    "From the alignment handbook": (legacy_recipes.HANDBOOK, {"loss_type": ["sigmoid"], "epochs": 2}),
    "From SimPO": (legacy_recipes.SIMPO, {"loss_type": ["simpo"], "epochs": 2, "gamma_beta_ratio": 0.3}),
    "From SPPO": (legacy_recipes.SPPO, {"loss_type": ["sppo"], "epochs": 1, "optim": "rmsprop", "beta": 0.001}),
    "From WPO": (legacy_recipes.WPO, {"loss_type": ["sigmoid"], "epochs": 2, "use_weighting": True}),
}


def conversations(row):
    """A row as these projects publish it: the question as text, and whole conversations."""
    question = row["prompt"]
    return row | {"prompt": question[0]["content"]} | {side: question + row[side] for side in ("chosen", "rejected")}


@pytest.mark.parametrize("section", ROUTES)
def test_a_route_of_the_page_is_checked_and_trained(tmp_path, model, data, section, capsys):
    """The command and the lines that the page gives, on the file that it names, with tiny model and data in it."""
    text, expected = ROUTES[section]
    route = PAGE.split(f"\n## {section}\n")[1].split("\n## ")[0]
    (line,) = re.findall(r"^(prefopt (?:dpo|wpo|sppo) \S+\.yaml.*)$", route, re.M)
    command, words = line.split()[1], shlex.split(line.split(".yaml", 1)[1])
    launching = words.index("--num_processes")
    del words[launching : launching + 4]  # a launcher, for eight cards
    folder = tmp_path / "data"
    for path in data.iterdir():
        write_jsonl(folder / path.name, [conversations(row) for row in read_jsonl(path)])
    for old, new in (("some/model", model), ("somebody/preferences", folder), ("split_size: 2000", "split_size: 4")):
        text = text.replace(old, str(new))
    ids = "".join(re.findall(r"^```yaml\n(.*?)^```$", route, re.M | re.S))
    recipe, output = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text(text.replace("bf16: true", "bf16: false\nuse_cpu: true") + ids)
    words += ["--attn_implementation=sdpa", f"--output_dir={output}"]
    assert main(["check", str(recipe), f"--method={command}", *words]) == 0, capsys.readouterr().out
    assert main([command, str(recipe), *words]) == 0, capsys.readouterr().err
    resolved = yaml.safe_load((output / "recipe.yaml").read_text())
    state = json.loads((output / "trainer_state.json").read_text())
    assert state["epoch"] == expected.pop("epochs") and state["global_step"] >= 1
    assert {key: resolved[key] for key in expected} == expected
    assert {key: resolved[key] for key in yaml.safe_load(ids) or {}} == (yaml.safe_load(ids) or {})
    assert (output / "model.safetensors").exists()
