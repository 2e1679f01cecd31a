"""The commands that are killed: what they need, what is typed, and what must be equal at their end."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from prefopt.files import file_hash, read_json, write_jsonl
from tests.candidates.ranking import save_reward_model
from tests.tiny import tiny_model, tiny_tokenizer
from tests.tiny_runs import WORDS, write_model, write_pairs

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = ("-m", "accelerate.commands.launch", "--config_file", str(ROOT / "accelerate_configs/cpu_ddp_2ranks.yaml"))
CPU = {
    "use_cpu": True, "bf16": False, "dtype": "float32", "gradient_checkpointing": False, "report_to": "none",
    "disable_tqdm": True, "learning_rate": 1e-3, "max_length": 96, "per_device_train_batch_size": 2,
}  # fmt: skip
TRAINING = {
    **CPU,
    "max_prompt_length": 48,
    "max_steps": 24,
    "logging_steps": 1,
    "save_steps": 4,
    "save_total_limit": 2,
}
RULE = "def score(prompt, candidates):\n    return [float(len(text) + text.count('e')) for text in candidates]\n"
# What differs between two equal runs: times, and what a process measures of itself (`perf/`: since it has started).
TIMES = ("runtime", "per_second", "seconds", "flos", "perf/")


@dataclass(frozen=True)
class Command:
    """One command that is killed.

    Attributes:
        words: what is typed after `prefopt`, for a folder to write to; the same words continue a killed run.
        ends: what must be equal at the end, by name.
        processes: how many accelerate starts.
    """

    words: Callable[[Path], list[str]]
    ends: Callable[[Path], dict[str, Any]]
    processes: int = 1

    def program(self, run: Path) -> list[str]:
        """Return the whole command line of a launched command."""
        return [sys.executable, *LAUNCHER, "--main_process_port", "0", "-m", "prefopt", *self.words(run)]


def every_command(inputs: Path) -> dict[str, Command]:
    """Return the commands by name; `inputs` is the folder that `write_inputs` filled."""

    def recipe(name: str, *more: str) -> Callable[[Path], list[str]]:
        def words(run: Path) -> list[str]:
            command = {"train": "wpo", "train-2-ranks": "wpo"}.get(name, name)
            folder = "--run_dir" if name in ("pipeline", "sweep") else "--output_dir"
            return [command, str(inputs / f"{command}.yaml"), f"{folder}={run}", *more]

        return words

    resume = ("--resume_from_checkpoint=true",)
    return {
        "generate": Command(recipe("generate"), candidates),
        "rank": Command(recipe("rank"), candidates),
        "build-pairs": Command(recipe("build-pairs"), lambda run: hashes(run, "train.*")),
        "score-references": Command(lambda run: [*recipe("score-references")(run), f"--ref_logps_dir={run}"], scores),
        "train": Command(recipe("train", *resume), trained),
        "train-2-ranks": Command(recipe("train-2-ranks", *resume), trained, processes=2),
        "pipeline": Command(recipe("pipeline"), stages),
        "sweep": Command(recipe("sweep"), study),
    }


def write_inputs(inputs: Path) -> None:
    """Write tiny models, data and a recipe for every command."""
    words = random.Random(0)
    model = write_model(inputs / "model")
    tiny_tokenizer("chatml").save_pretrained(inputs / "other")
    tiny_model("qwen2", seed=1).save_pretrained(inputs / "other")
    save_reward_model(inputs / "reward")
    data = write_pairs(inputs / "data", {"train": 60})
    prompts = [{"prompt_id": f"p{n}", "prompt": " ".join(words.choices(WORDS, k=6))} for n in range(96)]
    write_jsonl(inputs / "prompts.jsonl", prompts)
    (inputs / "rule.py").write_text(RULE)
    sampling = {"num_samples": 3, "temperature": 1.0, "max_new_tokens": 16, "batch_size": 24, "shard_size": 8}
    sampling |= {"dtype": "float32", "output_format": "jsonl"}
    references = {"references": [str(model), str(inputs / "other")], "reference_dtype": "float32"}
    pairs = {"model_name_or_path": str(model), "dataset_name": str(data)}
    rule = {"ranker": "function", "model_name_or_path": f"{inputs / 'rule.py'}:score", "shard_size": 8}
    recipes = {
        "wpo": {**pairs, **TRAINING},
        "generate": {"model_name_or_path": str(model), "prompts": str(inputs / "prompts.jsonl"), **sampling},
        "rank": {
            "candidates": str(inputs / "candidates"), "ranker": "reward-model",
            "model_name_or_path": str(inputs / "reward"), "shard_size": 8, "output_format": "jsonl", "max_length": 96,
        },
        "build-pairs": {"candidates": str(inputs / "ranked"), "output_format": "jsonl", "policy": "best_worst"},
        "score-references": {"method": "multi-reference-dpo", **pairs, **CPU, **references},
        "pipeline": {
            "pipeline": "self-play", "model_name_or_path": str(model), "num_iterations": 1,
            "prompts": [{"path": str(inputs / "prompts.jsonl")}], "sampling": sampling, "ranking": rule,
            "training": {"method": "sppo", **CPU, "num_train_epochs": 1, "save_steps": 8, "save_total_limit": 1},
        },
        "sweep": {
            "training": {"model_name_or_path": str(model), **CPU, **references, "save_strategy": "no"},
            "dataset_name": str(data / "train.jsonl"), "seeds": [0], "pool_rows": 40, "train_rows": 20,
            "validation_rows": 10, "test_rows": 10, "baselines": False,
            "grid": {"mode": ["geometric", "harmonic"]},
        },
    }  # fmt: skip
    for name, values in recipes.items():
        (inputs / f"{name}.yaml").write_text(yaml.safe_dump(values, sort_keys=False))


# ---- what must be equal


def hashes(run: Path, *patterns: str) -> dict[str, Any]:
    """Hash the files that match."""
    found = {str(path.relative_to(run)): file_hash(path) for pattern in patterns for path in run.glob(pattern)}
    assert found, f"{run}: nothing matches {patterns}"
    return found


def candidates(run: Path) -> dict[str, Any]:
    """Hash the candidates, and check that their shards are whole."""
    return hashes(run, "candidates.*")


def trained(run: Path) -> dict[str, Any]:
    """Hash the weights; and every logged figure of every step."""
    log = [without_times(entry) for entry in read_json(run / "trainer_state.json")["log_history"]]
    names = sorted(path.name for path in run.iterdir() if path.is_file())
    return {**hashes(run, "*.safetensors", "config.json", "tokenizer*"), "log": log[:-1], "files": names}


def scores(run: Path) -> dict[str, Any]:
    """Read every record of the score store by its key, however it is split into files."""
    found: dict[str, Any] = {}
    for path in run.glob("*/*.npz"):
        with np.load(path, allow_pickle=False) as stored:
            for key, *values in zip(stored["keys"], *(stored[name] for name in ("logps", "tokens", "bytes"))):
                # another batch rounds otherwise
                found[f"{path.parent.name} {key.tobytes().hex()}"] = [round(float(value), 3) for value in values]
    assert found, f"{run}: no scores"
    return found


def stages(run: Path) -> dict[str, Any]:
    """Read what the stages made, by the hashes in the run's state."""
    state = read_json(run / "state.json")["stages"]
    return {name: [stage["status"], {f: e[2] for f, e in stage["files"].items()}] for name, stage in state.items()}


def study(run: Path) -> dict[str, Any]:
    """Read the figures of every run, and the verdict."""
    results = {str(path.relative_to(run)): without_times(read_json(path)) for path in run.glob("runs/*/*/*.json")}
    state = {name: stage["status"] for name, stage in read_json(run / "state.json")["stages"].items()}
    return {**results, "verdict": read_json(run / "verdict.json"), "state": state}


def without_times(value: Any) -> Any:
    """Leave out keys that hold times, at any depth, and round what JSON holds of floats."""
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if not any(t in key for t in TIMES)}
    if isinstance(value, list):
        return [without_times(item) for item in value]
    return value


def differences(whole: dict[str, Any], end: dict[str, Any]) -> list[str]:
    """Name what is not equal."""
    names = [name for name in dict.fromkeys([*whole, *end]) if whole.get(name) != end.get(name)]
    return [f"{n}: {json.dumps(whole.get(n))[:200]} undisturbed, {json.dumps(end.get(n))[:200]} here" for n in names]
