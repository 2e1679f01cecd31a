"""The adversarial loop on a game with a known true reward: does it serve the policy better than a fixed reward model,
and what are human comparisons for?

    python benchmarks/adversarial_game.py --seeds 0 1 2 --rounds 3 --outputs outputs/adversarial-game

For each seed one start policy and one set of data (word_game.py), and three ways through the same loop: `fixed` (the
reward model is trained on
human comparisons once), `adversarial` (it is trained anew in each round, on human comparisons and on golden answers
against the policy's), and
`no-human` (the same without the human term). The stages are those of `prefopt pipeline`, run in this process one after
another to save the
starts of Python. Printed and written to `figures.json`: after each round the mean true reward of the policy's answers
to held-out prompts, and
the accuracy of the round's reward model on held-out human comparisons.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import time
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from word_game import make_start_policy, true_reward, write_game

from prefopt.candidates.records import read_records
from prefopt.cli import main as prefopt
from prefopt.files import read_json, write_json
from prefopt.pipelines.adversarial import AdversarialLoop, check_data, stages_of
from prefopt.pipelines.commands import Commands

WAYS = ("fixed", "adversarial", "no-human")
SIZES = {"reward_prompts": 300, "policy_prompts": 400, "test_prompts": 200, "comparisons": 1000}
QUICK = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "report_to": "none",
    "logging_steps": 20,
    "disable_tqdm": True,
    "lr_scheduler_type": "constant",
}
REWARD = {
    "num_train_epochs": 3,
    "per_device_train_batch_size": 32,
    "learning_rate": 1e-3,
    "per_device_eval_batch_size": 128,
    **QUICK,
}


def loop_settings(folder: Path, way: str, seed: int, rounds: int) -> dict[str, Any]:
    """The keys of the loop's recipe for one way through the game."""
    data = folder / "data"
    adversarial = {
        **REWARD,
        "seed": seed,
        "adversarial_coeff": 1.0,
        "num_samples": 4,
        "human_coeff": 0.0 if way == "no-human" else 1.0,
    }
    plain = {**REWARD, "seed": seed}
    return {
        "model_name_or_path": str(folder / "start"),
        "reward_model_name_or_path": str(folder / "start"),
        "reward_prompts": str(data / "reward_prompts.jsonl"),
        "comparisons": str(data / "comparisons.jsonl"),
        "test_comparisons": str(data / "test_comparisons.jsonl"),
        "policy_prompts": str(data / "policy_prompts.jsonl"),
        "test_prompts": str(data / "test_prompts.jsonl"),
        "testing_comparisons": str(data / "testing_comparisons.jsonl"),
        "testing_reward_training": plain,
        "num_iterations": rounds,
        "aligner": "dpo",
        "sampling": {
            "num_samples": 4,
            "temperature": 1.0,
            "top_p": 1.0,
            "max_new_tokens": 20,
            "batch_size": 512,
            "seed": seed,
        },
        "test_sampling": {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 20, "batch_size": 256, "seed": seed},
        "selection": {"plots": False, "keep": ["length"]},
        "policy_training": {
            "beta": 0.3,
            "learning_rate": 3e-4,
            "num_train_epochs": 2,
            "per_device_train_batch_size": 32,
            "seed": seed,
            **QUICK,
        },
        "reward_update": "fixed" if way == "fixed" else "base",
        **({"base_reward_training": plain} if way == "fixed" else {"reward_training": adversarial}),
    }


def play(folder: Path, way: str, seed: int, rounds: int) -> dict[str, Any]:
    """One way through the game, and what came of it."""
    loop = AdversarialLoop(**loop_settings(folder, way, seed, rounds))
    check_data(loop)
    run_dir = folder / way
    for stage in stages_of(loop, Commands(run_dir, {})):
        done = run_dir / "done" / stage.name.replace("/", "-")
        if not done.exists():
            quietly(stage.command[1:], run_dir / "logs" / f"{stage.name.replace('/', '-')}.log")
            done.parent.mkdir(parents=True, exist_ok=True)
            done.touch()
    return figures(run_dir, way, rounds)


def quietly(words: tuple[str, ...], log: Path) -> None:
    """Run one `prefopt` command in this process, with its output in a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        status = prefopt(list(words))
    if status:
        raise SystemExit(f"prefopt {' '.join(words)} ended with status {status}; see {log}")


def figures(run_dir: Path, way: str, rounds: int) -> dict[str, Any]:
    """What is known after each round; the first entry is the start policy."""
    names = ["base", *(f"iteration-{number}" for number in range(1, rounds + 1))]
    answers = [read_records(run_dir / name / "answers") for name in names]
    texts = [[(record["prompt"], record["candidates"][0]["text"]) for record in records] for records in answers]
    prefixes = ["base"] if way == "fixed" else names[1:]
    reward_models = [read_json(run_dir / name / "reward-train" / "eval_results.json") for name in prefixes]
    evaluations = [read_json(run_dir / name / "evaluate" / "evaluation.json") for name in names[1:]]
    return {
        "true_reward": [statistics.fmean(true_reward(prompt, text) for prompt, text in each) for each in texts],
        "testing_win_rate": [0.5, *(each["win_rates"]["base"]["win_rate"] for each in evaluations)],
        "words": [statistics.fmean(len(text.split()) for _, text in each) for each in texts],
        "human_accuracy": [each["eval_human_accuracy"] for each in reward_models],
        "examples": [[text for _, text in each[:3]] for each in texts],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--outputs", type=Path, default=Path("outputs/adversarial-game"))
    options = parser.parse_args()
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    results: dict[str, dict[str, Any]] = {}
    for seed in options.seeds:
        folder = options.outputs.resolve() / f"seed-{seed}"
        write_game(folder / "data", seed=seed, **SIZES)
        if not (folder / "start" / "model.safetensors").exists():
            make_start_policy(folder / "start", seed=seed)
        for way in options.ways:
            clock = time.process_time()
            result = play(folder, way, seed, options.rounds) | {"cpu_seconds": round(time.process_time() - clock)}
            results.setdefault(way, {})[str(seed)] = result
            print(
                f"seed {seed} {way:<12} true reward {_list(result['true_reward'])}, words {_list(result['words'])}, "
                "reward model on "
                f"human comparisons {_list(result['human_accuracy'])} ({result['cpu_seconds']} s "
                "CPU)",
                flush=True,
            )
    for way, by_seed in results.items():
        columns = zip(*(result["true_reward"] for result in by_seed.values()))
        accuracies = zip(*(result["human_accuracy"] for result in by_seed.values()))
        print(
            f"mean {way:<12} true reward {_list([statistics.fmean(c) for c in columns])}, reward model on human "
            "comparisons "
            f"{_list([statistics.fmean(c) for c in accuracies])}",
            flush=True,
        )
    write_json(options.outputs / "figures.json", results)


def _list(values: list[float]) -> str:
    return " ".join(f"{value:.3f}" for value in values)


if __name__ == "__main__":
    main()
