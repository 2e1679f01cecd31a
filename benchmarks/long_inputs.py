"""Memory and time of the data tools on long inputs: `rank`, `build-pairs`, `convert` and `split` on synthetic records.

    python benchmarks/long_inputs.py                          # 10,000, 100,000 and 1,000,000 records
    python benchmarks/long_inputs.py --records 1000 5000 --format jsonl

Records hold a prompt and four answers of about 120 words in all. Every command runs in a separate process; its peak
memory is the largest resident set of that process; its time, by the clock and of the processor, is from its start to
its end, imports included. One JSON line is printed as soon as a command is done, and a table at the end. Nothing is
downloaded.
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
    """Synthetic records, the same for the same number; their answers are drawn from a thousand texts."""
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=10 + n % 31)) for n in range(1000)]
    for place in range(number):
        candidates = [
            make_candidate(
                f"{draw.choice(texts)} ({k})",
                source="model",
                k=k,
                finish_reason="stop",
                num_tokens=40,
                scores={"synthetic": draw.gauss(0, 1)} if scored else {},
            )
            for k in range(4)
        ]
        yield make_record(f"prompt-{place}", f"{place}: {draw.choice(texts)}?", candidates)


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


def measure(command: list[str]) -> dict[str, float]:
    """Run a command; return its seconds, those of a processor, and the peak of its resident memory in MiB."""
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
    seconds = {"seconds": time.monotonic() - started, "cpu_seconds": usage.ru_utime + usage.ru_stime}
    return {**seconds, "mib": usage.ru_maxrss / 1024}


def main() -> None:
    """Measure every command on every size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", nargs="+", type=int, default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--format", choices=("parquet", "jsonl"), default="parquet")
    parser.add_argument(
        "--only", nargs="+", default=["rank", "build-pairs", "convert", "split"], help="what to measure"
    )
    args = parser.parse_args()
    found = []
    for number in args.records:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            for name, scored in (("plain", False), ("scored", True)):
                if (scored and set(args.only) == {"rank"}) or (not scored and "rank" not in args.only):
                    continue  # which nothing reads
                write_records(folder / f"{name}.{args.format}", Again(partial(records, number, scored=scored)))
            size = max(path.stat().st_size for path in folder.iterdir()) / 2**20
            for name, command in commands(folder, args.format).items():
                if name.split()[0] not in args.only:
                    continue
                found.append({"command": name, "records": number, "file_mib": size, **measure(command)})
                print(json.dumps(found[-1]), flush=True)
    print(
        "\n| command | records | file, MiB | seconds | processor's | microseconds of it a record | peak memory, MiB |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|")
    for row in found:
        each = 1e6 * row["cpu_seconds"] / row["records"]
        print(f"| {row['command']} | {row['records']:,} | {row['file_mib']:.0f} | {row['seconds']:.0f} | "
              f"{row['cpu_seconds']:.0f} | {each:.0f} | "
              f"{row['mib']:.0f} |")  # fmt: skip
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"\nThis script itself, which writes the inputs: {peak:.0f} MiB at most.")


if __name__ == "__main__":
    main()
