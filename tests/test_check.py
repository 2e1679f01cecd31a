"""`prefopt check`: everything at once, and nothing started."""

from __future__ import annotations

import importlib.util
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from transformers import AutoTokenizer, PreTrainedModel

from prefopt.cli import main
from prefopt.files import write_jsonl
from prefopt.memory import Memory
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
        "launch: cpu_ddp_2ranks, 2 processes",
        "batch: 2 per device x 2 accumulation steps x 2 processes = 8",
        "train: 6 rows read, 6 kept",
        "eval: 2 rows read, 2 kept",
        "memory of one process, estimated",
        "memory of the first node beside its GPUs, estimated",
        "reference",
        "evaluation_strategy is an older key",
        "Nothing was found that would stop this run.",
    ):
        assert words in printed
    assert not (tmp_path / "out").exists()
    assert "max_weight" not in printed and "further keys have their defaults" in printed
    assert len(printed.splitlines()) < 70


def test_all_problems_are_collected(tmp_path, model, data, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").write_text("")
    recipe = tiny_recipe(
        tmp_path, model, data, beta="strong", learning_rte=1, warmup_ratio=7, use_peft=True, use_cpu=None,
        lora_target_modules=["lm_head"], dataset_name=f"{tmp_path}/no.jsonl",
    )  # fmt: skip
    status, printed = check(capsys, recipe, "--accelerate_config", "deepspeed_zero3")
    assert status == 2
    problems = printed[printed.index("problems:") :]
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


@pytest.mark.parametrize(
    ("command", "changes", "words"),
    [
        ("wpo", {"loss_type": "nonsense"}, "Unknown loss_type 'nonsense' for WPOTrainer"),
        ("wpo", {"loss_type": "aot"}, "has no value per pair"),
        ("wpo", {"use_weighting": False}, "use_weighting"),
        ("wpo", {"ref_model_name_or_path": "./nowhere"}, "ref_model_name_or_path './nowhere'"),
        ("wpo", {"ref_model_revision": "v2"}, "ref_model_revision belongs to ref_model_name_or_path"),
        ("dpo", {"loss_type": "simpo", "ref_model_name_or_path": "{model}"}, "simpo has no reference"),
        ("reward-model", {"ref_model_name_or_path": "{model}"}, "this method has no reference model"),
        ("wpo", {"report_to": "wandb"}, "report_to: wandb needs the package wandb"),
        ("wpo", {"optim": "paged_adamw_32bit"}, "optim: paged_adamw_32bit needs the package bitsandbytes"),
        ("wpo", {"output_dir": "{model}/config.json/out"}, "config.json is a file; name a folder"),
        ("sppo", {}, "reads the column 'chosen_win_prob'"),
        ("adversarial-reward-model", {}, "No training row is adversarial"),
        (
            "multi-reference-dpo",
            {"references": ["{model}"], "ref_logps_dir": "{model}/none", "max_prompt_length": None},
            "score-references",
        ),
    ],
)
def test_check_finds_what_stops_the_run(tmp_path, model, data, capsys, monkeypatch, command, changes, words):
    """The same words, from `prefopt check` and from the run itself, which has loaded no weights by then either."""
    absent = ("wandb", "bitsandbytes")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else find_spec(name))
    filled = {
        key: [item.format(model=model) for item in value] if isinstance(value, list)
        else value.format(model=model) if isinstance(value, str) else value
        for key, value in changes.items()
    }  # fmt: skip
    recipe = tiny_recipe(tmp_path, model, data, **{"method": command, **filled})
    status, printed = check(capsys, recipe)
    problems = printed[printed.index(" problem") :]
    assert status == 2
    assert words in problems
    assert main([command, str(recipe)]) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("prefopt: error: ")]
    assert words in error
    assert error.removeprefix("prefopt: error: ") in problems
    assert not (tmp_path / "out").exists()


def test_an_adapter_is_estimated_with_the_model_under_it(tmp_path, model, data, capsys, monkeypatch):
    config = LoraConfig(r=8, target_modules=["q_proj"], base_model_name_or_path=str(model), task_type="CAUSAL_LM")
    config.save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "adapter")
    estimates = []
    monkeypatch.setattr("prefopt.check.estimate", lambda run, *_, **kw: estimates.append(run) or Memory())
    status, printed = check(capsys, tiny_recipe(tmp_path, tmp_path / "adapter", data))
    assert status == 0, printed
    (run,) = estimates
    assert run.shape.trained == 2 * (32 * 8 + 8 * 32)  # two layers' q_proj, 32 to 32
    assert run.shape.parameters > 10_000 and run.keeps_reference is False


def test_what_auto_chooses_is_shown(tmp_path, model, data, capsys):
    """Without a GPU here, for a card of 80 GB; on a CPU nothing is recomputed, and micro-batches keep their pairs."""
    auto = {"gradient_checkpointing": None, "tokens_per_micro_batch": "auto"}
    _, printed = check(capsys, tiny_recipe(tmp_path, model, data, use_cpu=None, bf16=True, **auto))
    assert "Checkpointing: none (auto: about " in printed
    assert "There is no GPU here: reckoned with a card of 80 GB." in printed
    assert "as micro-batches of up to 16,384 tokens" in printed
    _, printed = check(capsys, tiny_recipe(tmp_path, model, data, **auto))
    assert "Checkpointing: none (auto: nothing is recomputed on a CPU)." in printed
    assert "as micro-batches" not in printed
    every = {"checkpointing": "every_n", "gradient_checkpointing": None, "tokens_per_micro_batch": 3000}
    _, printed = check(capsys, tiny_recipe(tmp_path, model, data, **every))
    assert "Checkpointing: every_n (n = 2)." in printed
    assert "as micro-batches of up to 3,000 tokens" in printed


