"""Two ranks, DDP and ZeRO-3, through the command line: the same losses and the same model as one process."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from prefopt.files import write_jsonl
from prefopt.models.general_preference import GeneralPreferenceModel
from prefopt.models.heads import HeadedModel
from prefopt.models.reward import RewardModel
from tests.tiny_runs import write_model, write_recipe
from tests.trainers.comparisons import comparison_rows

pytestmark = pytest.mark.slow

METHODS = {
    "reward-model": {"pooling": "last"},
    "adversarial-reward-model": {"pooling": "eos", "adversarial_coeff": 2.0, "num_samples": 1},
    "general-preference-model": {"dim": 4, "scale_gate": "softmax", "sft_coeff": 0.1, "sft_beta": 0.01},
}


def give_head(base: Path, method: str) -> None:
    """Save the base model with a head of the method."""
    torch.manual_seed(1)
    model_class: type[HeadedModel] = GeneralPreferenceModel if method.startswith("general") else RewardModel
    head = {key: value for key, value in METHODS[method].items() if key in model_class.defaults}
    kept = {"lm_head": True} if "sft_coeff" in METHODS[method] else {}
    model_class.from_pretrained(base, new_head=True, **head, **kept).save_pretrained(base)


def run(
    folder: Path, method: str, name: str, accelerate_config: str | None, *, new_head: bool = False, **changes
) -> tuple[list[float], Path]:
    """Train for 4 steps of 8 rows (the last has 3), and return the logged losses and the folder."""
    rows = [
        {**row, "is_adversarial": method.startswith("adversarial") and n % 3 == 0}
        for n, row in enumerate(comparison_rows(27))
    ]
    write_jsonl(folder / f"{name}-data" / "train.jsonl", rows)
    write_jsonl(
        folder / f"{name}-data" / "test.jsonl", comparison_rows(7, seed=1)
    )  # two ranks cannot share 7 rows evenly
    # the folder of the base model already has a head, or every process count would draw another one
    base = folder / "base" / method
    if not base.exists():
        write_model(base, None)
        if not new_head:
            give_head(base, method)
    usual = {
        "method": method,
        "model_name_or_path": str(base),
        "dataset_name": str(folder / f"{name}-data"),
        "max_length": 96,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "do_eval": True,
        "global_batch_size": 8,
        "learning_rate": 1e-3,
        "num_train_epochs": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "output_dir": str(folder / name),
    }
    recipe = write_recipe(folder / f"{name}.yaml", **{**usual, **METHODS[method], **changes})
    words = [sys.executable, "-m", "prefopt", method, str(recipe)]
    words += ["--accelerate_config", accelerate_config] if accelerate_config else []
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    history = json.loads((folder / name / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry], folder / name


@pytest.mark.parametrize(
    ("method", "accelerate_config"),
    [
        ("reward-model", "cpu_ddp_2ranks"),
        ("adversarial-reward-model", "cpu_zero3_2ranks"),
        ("general-preference-model", "cpu_zero3_2ranks"),
    ],
)
def test_two_ranks_train_the_same_model_as_one_process(tmp_path, method, accelerate_config):
    one, alone = run(tmp_path, method, "one", None)
    two, together = run(tmp_path, method, "two", accelerate_config)
    print(f"{method}, {accelerate_config}: losses {one} alone, {two} on two ranks")
    assert len(one) == 4 and two == pytest.approx(one, rel=1e-4, abs=1e-5)
    for measure in ("loss", "accuracy", "ranked_pairs", "ece_bin10"):
        values = [
            json.loads((each / "eval_results.json").read_text())[f"eval_{measure}"] for each in (alone, together)
        ]
        assert values[1] == pytest.approx(values[0], rel=1e-3), measure
    first, second = load_file(alone / "model.safetensors"), load_file(together / "model.safetensors")
    start = load_file(tmp_path / "base" / method / "model.safetensors")
    assert first.keys() == second.keys() == start.keys()
    moved = max((first[name] - start[name]).abs().max() for name in first)
    apart = max((first[name] - second[name]).abs().max() for name in first)
    print(f"largest change of a weight {moved:.2e}, largest difference between the two models {apart:.2e}")
    assert moved > 1e-3 and apart < 0.05 * moved


def test_a_new_head_under_zero3(tmp_path):
    """From a causal LM, as reward models are usually trained: the head is drawn once for all ranks, trained, and
    saved whole."""
    losses, folder = run(tmp_path, "reward-model", "new", "cpu_zero3_2ranks", new_head=True)
    again, _ = run(tmp_path, "reward-model", "again", "cpu_zero3_2ranks", new_head=True)
    print(f"a new head under ZeRO-3: losses {losses}")
    # near ln 2: the head's first scores are small
    assert len(losses) == 4 and losses[0] == pytest.approx(math.log(2), abs=0.1) and again == losses
    trained = RewardModel.from_pretrained(folder)
    assert trained.score.weight.shape == (1, trained.config.hidden_size)
    assert 0.005 < trained.score.weight.std() < 0.1  # initializer_range is 0.02, and four steps of 1e-3 moved it


def test_an_adapter_under_zero3(tmp_path):
    adapter = {
        "use_peft": True,
        "lora_r": 4,
        "lora_target_modules": ["q_proj", "v_proj"],
        "gradient_checkpointing": True,
    }
    one, _ = run(tmp_path, "reward-model", "one", None, **adapter)
    two, together = run(tmp_path, "reward-model", "two", "cpu_zero3_2ranks", **adapter)
    print(f"LoRA: losses {one} alone, {two} under ZeRO-3")
    assert two[0] == pytest.approx(one[0], rel=1e-4) and len(two) == 4
    merged = RewardModel.from_pretrained(together)
    assert merged.head_record["pooling"] == "last"
    base = RewardModel.from_pretrained(tmp_path / "base" / "reward-model")
    assert (merged.score.weight - base.score.weight).abs().max() > 1e-4
    assert (
        merged.model.layers[0].self_attn.q_proj.weight - base.model.layers[0].self_attn.q_proj.weight
    ).abs().max() > 1e-5
    torch.testing.assert_close(merged.model.layers[0].mlp.up_proj.weight, base.model.layers[0].mlp.up_proj.weight)
