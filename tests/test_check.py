"""`prefopt check`: everything at once, and nothing started."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from prefopt.cli import main
from tests.tiny_runs import tiny_recipe, write_model, write_pairs


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("data"), {"train": 6, "test": 2})


@pytest.fixture(autouse=True)
def no_weights(monkeypatch, model):
    def load(*args, **kwargs):
        raise AssertionError("check loaded weights")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", load)


def check(capsys, *words):
    status = main(["check", *map(str, words)])
    return status, capsys.readouterr().out


def test_a_good_recipe(tmp_path, model, data, capsys):
    recipe = tiny_recipe(tmp_path, model, data, do_eval=True, global_batch_size=8, evaluation_strategy="no")
    status, printed = check(capsys, recipe, "--learning_rate=0.5", "--accelerate_config", "cpu_ddp_2ranks")
    assert status == 0
    for words in (
        "method: wpo",
        "learning_rate: 0.5",
        "max_weight: 1.0",
        "launch: cpu_ddp_2ranks, 2 process(es)",
        "batch: 2 per device x 2 accumulation steps x 2 processes = 8",
        "train: 6 rows read, 6 kept",
        "eval: 2 rows read, 2 kept",
        "memory of one GPU, estimated",
        "reference",
        "evaluation_strategy is an older key",
        "Nothing was found that would stop this run.",
    ):
        assert words in printed
    assert not (tmp_path / "out").exists()


def test_all_problems_are_collected(tmp_path, model, data, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").write_text("")
    recipe = tiny_recipe(
        tmp_path, model, data, beta="strong", learning_rte=1, warmup_ratio=7, use_peft=True, lora_target_modules=["lm_head"],
        dataset_name=f"{tmp_path}/no.jsonl", use_cpu=None,
    )  # fmt: skip
    status, printed = check(capsys, recipe, "--accelerate_config", "deepspeed_zero3")
    assert status == 2
    problems = printed[printed.index("problem(s):") :]
    for words in (
        "beta: expected a number, found 'strong'",
        "unknown key 'learning_rte'",
        "expected a share of the steps below 1",
        "an adapter on lm_head",
        "already holds a trained model",
        "no.jsonl",
        "the recipe computes in no and deepspeed_zero3 says mixed_precision: bf16",
    ):
        assert words in problems


def test_precision_differs_from_the_accelerate_config(tmp_path, model, data, capsys):
    recipe = tiny_recipe(tmp_path, model, data, use_cpu=None)
    status, printed = check(capsys, recipe, "--accelerate_config", "multi_gpu")
    assert status == 2
    assert "the recipe computes in no and multi_gpu says mixed_precision: bf16" in printed
    status, printed = check(capsys, recipe, "--accelerate_config", "cpu_ddp_2ranks")
    assert "cpu_ddp_2ranks runs on the CPU: set use_cpu: true" in printed


def test_a_packaged_recipe_offline(capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    status, printed = check(capsys, "llama3/wpo", "--accelerate_config", "deepspeed_zero3")
    assert status == 2
    assert "batch: 2 per device x 8 accumulation steps x 8 processes = 128" in printed
    assert "model_name_or_path 'meta-llama/Meta-Llama-3-8B-Instruct'" in printed


def test_method_is_named_or_asked_for(tmp_path, model, data, capsys):
    recipe = tiny_recipe(tmp_path, model, data, method=None)
    assert main(["check", str(recipe)]) == 2
    assert "add --method (dpo, wpo," in capsys.readouterr().err
    status, printed = check(capsys, recipe, "--method", "dpo")
    assert (status, printed.splitlines()[0]) == (0, "method: dpo")
    assert main(["check", str(recipe), "--method", "dop"]) == 2
    assert "unknown method 'dop'; did you mean 'dpo'?" in capsys.readouterr().err


def test_packages_that_settings_need(tmp_path, model, data, capsys, monkeypatch):
    monkeypatch.setattr("prefopt.check.importlib.util.find_spec", lambda name: None)
    recipe = tiny_recipe(tmp_path, model, data, use_peft=True, load_in_4bit=True, report_to=["wandb"])
    status, printed = check(capsys, recipe)
    assert status == 2
    assert "load_in_4bit: True needs the package bitsandbytes: pip install 'prefopt[quantization]'" in printed
    assert "needs the package wandb" in printed


def test_a_gpu_that_is_too_small(tmp_path, model, data, capsys, monkeypatch):
    class Properties:
        total_memory = 1000

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    _, printed = check(capsys, tiny_recipe(tmp_path, model, data))
    assert "This is more than the 0 GiB of a GPU here." in printed


def test_checking_changes_nothing_for_the_run_after_it(tmp_path, model, data, capsys, monkeypatch):
    recipe = tiny_recipe(tmp_path, model, data)
    assert check(capsys, recipe)[0] == 0
    monkeypatch.undo()
    assert main(["wpo", str(recipe)]) == 0
