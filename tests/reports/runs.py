"""Folders as training runs leave them, without training."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import yaml

from prefopt.files import write_json

HOSTILE = "<img src=https://evil/x.png> ![x](https://evil/y.png) | cell \x1b[2J\u202e"
LENGTHS = {"mean": 20.0, "p50": 19.0, "p95": 31.0, "max": 40}


def log_entry(step: int, shift: float = 0.0) -> dict[str, Any]:
    """A log of a step; every value has some noise that repeats."""
    noise = math.sin(7.0 * step)
    gain = 1 - math.exp(-step / 20)
    return {
        "step": step, "epoch": step / 30, "loss": 0.69 - 0.3 * gain + 0.02 * noise + shift, "grad_norm": 1 + noise / 9,
        "learning_rate": 1e-3 * (1 - step / 70), "rewards/accuracies": min(1.0, 0.5 + 0.5 * gain + 0.1 * noise),
        "rewards/margins": gain + 0.1 * noise, "rewards/chosen": 0.4 * gain, "rewards/rejected": -0.6 * gain,
        "logps/chosen": -280 + noise, "logps/rejected": -300 - noise, "lengths/chosen": 99.5 + noise / 9,
        "lengths/rejected": 99.0, "wpo/weight_mean": 0.8 - gain / 9, "wpo/weight_min": 0.5, "wpo/weight_max": 1.0,
        "wpo/effective_pairs": 63.0, "perf/tokens_per_second": 12000 + 900 * noise, "perf/peak_memory_gib": 41.5,
        "entropy": 1.2,
    }  # fmt: skip


def evaluation_entry(step: int) -> dict[str, Any]:
    share = 1 - 0.5 * math.exp(-step / 20)
    return {"step": step, "eval_loss": 0.7 - step / 200, "eval_rewards/accuracies": share, "eval_runtime": 3.2}


def write_run(folder: Path, *, steps: int = 60, name: str = "data", finished: bool = True, **recipe: Any) -> Path:
    """Write what a run of 60 planned steps has left after `steps`; `name` is text of unknown origin."""
    folder.mkdir(parents=True)
    settings = {"method": "wpo", "dataset_name": name, "learning_rate": 1e-3, "beta": 0.01, **recipe}
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**settings, "output_dir": str(folder)}, sort_keys=False))
    write_json(folder / "package_versions.json", {"python": "3.12.1", "torch": "2.13.0"})
    counts = {"rows_in": 210, "rows_kept": 200, "dropped": {f"empty {name}": 10}, "rows_cut": 3, "form": "messages"}
    data = [
        {"name": "train", **counts, "lengths": {"prompt": LENGTHS, "chosen": LENGTHS}},
        {"name": "eval", **counts, "rows_kept": 100, "dropped": {}, "lengths": {}},
    ]
    hardware = {"device": "NVIDIA H100 80GB HBM3", "processes": 8, "memory_gib": 79.6}
    facts = {"method": "wpo", "rows": "pairs", "baseline": "llama3/wpo", "differences": {"beta": [0.1, 0.01]}}
    write_json(folder / "run.json", {**facts, "data": data, "hardware": hardware})
    lines: list[dict[str, Any]] = [{"step": 0, "max_steps": 60}]
    for step in range(1, steps + 1):
        lines += [log_entry(step), *([evaluation_entry(step)] if step % 20 == 0 else [])]
    write_lines(folder / "log.jsonl", lines)
    write_lines(
        folder / "samples.jsonl",
        [
            {"step": step, "row_id": "r1", "prompt": f"Name {name}?", "policy": f"answer {step}", "reference": "first"}
            for step in (0, steps)
        ],
    )
    if finished:
        (folder / "model.safetensors").write_bytes(b"")
        write_json(folder / "train_results.json", {"train_loss": 0.5, "train_runtime": 321.5})
        write_json(folder / "eval_results.json", {"eval_loss": 0.4, "eval_rewards/accuracies": 0.9})
    return folder


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
