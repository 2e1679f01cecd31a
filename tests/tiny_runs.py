"""Tiny training runs through the command line: a model, data and a recipe in a temporary folder."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import yaml

from prefopt.files import write_jsonl
from tests.tiny import tiny_model, tiny_tokenizer

WORDS = "blue fox animal colour morning answer question short long help woods sky".split()


def write_model(folder: Path, style: str | None = "llama3", architecture: str = "llama") -> Path:
    """Save a tiny model and its tokenizer in `folder`."""
    tiny_tokenizer(style).save_pretrained(folder)
    tiny_model(architecture).save_pretrained(folder)
    return folder


def pair_rows(count: int, seed: int = 0, *, messages: bool = True) -> list[dict[str, Any]]:
    """Preference rows about nothing, as messages or strings."""
    words = random.Random(seed)

    def text(length: int, role: str) -> Any:
        content = " ".join(words.choice(WORDS) for _ in range(length))
        return [{"role": role, "content": content}] if messages else content

    return [
        {"prompt": text(5, "user"), "chosen": text(6, "assistant"), "rejected": text(9, "assistant")}
        for _ in range(count)
    ]


def write_pairs(folder: Path, splits: dict[str, int], *, messages: bool = True) -> Path:
    """Write `<split>.jsonl` with so many rows for each split."""
    for seed, (split, count) in enumerate(splits.items()):
        write_jsonl(folder / f"{split}.jsonl", pair_rows(count, seed, messages=messages))
    return folder


def write_recipe(path: Path, **values: Any) -> Path:
    """Write a recipe; keys that are `None` are left out."""
    path.write_text(
        yaml.safe_dump({key: value for key, value in values.items() if value is not None}, sort_keys=False)
    )
    return path


def tiny_recipe(folder: Path, model: Path, data: Path, **overrides: Any) -> Path:
    """A recipe that trains a tiny model for two steps on the CPU."""
    values: dict[str, Any] = {
        "method": "wpo",
        "model_name_or_path": str(model),
        "dataset_name": str(data),
        "max_length": 96,
        "max_prompt_length": 48,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-3,
        "max_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "output_dir": str(folder / "out"),
    }
    return write_recipe(folder / "recipe.yaml", **{**values, **overrides})
