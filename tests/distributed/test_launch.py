"""WPO on two CPU ranks through the real script: DDP, ZeRO-2 and ZeRO-3 each give the single process's run.

Every launch pays for imports, and DeepSpeed compiles its CPU ops once, so these are slow checks.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from prefopt import files
from tests.tiny import tiny_model, tiny_tokenizer
from tests.trainers.pairs import preference_rows

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "accelerate_configs"
WRAPPED = {
    "cpu_ddp_2ranks": ("DistributedDataParallel", "LlamaForCausalLM"),
    "cpu_zero2_2ranks": ("DeepSpeedEngine (ZeRO-2)", "DeepSpeedEngine (ZeRO-0)"),
    "cpu_zero3_2ranks": ("DeepSpeedEngine (ZeRO-3)", "DeepSpeedEngine (ZeRO-3)"),
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    """A model folder and a preference file."""
    folder = tmp_path_factory.mktemp("launch")
    tiny_model().save_pretrained(folder / "model")
    tiny_tokenizer("llama3").save_pretrained(folder / "model")
    files.write_jsonl(folder / "data" / "train.jsonl", preference_rows(44))
    files.write_jsonl(folder / "data" / "test.jsonl", preference_rows(6, seed=9))
    return folder


def launch(
    workspace: Path,
    name: str,
    *,
    config: str | Path | None = None,
    layout: str = "padded",
    ranks: int = 2,
    runner: Path | None = None,
    fails: bool = False,
    **settings,
) -> tuple[Path, str]:
    """Run scripts/run_wpo.py (by `runner`) with a global batch of 8, on one process or under an accelerate config;
    (output folder, output), or where it must fail its errors."""
    ranks = ranks if config else 1
    recipe = {
        "model_name_or_path": str(workspace / "model"),
        "dataset_name": str(workspace / "data"),
        "dataset_train_split": "train",
        "dataset_test_split": "test",
        "output_dir": str(workspace / name),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4 // ranks,
        "learning_rate": 1e-3,
        "num_train_epochs": 2,
        "logging_steps": 1,
        "beta": 0.1,
        "max_length": 128,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "steps",
        "save_steps": 4,
        "save_total_limit": 3,
        "eval_strategy": "no",
        "batch_layout": layout,
        **settings,
    }
    path = workspace / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    start = [sys.executable]
    if config:
        file = CONFIGS / f"{config}.yaml" if isinstance(config, str) else config
        start += ["-m", "accelerate.commands.launch", "--config_file", str(file)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [*start, *([str(runner)] if runner else []), str(ROOT / "scripts" / "run_wpo.py"), str(path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert bool(done.returncode) == fails, done.stdout[-3000:] + done.stderr[-5000:]
    return workspace / name, done.stderr if fails else done.stdout


def trajectory(output: Path, key: str = "loss") -> list[float]:
    """A logged figure of every step, from the newest checkpoint's state."""
    state = max(output.glob("checkpoint-*/trainer_state.json"), key=lambda path: int(path.parent.name.split("-")[1]))
    return [entry[key] for entry in json.loads(state.read_text())["log_history"] if key in entry and "loss" in entry]


@pytest.fixture(scope="module")
def single(workspace) -> Path:
    return launch(workspace, "single")[0]


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("config", WRAPPED)
def test_two_ranks_train_like_one(workspace, single, config, layout):
    """12 steps over two epochs of 44 pairs, the last step of each smaller: losses to 1e-4, and the same metrics."""
    output, printed = launch(workspace, f"{config}-{layout}", config=config, layout=layout)
    policy, reference = WRAPPED[config]
    assert f"Training on 2 processes as {policy}; batches: {layout}" in printed
    assert f"reference: live, {reference}" in printed
    expected = trajectory(single)
    assert len(expected) == 12
    assert trajectory(output) == pytest.approx(expected, abs=1e-4)
    for name in (
        "rewards/margins",
        "logps/chosen",
        "wpo/weight_min",
        "wpo/effective_pairs",
        "num_tokens",
        "lengths/rejected",
        "entropy",
    ):
        assert trajectory(output, name) == pytest.approx(trajectory(single, name), rel=1e-4, abs=1e-4), name
    difference = max(abs(a - b) for a, b in zip(trajectory(output), expected))
    print(f"{config}, {layout}: largest loss difference to one process {difference:.1e}")
    check_complete(output, single)


