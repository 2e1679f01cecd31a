"""Processes that share the units: one thread and one lab each, and whole seeds, whose policies they make once."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers

from benchmarks.study.experiments import EXPERIMENTS
from benchmarks.study.lab import Lab, OutOfTime
from benchmarks.study.results import Results


def run(path: Path, settings: dict[str, Any], names: Sequence[str], workers: int) -> bool:
    """Run what is not recorded yet: seed 0 of every experiment, then seed by seed.

    Args:
        path: of the record.
        settings: of each worker's lab.
        names: of the experiments.
        workers: number of processes.

    Returns:
        whether the time sufficed.
    """
    seeds = sorted({seed for name in names for seed in EXPERIMENTS[name].planned(settings["seeds"])})
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start, (path, settings)) as pool:
        return all(list(pool.map(_choose, names))) and all(list(pool.map(partial(_run_seed, names), seeds)))


def _start(path: Path, settings: dict[str, Any]) -> None:
    global LAB
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    LAB = Lab(Results(path), **settings)


def _choose(name: str) -> bool:
    return _in_time(EXPERIMENTS[name].choose)


def _run_seed(names: Sequence[str], seed: int) -> bool:
    def work(lab: Lab) -> None:
        for experiment in (EXPERIMENTS[name] for name in names):
            if seed in experiment.planned(lab.seeds):
                experiment.run_seed(lab, experiment.choose(lab), seed)

    return _in_time(work)


def _in_time(work: Callable[[Lab], object]) -> bool:
    LAB.results.read()  # what other workers have finished
    try:
        work(LAB)
    except OutOfTime:
        return False
    return True
