"""The toy of examples/self_play for tests: its start model, its recipe, and stages in forked processes."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

import torch

from prefopt.pipelines.commands import Commands
from prefopt.pipelines.run import read_pipeline
from prefopt.pipelines.self_play import stages_of
from prefopt.pipelines.stages import Stage
from prefopt.recipes.recipe import load_settings

ROOT = Path(__file__).resolve().parents[2]
TOY = ROOT / "examples" / "self_play"


def forked(function, *arguments: Any) -> None:
    """Call a function in a process forked from this one, with its output in the test's; stop where it fails."""
    process = multiprocessing.get_context("fork").Process(target=_called, args=(function, arguments))
    process.start()
    process.join()
    assert process.exitcode == 0, f"{function.__name__} ended with status {process.exitcode}"


def _called(function, arguments: tuple) -> None:
    torch.set_num_threads(1)
    sys.exit(function(*arguments) or 0)


def make_game(folder: Path, **sizes: int) -> None:
    """examples/self_play/game.py's function, in a process of its own."""
    forked(_make_game, folder, sizes)


def _make_game(folder: Path, sizes: dict[str, int]) -> None:
    sys.path.insert(0, str(TOY))
    spec = importlib.util.spec_from_file_location("game", TOY / "game.py")
    assert spec is not None and spec.loader is not None
    game = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(game)
    game.make_game(folder, seed=0, **sizes)


def words(start: Path, run_dir: Path, *more: str) -> list[str]:
    """What is typed after `prefopt pipeline` for the toy's recipe, wherever its files are."""
    return [
        str(TOY / "recipe.yaml"),
        f"--run_dir={run_dir}",
        f"--model_name_or_path={start}",
        f"--prompts=[{{path: {start / 'prompts'}}}]",
        f"--evaluation.prompts.path={start / 'prompts'}",
        f"--ranking.model_name_or_path={TOY / 'rule.py'}:certainty",
        *more,
    ]


def stages(start: Path, run_dir: Path, *more: str) -> list[Stage]:
    """The toy's stages."""
    arguments, loop, _ = read_pipeline(*load_settings(words(start, run_dir, *more)))
    return stages_of(loop, Commands(run_dir, arguments.launchers))


def environment() -> dict[str, str]:
    """For commands that are started anew: nothing is downloaded, one thread."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