def check_complete(output: Path, single: Path) -> None:
    """The saved model loads in plain transformers, every shape whole, with the single run's weights."""
    shapes = {}
    for path in output.glob("*.safetensors"):
        with safe_open(path, "pt") as saved:
            shapes |= {name: tuple(saved.get_slice(name).get_shape()) for name in saved.keys()}
    assert shapes
    assert all(0 not in shape for shape in shapes.values())
    ours, theirs = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (output, single))
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("config", WRAPPED)
def test_resumed_in_the_second_epoch_equals_uninterrupted(workspace, config):
    """Resumed at step 8 of 12 (the second epoch began with step 7)."""
    output, _ = launch(workspace, f"{config}-resumed", config=config, layout="packed")
    whole = trajectory(output)
    again = {"resume_from_checkpoint": str(output / "checkpoint-8")}
    output, _printed = launch(workspace, f"{config}-resumed", config=config, layout="packed", **again)
    assert trajectory(output) == pytest.approx(whole, abs=1e-6)
    with another_model(workspace):
        _, errors = launch(workspace, f"{config}-resumed", config=config, layout="packed", fails=True, **again)
    assert CHANGED in errors


CHANGED = "checkpoint-8 was made, this has changed: the model that is trained."


@contextmanager
def another_model(workspace: Path) -> Iterator[None]:
    """Have other weights in the model's folder for a while."""
    path = workspace / "model" / "model.safetensors"
    weights = path.read_bytes()
    tiny_model(seed=1).save_pretrained(path.parent)
    try:
        yield
    finally:
        path.write_bytes(weights)


def test_reference_scores_are_cached_once_for_all_ranks(workspace, single):
    """ZeRO-3 with cached scores: scored by both ranks, the same trajectory, read back by a plain process."""
    cached = {"precompute_ref_log_probs": True, "ref_logps_dir": str(workspace / "scores")}
    output, printed = launch(workspace, "cached-zero3", config="cpu_zero3_2ranks", layout="packed", **cached)
    assert "88 scored now" in printed
    assert trajectory(output) == pytest.approx(trajectory(single), abs=1e-4)
    output, printed = launch(workspace, "cached-single", layout="packed", **cached, max_steps=2, learning_rate=1e-4)
    assert "88 read" in printed
    assert " 0 scored now" in printed


def test_an_adapter_under_zero3_with_checkpointing(workspace):
    """LoRA on ZeRO-3: re-entrant checkpointing is chosen and said, and the run is the single process's."""
    settings = {
        "use_peft": True,
        "lora_r": 4,
        "lora_target_modules": ["q_proj", "v_proj"],
        "lora_dropout": 0.0,
        "learning_rate": 1e-2,
    }
    one, _ = launch(workspace, "lora-single", **settings)
    output, printed = launch(
        workspace, "lora-zero3", config="cpu_zero3_2ranks", layout="packed", gradient_checkpointing=True, **settings
    )
    assert "gradient checkpointing is re-entrant" in printed
    # LoRA's first matrices are drawn on each rank from the recipe's seed
    assert trajectory(output) == pytest.approx(trajectory(one), abs=1e-4)


@pytest.mark.parametrize(("config", "mode"), [("cpu_ddp_2ranks", "every_n"), ("cpu_zero3_2ranks", "every_n")])
def test_micro_batches_of_tokens_and_recomputation_on_two_ranks(workspace, single, config, mode):
    """The same steps of 8 pairs in another division, with layers that run twice (and gather twice under ZeRO-3)."""
    settings = {"tokens_per_micro_batch": 150, "checkpointing": mode, "gradient_checkpointing": None}
    output, printed = launch(workspace, f"tokens-{config}", config=config, layout="packed", **settings)
    assert "Each optimizer step of 8 examples runs as 3 micro-batches on each of 2 processes" in printed
    assert trajectory(output) == pytest.approx(trajectory(single), abs=1e-4)
    for name in ("grad_norm", "rewards/margins", "wpo/effective_pairs"):
        assert trajectory(output, name) == pytest.approx(trajectory(single, name), rel=1e-3, abs=1e-4), name
    check_complete(output, single)
