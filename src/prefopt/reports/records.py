"""What a training run leaves on disk, read for its report; the run may have been interrupted, or go on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME

from prefopt.evaluation.figures import EVALUATION_FILE, EVALUATION_FOLDER
from prefopt.files import iterate_jsonl, read_json, read_yaml
from prefopt.run import (
    EVAL_FIGURES,
    LOG_FILE,
    RECIPE_FILE,
    RUN_FILE,
    TRAIN_FIGURES,
    VERSIONS_FILE,
    is_finished,
)
from prefopt.trainers.checkpoints import checkpoints_of
from prefopt.trainers.samples import SAMPLES_FILE


@dataclass(frozen=True)
class RunRecord:
    """One training run.

    Attributes:
        folder: where it lies.
        name: what the report calls it.
        finished: whether it has left all that a run leaves at its end.
        recipe: its resolved recipe, key -> value.
        facts: what it wrote when it started (`RUN_FILE`): method, recipe's name, differences, data, hardware.
        versions: of Python and packages.
        log: logs of training steps, in order.
        evaluations: logs of evaluations, in order.
        figures: those of the end, of training and evaluation.
        measured: figures of `prefopt evaluate` within the run's folder, by the folder of each evaluation.
        samples: `samples.jsonl`: completions of the policy and the reference at several steps.
        max_steps: how many steps were planned; 0 where that is not known.
    """

    folder: Path
    name: str
    finished: bool
    recipe: Mapping[str, Any]
    facts: Mapping[str, Any]
    versions: Mapping[str, Any]
    log: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    figures: Mapping[str, Any]
    measured: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    max_steps: int = 0

    @property
    def steps(self) -> int:
        """The last step that was logged."""
        return int(max((entry["step"] for entry in [*self.log, *self.evaluations]), default=0))


def read_run(folder: Path, name: str) -> RunRecord:
    """Read what a run has left in `folder`; parts that are missing or damaged stay empty.

    Raises:
        ValueError: the folder holds no training run.
    """
    lines = _whole_lines(folder / LOG_FILE)
    history = log_history(folder, lines)
    recipe = _mapping(folder / RECIPE_FILE, lambda path: read_yaml(path)[0])
    if not history and not recipe:
        raise ValueError(f"{folder} holds no training run: neither {RECIPE_FILE}, nor {LOG_FILE}, nor a checkpoint.")
    return RunRecord(
        folder=folder,
        name=name,
        finished=is_finished(folder, evaluated=False),
        recipe=recipe,
        facts=_mapping(folder / RUN_FILE, read_json),
        versions=_mapping(folder / VERSIONS_FILE, read_json),
        log=[entry for entry in history if "loss" in entry],
        evaluations=[entry for entry in history if any(key.startswith("eval_") for key in entry)],
        figures=_mapping(folder / TRAIN_FIGURES, read_json) | _mapping(folder / EVAL_FIGURES, read_json),
        measured=_measured(folder / EVALUATION_FOLDER),
        samples=_whole_lines(folder / SAMPLES_FILE),
        max_steps=max((line["max_steps"] for line in lines if "max_steps" in line), default=0),
    )


def _measured(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the figures of every `evaluation.json` below a folder, by the name of the folder that holds it."""
    found = {}
    for path in sorted(folder.glob(f"**/{EVALUATION_FILE}")):
        figures = _mapping(path, read_json).get("figures")
        if isinstance(figures, dict):
            found[path.parent.name] = {k: v for k, v in figures.items() if isinstance(v, dict) and "value" in v}
    return found


def log_history(folder: Path, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the logs of a run: those of its log file, or of the trainer's state at its end or in a checkpoint.

    A run that is continued from a checkpoint logs the steps after it again: the earlier logs of these are left out.

    Args:
        folder: of the run.
        lines: of its log file; none where there is no such file.
    """
    if lines:
        history: list[dict[str, Any]] = []
        for line in lines:
            if "max_steps" in line:  # training begins here, after this step
                history = [entry for entry in history if entry["step"] <= line["step"]]
            elif isinstance(line.get("step"), (int, float)):
                history.append(line)
        return history
    for place in (folder, *reversed(checkpoints_of(folder))):
        if history := _mapping(place / TRAINER_STATE_NAME, read_json).get("log_history", []):
            return [entry for entry in history if isinstance(entry.get("step"), (int, float))]
    return []


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file of JSON lines up to the first that is damaged: a killed run may leave half a line at the end."""
    rows: list[dict[str, Any]] = []
    try:
        for row in iterate_jsonl(path):
            rows.append(row)  # noqa: PERF402  # those before a damaged line are kept
    except (OSError, ValueError):
        pass
    return rows


def _mapping(path: Path, read: Any) -> dict[str, Any]:
    try:
        value = read(path)
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
