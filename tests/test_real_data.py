"""WPO on real preference data through the real script: AlpacaEval's candidates as pairs, and HH dialogues."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from prefopt import files
from prefopt.candidates.pairs import select_pairs
from tests.tiny import tiny_model, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not DATA.is_dir(), reason="the shared data is not here")]


def alpaca_pairs() -> list[dict]:
    """Best against worst candidate by the judge's win probability, ties as in WPO v2; all 603 prompts not all tied."""
    rows = []
    for record in files.read_jsonl(DATA / "alpaca_candidates.jsonl.gz"):
        texts = [candidate["text"] for candidate in record["candidates"]]
        scores = [candidate["win_prob"] for candidate in record["candidates"]]
        rows += [
            {
                "prompt": [{"role": "user", "content": record["prompt"]}],
                "chosen": [{"role": "assistant", "content": texts[pair.chosen]}],
                "rejected": [{"role": "assistant", "content": texts[pair.rejected]}],
            }
            for pair in select_pairs(texts, scores, policy="wpo_v2")
        ]
    return rows


def hh_pairs() -> list[dict]:
    """Human choices, as plain strings."""
    records = files.read_jsonl(DATA / "hh_helpful_train.jsonl.gz")
    return [{name: record[name] for name in ("prompt", "chosen", "rejected")} for record in records]


SETS = {"alpaca": alpaca_pairs, "hh": hh_pairs}


@pytest.mark.parametrize("name", SETS)
def test_wpo_trains_on_real_pairs_and_evaluates_on_a_held_out_tenth(name, tmp_path):
    rows = SETS[name]()
    texts = [
        message if isinstance(message, str) else message[0]["content"] for row in rows for message in row.values()
    ]
    tokenizer = tiny_tokenizer("llama3", vocab_size=2000, corpus=texts)
    tiny_model(vocab_size=2000, hidden_size=64, intermediate_size=128, max_position_embeddings=1024).save_pretrained(
        tmp_path / "model"
    )
    tokenizer.save_pretrained(tmp_path / "model")
    files.write_jsonl(tmp_path / "pairs.jsonl", rows)
    recipe = {
        "model_name_or_path": str(tmp_path / "model"),
        "dataset_name": str(tmp_path / "pairs.jsonl"),
        "test_split_size": 0.1,
        "output_dir": str(tmp_path / "out"),
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "num_train_epochs": 1,
        "learning_rate": 1e-3,
        "beta": 0.1,
        "max_length": 512,
        "max_prompt_length": 256,
        "logging_steps": 10,
        "eval_strategy": "epoch",
        "eval_on_start": True,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = [sys.executable, str(ROOT / "scripts" / "run_wpo.py"), str(tmp_path / "recipe.yaml")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr[-4000:]
    log = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    before, after = ([entry for entry in log if "eval_loss" in entry][i] for i in (0, -1))
    train = [entry for entry in log if "loss" in entry]
    for figures in (before, after, train[0], train[-1]):
        print(
            name,
            {
                key: round(value, 4)
                for key, value in figures.items()
                if "wpo" in key or "reward" in key or "loss" in key
            },
        )
    assert before["eval_rewards/margins"] == pytest.approx(0.0, abs=1e-5)
    # the loss itself may rise: WPO's weights grow as the policy learns to write such answers
    assert train[-1]["rewards/margins"] > train[0]["rewards/margins"]
    assert math.isfinite(after["eval_loss"])
    if name == "alpaca":  # best against worst of 15; HH's human choices are too subtle for a model of this size
        assert after["eval_rewards/accuracies"] > 0.5
    assert 0 < after["eval_wpo/weight_mean"] <= 1
    assert len(rows) > 550
    print(
        f"{name}: {len(rows)} pairs; held-out accuracy {after['eval_rewards/accuracies']:.3f}, margin "
        f"{after['eval_rewards/margins']:.3f}"
    )
