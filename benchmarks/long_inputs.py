"""Memory and time of the data tools on long inputs: `rank`, `build-pairs`, `convert` and `split` on synthetic records.

    python benchmarks/long_inputs.py                          # 10,000, 100,000 and 1,000,000 records
    python benchmarks/long_inputs.py --records 1000 5000 --format jsonl

Records hold a prompt and four answers of about 120 words in all. Every command runs in a separate process; its peak
memory is the largest resident set of that process, its time is from its start to its end, imports included. One JSON
line is printed as soon as a command is done, and a table at the end. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from prefopt.candidates.records import make_candidate, make_record, write_records
from prefopt.candidates.tables import Again

WORDS = ("the", "of", "and", "to", "in", "is", "that", "it", "was", "for", "on", "are", "as", "with", "his", "they")
RANKER = "def score(prompt, responses):\n    return [float(len(set(text.split()))) for text in responses]\n"


def records(number: int, *, scored: bool) -> Iterator[dict[str, Any]]:
    """Synthetic records, the same for the same number."""
    draw = random.Random(0)

    def text(words: int) -> str:
        return " ".join(draw.choices(WORDS, k=words))

    for place in range(number):
        candidates = [
            make_candidate(
                text(draw.randint(10, 40)),
                source="model",
                k=k,
                finish_reason="stop",
                num_tokens=40,
                scores={"synthetic": draw.gauss(0, 1)} if scored else {},
            )
            for k in range(4)
        ]
        yield make_record(f"prompt-{place}", f"{place}: {text(20)}?", candidates)


def commands(folder: Path, form: str) -> dict[str, list[str]]:
    """The commands that are measured, each with what it reads and writes."""
    scored, plain, pairs = folder / f"scored.{form}", folder / f"plain.{form}", folder / "pairs" / f"train.{form}"
    (folder / "ranker.py").write_text(RANKER)
    typed = {
        "rank": f"rank --candidates {plain} --output_dir {folder}/ranked --ranker function "
        f"--model_name_or_path {folder}/ranker.py:score --output_format {form}",
        "build-pairs": f"build-pairs --candidates {scored} --output_dir {folder}/pairs --policy sppo "
        f"--output_format {form}",
        "convert records to sppo_generated": f"convert --input {scored} --from_format records "
        f"--to_format sppo_generated --output {folder}/generated.{form}",
        "convert pairs to records": f"convert --input {pairs} --from_format pairs --to_format records "
        f"--output {folder}/records.{form}",
        "split": f"split --prompts {scored} --output_dir {folder}/splits",
    }
    return {name: command.split() for name, command in typed.items()}


def measure(command: list[str]) -> tuple[float, float]:
    """Run a command; return its seconds and the peak of its resident memory in MiB."""
    started = time.monotonic()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "prefopt", *command],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"prefopt {' '.join(command)} ended with status {process.returncode}.")
    return time.monotonic() - started, usage.ru_maxrss / 1024


def main() -> None:
    """Measure every command on every size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", nargs="+", type=int, default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--format", choices=("parquet", "jsonl"), default="parquet")
    parser.add_argument("--only", nargs="+", help="commands to measure; all by default")
    args = parser.parse_args()
    found = []
    for number in args.records:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            for name, scored in (("plain", False), ("scored", True)):
                write_records(folder / f"{name}.{args.format}", Again(partial(records, number, scored=scored)))
            size = (folder / f"scored.{args.format}").stat().st_size / 2**20
            for name, command in commands(folder, args.format).items():
                if args.only and name.split()[0] not in args.only:
                    continue
                seconds, memory = measure(command)
                found.append({"command": name, "records": number, "file_mib": size, "seconds": seconds, "mib": memory})
                print(json.dumps(found[-1]), flush=True)
    print("\n| command | records | file, MiB | seconds | microseconds a record | peak memory, MiB |")
    print("|---|---:|---:|---:|---:|---:|")
    for row in found:
        each = 1e6 * row["seconds"] / row["records"]
        print(f"| {row['command']} | {row['records']:,} | {row['file_mib']:.0f} | {row['seconds']:.0f} | {each:.0f} | "
              f"{row['mib']:.0f} |")  # fmt: skip
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"\nThis script itself, which writes the inputs: {peak:.0f} MiB at most.")


if __name__ == "__main__":
    main()
