"""Preparing preference data, timed: from a file of messages to what a trainer reads, prefopt against TRL.

    python benchmarks/data_preparation.py --rows 61000 --output data_preparation.json

Each contender (TRL's is its DPOTrainer) runs in a separate process with an empty data cache: it reads the same file,
templates and tokenises it. prefopt also cuts, counts bytes, drops and reports, which TRL leaves to its collator or to
nobody. Rows are made of invented words, with UltraFeedback's mean lengths (190, 327 and 302 tokens) drawn
log-normally. The time of a trainer's constructor on two rows is subtracted, so that models and imports do not count;
processor seconds include it. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MEAN_LENGTHS = (190, 327, 302)  # tokens of prompt, chosen, rejected
CONTENDERS = ("prefopt", "trl")
MAX_LENGTH = 2048
ON_CPU = {"use_cpu": True, "bf16": False, "report_to": "none"}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=61000)
    parser.add_argument("--repeats", type=int, default=1, help="runs of each contender, in turns; the fastest counts")
    parser.add_argument("--num_proc", type=int, default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=None, help="JSON file for the figures")
    parser.add_argument("--contender", choices=CONTENDERS, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, default=None, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def write_data(folder: Path, rows: int, seed: int) -> dict[str, float]:
    """Write a tokenizer, a tiny model and the rows; return the mean lengths in tokens."""
    from tests.tiny import tiny_model, tiny_tokenizer

    rng = random.Random(seed)
    words = ["".join(rng.choices("etaoinshrdlucmfwypvbgk", k=rng.randint(2, 9))) for _ in range(6000)]
    tokenizer = tiny_tokenizer("llama3", vocab_size=8000, corpus=[" ".join(rng.choices(words, k=20000))])
    tokenizer.save_pretrained(folder)
    tiny_model(vocab_size=8000).save_pretrained(folder)
    sample = " ".join(rng.choices(words, k=2000))
    per_word = len(tokenizer(sample, add_special_tokens=False)["input_ids"]) / 2000

    def turn(role: str, mean: int) -> list[dict[str, str]]:
        sigma = 0.8
        tokens = math.exp(rng.gauss(math.log(mean) - sigma**2 / 2, sigma))
        return [{"role": role, "content": " ".join(rng.choices(words, k=max(1, round(tokens / per_word))))}]

    parts = dict(zip(("prompt", "chosen", "rejected"), MEAN_LENGTHS))
    totals = dict.fromkeys(parts, 0)
    with open(folder / "rows.jsonl", "w") as file:
        for number in range(rows):
            row = {part: turn("user" if part == "prompt" else "assistant", mean) for part, mean in parts.items()}
            file.write(json.dumps(row) + "\n")
            if number < 500:
                for part, messages in row.items():
                    totals[part] += len(tokenizer(messages[0]["content"], add_special_tokens=False)["input_ids"])
    with open(folder / "two.jsonl", "w") as file:
        file.writelines((folder / "rows.jsonl").read_text().splitlines(keepends=True)[:2])
    return {part: total / min(rows, 500) for part, total in totals.items()}


def prepare_here(folder: Path, file: Path, num_proc: int | None):
    """What a run of `prefopt dpo` does with the file, up to the trainer."""
    from transformers import AutoTokenizer

    from prefopt import DPOConfig, DPOTrainer
    from prefopt.recipes.arguments import DatasetArguments
    from prefopt.training import tokenise_data

    args = DPOConfig(str(folder / "out"), max_length=MAX_LENGTH, dataset_num_proc=num_proc, **ON_CPU)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sets, _ = tokenise_data("pairs", tokenizer, args, DatasetArguments(dataset_name=str(file)))
    return DPOTrainer(str(folder), args=args, train_dataset=sets["train"], processing_class=tokenizer)


def prepare_trl(folder: Path, file: Path, num_proc: int | None):
    """What a script with TRL's trainer does with the file."""
    from datasets import load_dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    args = DPOConfig(str(folder / "out"), max_length=MAX_LENGTH, dataset_num_proc=num_proc, **ON_CPU)
    dataset = load_dataset("json", data_files=str(file), split="train")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return DPOTrainer(str(folder), args=args, train_dataset=dataset, processing_class=tokenizer)


def run_contender(args: argparse.Namespace) -> dict[str, float]:
    import datasets

    datasets.disable_progress_bars()
    prepare = {"prefopt": prepare_here, "trl": prepare_trl}[args.contender]
    start = time.perf_counter()
    prepare(args.folder, args.folder / "two.jsonl", None)
    first = time.perf_counter() - start  # imports and whatever is compiled
    before = resource.getrusage(resource.RUSAGE_SELF)
    start = time.perf_counter()
    prepare(args.folder, args.folder / "two.jsonl", None)
    constructor = time.perf_counter() - start
    start = time.perf_counter()
    trainer = prepare(args.folder, args.folder / "rows.jsonl", args.num_proc)
    seconds = time.perf_counter() - start - constructor
    usage = resource.getrusage(resource.RUSAGE_SELF)
    processor = usage.ru_utime + usage.ru_stime - before.ru_utime - before.ru_stime
    mib = {"peak_mib": usage.ru_maxrss / 1024, "added_mib": (usage.ru_maxrss - before.ru_maxrss) / 1024}
    times = {"seconds": seconds, "processor_seconds": processor, "first_seconds": first}
    return {"rows": len(trainer.train_dataset), **times, **mib}


def in_own_process(contender: str, args: argparse.Namespace, folder: Path) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as cache:
        words = [sys.executable, __file__, "--contender", contender, "--folder", str(folder)]
        if args.num_proc is not None:
            words += ["--num_proc", str(args.num_proc)]
        environment = {**os.environ, "HF_DATASETS_CACHE": cache, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        root = str(Path(__file__).resolve().parents[1])
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        done = subprocess.run(words, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{contender} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.contender is not None:
        print(json.dumps(run_contender(args)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lengths = write_data(folder, args.rows, args.seed)
        results: dict[str, list[dict[str, float]]] = {contender: [] for contender in CONTENDERS}
        for _ in range(args.repeats):
            for contender in CONTENDERS:
                results[contender].append(in_own_process(contender, args, folder))
    best = {contender: min(runs, key=lambda run: run["seconds"]) for contender, runs in results.items()}
    print("mean tokens of " + ", ".join(f"{part} {mean:.0f}" for part, mean in lengths.items()))
    print("| library | rows kept | seconds | processor seconds | rows/s | peak MiB | of it for the data |")
    print("|---|---|---|---|---|---|---|")
    for contender, run in best.items():
        times = f"{run['seconds']:.1f} | {run['processor_seconds']:.1f} | {args.rows / run['seconds']:,.0f}"
        memory = f"{run['peak_mib']:,.0f} | {run['added_mib']:,.0f}"
        print(f"| {contender} | {run['rows']:,} | {times} | {memory} |")
    if args.output is not None:
        args.output.write_text(json.dumps({"settings": {"rows": args.rows, "num_proc": args.num_proc}, **results}))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main()
