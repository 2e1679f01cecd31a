"""Comparison rows and settings that the tests of reward, preference and ranking trainers share."""

from __future__ import annotations

import random
from typing import Any

from datasets import Dataset

from tests.tiny import tiny_model, tiny_tokenizer

WORDS = "good fine bad awful red blue green old new small".split()


def comparison_rows(
    count: int, *, seed: int = 0, sizes: tuple[int, ...] = (2, 3, 4), ties: bool = True
) -> list[dict[str, Any]]:
    """Rows of R distinct random responses with random scores, not all tied."""
    rng, rows = random.Random(seed), []
    while len(rows) < count:
        size = rng.choice(sizes)
        responses = [" ".join(rng.choices(WORDS, k=rng.randint(1, 6))) for _ in range(size)]
        scores = [float(rng.randint(0, 2)) if ties else rng.random() for _ in range(size)]
        if len(set(responses)) == size and len(set(scores)) > 1:
            rows.append({"prompt": f"Question {len(rows)}: say it. ", "responses": responses, "scores": scores})
    return rows


def pairs(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first two differing responses of each row as chosen and rejected."""
    made = []
    for row in rows:
        order = sorted(range(len(row["scores"])), key=lambda index: -row["scores"][index])
        made.append(
            {"prompt": row["prompt"], "chosen": row["responses"][order[0]], "rejected": row["responses"][order[-1]]}
        )
    return made


def settings(output_dir: Any, **changes: Any) -> dict[str, Any]:
    """Keywords of a config for a short, quiet run on the CPU."""
    usual = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return usual | changes


def dataset(rows: list[dict[str, Any]]) -> Dataset:
    """The rows as a data set."""
    return Dataset.from_list(rows)


def backbone(**overrides: Any):
    """A tiny causal LM that packs, and its tokenizer's size."""
    return tiny_model(attn_implementation="sdpa", **overrides)


TOKENIZER = tiny_tokenizer(None)


def losses(trainer: Any) -> list[float]:
    """The logged losses of the steps."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