def test_launcher_settings_that_cannot_work(tmp_path, model, data, capsys):
    recipe = tiny_recipe(tmp_path, model, data)
    status, printed = check(capsys, recipe, "--num_processes", "two")
    assert (status, "--num_processes must be a whole number, found 'two'" in printed) == (2, True)
    config = tmp_path / "accelerate.yaml"
    config.write_text("- a list\n")
    status, printed = check(capsys, recipe, "--accelerate_config", config)
    assert (status, "accelerate.yaml must hold `key: value` lines" in printed) == (2, True)


def test_several_gpus_without_a_launcher(tmp_path, model, data, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    status, printed = check(capsys, tiny_recipe(tmp_path, model, data, use_cpu=None))
    assert status == 2
    assert "4 GPUs are visible, but there is one process: add --num_processes 4" in printed


def test_a_recipe_for_a_gpu_is_checked_as_it_will_run_there(tmp_path, model, data, capsys, monkeypatch):
    """Without a GPU at hand, neither its attention nor the precision that it would choose is a mistake."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    recipe = tiny_recipe(
        tmp_path, model, data, use_cpu=None, bf16=None, attn_implementation="flash_attention_2", dtype="bfloat16"
    )
    status, printed = check(capsys, recipe, "--accelerate_config", "deepspeed_zero3")
    assert status == 0, printed
    assert "There is no GPU here" in printed


def test_a_missing_package_is_named_once_and_none_for_what_cannot_run_here(tmp_path, model, data, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    recipe = tiny_recipe(tmp_path, model, data, attn_implementation="flash_attention_2", optim="adamw_bnb_8bit")
    status, printed = check(capsys, recipe)
    assert (status, printed.count("needs the package")) == (2, 1), printed
    assert "adamw_bnb_8bit needs the package bitsandbytes" in printed
    assert "attn_implementation: flash_attention_2 needs a GPU; set sdpa on a CPU." in printed


def test_method_is_named_or_asked_for(tmp_path, model, data, capsys):
    recipe = tiny_recipe(tmp_path, model, data, method=None)
    assert main(["check", str(recipe)]) == 2
    assert "add --method (dpo, wpo," in capsys.readouterr().err
    status, printed = check(capsys, recipe, "--method", "dpo")
    assert (status, printed.splitlines()[0]) == (0, "method: dpo")
    assert main(["check", str(recipe), "--method", "dop"]) == 2
    assert "unknown method 'dop'; did you mean 'dpo'?" in capsys.readouterr().err
    assert main(["check", "--method", "dpo", "mine.yaml"]) == 2
    assert "the recipe comes first, as in: mine.yaml --method dpo" in capsys.readouterr().err


def test_packages_that_settings_need(tmp_path, model, data, capsys, monkeypatch):
    monkeypatch.setattr("prefopt.run.importlib.util.find_spec", lambda name: None)
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


def test_the_recipe_of_a_loop_is_told_what_looks_at_it(capsys):
    assert main(["check", "pipelines/sppo_llama3_8b"]) == 2
    assert "`prefopt pipeline RECIPE --dry_run` checks it" in capsys.readouterr().err


def test_rows_that_are_largely_cut_are_a_warning_before_training(tmp_path, model, data, capsys):
    recipe = tiny_recipe(tmp_path, model, data, max_length=32, max_prompt_length=None)
    status, printed = check(capsys, recipe)
    assert status == 0
    assert "rows (100%) do not fit in max_length 32 and are cut" in printed
    with pytest.raises(AssertionError, match="check loaded weights"):  # so that all of this came before
        main(["wpo", str(recipe)])
    assert "rows (100%) do not fit in max_length 32 and are cut" in capsys.readouterr().err
    assert "do not fit" not in check(capsys, tiny_recipe(tmp_path, model, data))[1]


def test_many_dropped_rows_are_a_warning(tmp_path, model, capsys):
    good = [{"prompt": "x", "chosen": "y", "rejected": f"z{number}"} for number in range(20)]
    write_jsonl(tmp_path / "rows.jsonl", [*good, *(3 * [{"prompt": "a", "chosen": "b", "rejected": "b"}])])
    _, printed = check(capsys, tiny_recipe(tmp_path, model, tmp_path / "rows.jsonl"))
    assert "note: train: 3 of 23 rows are dropped: 3 " in printed


def test_a_model_that_could_not_be_saved_is_a_problem(tmp_path, capsys):
    """`temperature` without sampling: transformers loads it, and refuses to write it after training."""
    model, data = write_model(tmp_path), write_pairs(tmp_path, {"train": 6})
    path = model / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "temperature": 0.6, "do_sample": False}))
    recipe = tiny_recipe(tmp_path, model, data)
    assert main(["check", str(recipe), "--method", "wpo"]) == 2
    assert "could not be saved after training" in (printed := capsys.readouterr().out)
    assert "generation_config.json" in printed
    assert not (tmp_path / "out").exists()


def test_a_disk_without_room_is_a_problem(tmp_path, monkeypatch, capsys):
    recipe = tiny_recipe(
        tmp_path, write_model(tmp_path), write_pairs(tmp_path, {"train": 6}), save_strategy="steps", save_steps=1
    )
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert main(["check", str(recipe), "--method", "wpo"]) == 2
    assert "checkpoints and the model" in capsys.readouterr().out
