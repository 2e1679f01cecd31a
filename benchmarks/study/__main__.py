"""The study's command: `python -m benchmarks.study [--quick] [--only wpo]`; a stopped study goes on where it was."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

from benchmarks.study.experiments import EXPERIMENTS
from benchmarks.study.lab import Lab, Scale
from benchmarks.study.page import write_page
from benchmarks.study.results import Results
from benchmarks.study.workers import run
from benchmarks.study.world import Shape

HERE = Path(__file__).resolve().parent
PAGE = HERE.parents[1] / "docs" / "study.md"
QUICK = Scale(shape=Shape(rows=1500, epochs=2), prompts=64, test_prompts=64, answers=2, comparisons=300)
CUDA = Scale(
    shape=Shape(hidden=512, layers=12, rows=20_000, epochs=2, learning_rate=5e-4, batch=128),
    prompts=384,
    comparisons=3000,
    learning_rate=1e-4,
)
TINY_CUDA = Scale(shape=Shape(hidden=32, rows=300, epochs=1), prompts=32, test_prompts=16, answers=2, comparisons=64)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two small seeds of everything, and no page")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dry-run", action="store_true", help="with --device cuda: tiny sizes, on the CPU")
    parser.add_argument("--only", nargs="+", choices=list(EXPERIMENTS), default=list(EXPERIMENTS))
    parser.add_argument("--seeds", type=int, help="at most this many seeds beside seed 0")
    parser.add_argument("--workers", type=int, help="processes, each with seeds of its own (2; 1 with --device cuda)")
    parser.add_argument("--minutes", type=float, help="stop after this time; a rerun goes on (12 with --device cuda)")
    parser.add_argument(
        "--results", type=Path, help="file of finished units (benchmarks/study/results/<device>.jsonl)"
    )
    parser.add_argument("--page", type=Path, help="where the page goes (docs/study.md; none with --quick)")
    parser.add_argument("--only-page", action="store_true", help="write the page of what is recorded, run nothing")
    options = parser.parse_args(arguments)
    if options.dry_run and options.device != "cuda":
        parser.error("--dry-run is for --device cuda; --quick is the small run on a CPU.")
    cuda = options.device == "cuda"
    if cuda and not options.dry_run and not options.only_page and not torch.cuda.is_available():
        parser.error("--device cuda finds no GPU; --dry-run tries the same with tiny sizes on the CPU.")
    if options.minutes is None and cuda:
        options.minutes = 12.0
    if options.workers is None:
        options.workers = 1 if cuda else 2
    return options


def lab_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of the lab that the options ask for, without its record."""
    cuda = options.device == "cuda"
    return {
        "scale": (TINY_CUDA if options.dry_run else CUDA) if cuda else QUICK if options.quick else Scale(),
        "device": "cpu" if options.dry_run else options.device,
        "deadline": None if options.minutes is None else time.monotonic() + 60 * options.minutes,
        "seeds": options.seeds if options.seeds is not None else 2 if options.quick else 3 if cuda else None,
        "quick": options.quick or options.dry_run,
        "policies": Path("outputs/study/policies"),
    }


def results_path(options: argparse.Namespace) -> Path:
    """Return the file of finished units."""
    name = "quick" if options.quick else f"{options.device}{'-dry' if options.dry_run else ''}"
    folder = Path("outputs/study") if options.quick or options.dry_run else HERE / "results"
    return options.results or folder / f"{name}.jsonl"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is not recorded yet, check it (`--quick`) or write the page."""
    options = parse(arguments)
    begin, path, settings = time.monotonic(), results_path(options), lab_settings(options)
    if not options.only_page and not run(path, settings, options.only, options.workers):
        print("study: time is over; run the command again to go on.", flush=True)
    lab = Lab(Results(path), only_read=True, **settings)
    if options.quick:
        for name in options.only:
            experiment = EXPERIMENTS[name]
            experiment.check(experiment.read(lab)[1])
    elif not options.dry_run or options.page:
        write_page(lab, options.page or PAGE)
    print(f"study: {len(lab.results)} units recorded, {time.monotonic() - begin:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
