"""Does self-play raise the rule's win rate, iteration by iteration? The CPU toy of examples/self_play over methods and
seeds.

    python benchmarks/self_play_seeds.py --methods sppo gpo dpo wpo --seeds 0 1 2 --output self_play.json

The stages are those that `prefopt pipeline` plans, in the same order with the same words. Each runs in a process
forked from this one, which
has imported everything already: tiny stages would otherwise spend most of their time on imports.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from itertools import pairwise
from pathlib import Path

import torch

from prefopt.cli import arguments_of, main
from prefopt.files import read_json, write_json
from prefopt.pipelines.commands import Commands
from prefopt.pipelines.run import read_pipeline
from prefopt.pipelines.self_play import stages_of
from prefopt.recipes.recipe import load_settings

ROOT = Path(__file__).resolve().parents[1]
TOY = ROOT / "examples" / "self_play"
ITERATIONS = 3
# what differs from the recipe: small betas for targets of one or two nats in the unit of each loss
METHODS: dict[str, dict[str, object]] = {
    "sppo": {},
    "gpo": {"loss_type": "gpo", "beta": 1.0},
    "dpo": {"method": "dpo", "loss_type": "sigmoid", "beta": 0.5},
    "wpo": {"method": "wpo", "loss_type": "sigmoid", "beta": 0.5},
}


def in_fork(function, *arguments: object) -> None:
    """Call a function in a process of its own, and stop where it fails."""
    process = multiprocessing.get_context("fork").Process(target=_called, args=(function, arguments))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{arguments} ended with status {process.exitcode}")


def _called(function, arguments: tuple) -> None:
    torch.set_num_threads(1)
    sys.exit(function(*arguments) or 0)


def make_start(folder: Path, seed: int) -> None:
    """The start model and the prompts of a seed."""
    sys.path.insert(0, str(TOY))
    from game import make_game

    make_game(folder, seed=seed)


def play(folder: Path, start: Path, method: str, seed: int) -> list[dict[str, float]]:
    """One run of the loop; returns what each iteration's evaluation found."""
    words = [
        str(TOY / "recipe.yaml"),
        f"--run_dir={folder}",
        f"--model_name_or_path={start}",
        f"--prompts=[{{path: {start / 'prompts'}}}]",
        f"--evaluation.prompts.path={start / 'prompts'}",
        f"--ranking.model_name_or_path={TOY / 'rule.py'}:certainty",
        f"--seed={seed}",
        "--training.save_strategy=no",
        *(f"--training.{key}={value}" for key, value in METHODS[method].items()),
    ]
    _, loop, _ = read_pipeline(*load_settings(words))
    for stage in stages_of(loop, Commands(folder, {})):
        in_fork(main, list(stage.command[1:]))
    return [figures(folder / f"iteration-{t}" / "evaluate" / "evaluation.json") for t in range(1, ITERATIONS + 1)]


def figures(path: Path) -> dict[str, float]:
    """The numbers of one evaluation that the table shows."""
    found = read_json(path)
    base = found["win_rates"]["base"]
    return {
        "win_rate": base["win_rate"],
        "low": base["low"],
        "high": base["high"],
        "against_previous": found["win_rates"].get("previous", base)["win_rate"],
        "accuracy": found["preference"]["accuracy"],
        "length_ratio": found["lengths"]["policy"]["mean_tokens"] / found["lengths"]["base"]["mean_tokens"],
    }


def table(results: dict[str, dict[int, list[dict[str, float]]]]) -> str:
    """Win rates against the base by method, seed and iteration, and their means."""
    lines = [
        "| method | seed | " + " | ".join(f"iteration {t}" for t in range(1, ITERATIONS + 1)) + " | rises |",
        "|---|---|" + "---:|" * ITERATIONS + "---|",
    ]
    for method, seeds in results.items():
        rates = {seed: [0.5, *(found["win_rate"] for found in run)] for seed, run in seeds.items()}
        if len(rates) > 1:
            rates["mean"] = [sum(column) / len(column) for column in zip(*rates.values())]
        for seed, row in rates.items():
            rises = "yes" if all(a < b for a, b in pairwise(row)) else "no"
            lines.append(f"| {method} | {seed} | " + " | ".join(f"{rate:.3f}" for rate in row[1:]) + f" | {rises} |")
    return "\n".join(lines)


def run() -> None:
    """Play every method with every seed, and print the table after each run."""
    parser = argparse.ArgumentParser(description="The self-play toy over methods and seeds.")
    parser.add_argument("--methods", nargs="+", default=["sppo", "gpo"], choices=sorted(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("outputs/self-play-seeds"))
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    for tool in ("generate", "rank", "build-pairs", "evaluate", "report", "sppo", "dpo", "wpo"):
        arguments_of(tool)  # imported once, for all forks
    results: dict[str, dict[int, list[dict[str, float]]]] = {method: {} for method in options.methods}
    for seed in options.seeds:
        start = options.folder / f"start-{seed}"
        if not (start / "model.safetensors").exists():
            in_fork(make_start, start, seed)
        for method in options.methods:
            began = time.monotonic()
            results[method][seed] = play(options.folder / f"{method}-{seed}", start, method, seed)
            print(f"\n{method}, seed {seed}: {time.monotonic() - began:.0f} s\n{table(results)}\n", flush=True)
    if options.output is not None:
        write_json(options.output, results)
        print(json.dumps({method: len(seeds) for method, seeds in results.items()}))


if __name__ == "__main__":
    run()
