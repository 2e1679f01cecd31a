"""`prefopt` commands as stages: the words to type, what in them decides the result, and a plan as a shell script."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import shlex
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from prefopt.cli import COMMANDS, METHODS, arguments_of, function_of
from prefopt.launch import LAUNCH_KEYS
from prefopt.pipelines.stages import Stage
from prefopt.recipes.convert import unknown_key
from prefopt.recipes.recipe import Recipe, build, collect, plain
from prefopt.recipes.source import Setting, read_settings
from prefopt.run import FREE_TO_CHANGE, batch_sizes, config_values

# settings of a command that do not decide its result, so that changing them makes nothing again
_MACHINE = frozenset(
    {
        "base_url", "key_variable", "concurrency", "request_timeout", "retries", "gpu_memory_utilization", "enforce_eager",
        "tensor_parallel_size", "data_parallel_size", "tokens_per_batch", "plots", "push_to_hub", "hub_dataset_id", "hub_private_repo",
    }
)  # fmt: skip
_TRAINERS = {*METHODS, "sft"}
_TRAINING = FREE_TO_CHANGE - {"num_train_epochs", "max_steps", "output_dir"}


@dataclass(frozen=True)
class Place:
    """A path within a run, `Place("iteration-1/rank")`: typed with the run's folder, compared without it."""

    path: str


@dataclass(frozen=True)
class Commands:
    """Makes the stages of one run.

    Args:
        run_dir: the run's folder.
        launchers: last part of a stage's name -> what is typed instead of `prefopt`, for instance another
            environment's
            `.venv-vllm/bin/python -m prefopt`, or `srun ... python -m prefopt`.
    """

    run_dir: Path
    launchers: Mapping[str, str]

    def stage(
        self,
        name: str,
        tool: str,
        settings: Mapping[str, Any],
        *,
        recipe: str | None = None,
        outputs: Sequence[str] = (),
        needs: Sequence[str] = (),
        inputs: Sequence[str | None] = (),
    ) -> Stage:
        """The stage `name` that runs `prefopt TOOL [RECIPE] --key=value ...` and writes to a folder of its name.

        Args:
            name: such as "iteration-1/rank".
            tool: the command.
            settings: its keys; values as in YAML, and `Place` for paths within the run. None stands for null; a
                launcher's key (num_processes, ...) that is None is left out.
            recipe: a recipe of its own, which `settings` override.
            outputs: patterns within the stage's folder, of the files that other stages read.
            needs: earlier stages.
            inputs: what it reads from outside; names that are no local paths (hub names) are left to their names.

        Raises:
            ValueError: a key that the command does not know, or a value that it refuses, before anything is started.
        """
        given = {key: value for key, value in settings.items() if key not in LAUNCH_KEYS or value is not None}
        typed = [f"--{key}={_typed(value, self.run_dir)}" for key, value in given.items()]
        try:
            decides = self._what_decides(tool, recipe, typed)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        program = shlex.split(self.launchers.get(name.rsplit("/", 1)[-1], "prefopt"))
        return Stage(
            name=name,
            command=(*program, tool, *([recipe] if recipe else []), *typed),
            settings=decides,
            folder=name,
            outputs=tuple(f"{name}/{pattern}" for pattern in outputs),
            needs=tuple(needs),
            inputs=tuple(Path(path).expanduser() for path in inputs if path and Path(path).expanduser().exists()),
        )

    def _what_decides(self, tool: str, recipe: str | None, typed: list[str]) -> dict[str, Any]:
        settings = [setting for setting in read_settings(recipe, typed) if setting.key != "env"]
        parsed = parse_command(tool, recipe, settings)
        if tool in METHODS:
            check_training(tool, parsed)
        free = (_TRAINING if _method_of(tool, parsed) in _TRAINERS else _MACHINE) | LAUNCH_KEYS
        values = {key: plain(value) for key, value in parsed.values.items() if key not in free}
        if "ranker_settings" in values:  # an evaluation's, of `prefopt rank`
            values["ranker_settings"] = {k: v for k, v in values["ranker_settings"].items() if k not in free}
        return {"command": tool, **_without(values, f"{self.run_dir}/")}


def parse_command(tool: str, recipe: str | None, settings: list[Setting]) -> Recipe:
    """The settings of a command, each key known and of the right type; a tool's own checks are made as well.

    Raises:
        ValueError: the first problem.
    """
    settings = [setting for setting in settings if setting.key not in LAUNCH_KEYS]
    method = next((str(s.value) for s in reversed(settings) if s.key == "method"), None)
    name = tool if COMMANDS[tool].arguments else check_method(method)
    classes = arguments_of(name)
    if COMMANDS[tool].aliases:
        names = getattr(importlib.import_module(COMMANDS[tool].module), COMMANDS[tool].aliases)
        settings = [replace(setting, key=names.get(setting.key, setting.key)) for setting in settings]
    problems: list[str] = []
    parsed = collect(recipe, settings, classes, problems)
    if problems:
        raise ValueError(problems[0])
    if name not in _TRAINERS:  # a training config looks at this machine's devices, which need not be those of the run
        build(parsed, classes)
    return parsed


def check_training(method: str, parsed: Recipe) -> None:
    """Have a method look at its settings, which it would otherwise do only once its data are sampled and ranked.

    In a process of its own: a training config sets up devices, and variables that launchers read.

    Raises:
        ValueError: it refuses them.
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_look_at_training, args=(method, parsed, theirs))
    process.start()
    theirs.close()
    try:
        refused = ours.recv()
    except EOFError:
        refused = f"the settings of {method} could not be looked at; its last words are above."
    process.join()
    if refused:
        raise ValueError(refused)


def _look_at_training(method: str, parsed: Recipe, answer: Connection) -> None:
    values = config_values(parsed)
    # this machine need not be the one that trains
    values |= {"use_cpu": True, "bf16": values.get("bf16", not values.get("fp16"))}
    config_class = arguments_of(method)[0]
    refused = None
    warnings.simplefilter("ignore")  # which the command says itself
    try:
        values |= batch_sizes(values, config_class, processes=1)
        (config,) = build(Recipe(parsed.name, values, parsed.places), [config_class])
        function_of(method).check_settings(config)
    except ValueError as error:
        refused = str(error)
    answer.send(refused)


def check_method(name: str | None) -> str:
    """The training command called `name`.

    Raises:
        ValueError: there is none.
    """
    clean = (name or "").replace("_", "-")
    if clean not in METHODS:
        raise ValueError(unknown_key(name, list(METHODS)).replace("key", "method") + ".")
    return clean


def _method_of(tool: str, parsed: Recipe) -> str:
    return tool if COMMANDS[tool].arguments else str(parsed.values.get("method"))


def _typed(value: Any, run_dir: Path) -> str:
    """A value as it is typed on the command line."""
    if isinstance(value, Place):
        return str(run_dir / value.path)
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (dict, list)):
        return json.dumps(_filled(value, run_dir), ensure_ascii=False)
    return str(value)


def _filled(value: Any, run_dir: Path) -> Any:
    if isinstance(value, dict):
        return {key: _filled(item, run_dir) for key, item in value.items()}
    if isinstance(value, list):
        return [_filled(item, run_dir) for item in value]
    return str(run_dir / value.path) if isinstance(value, Place) else value


def _without(value: Any, prefix: str) -> Any:
    """Paths within the run without the run's folder, so that a run may be moved."""
    if isinstance(value, dict):
        return {key: _without(item, prefix) for key, item in value.items()}
    if isinstance(value, list):
        return [_without(item, prefix) for item in value]
    inside = isinstance(value, str) and f"{value}/".startswith(prefix)
    return f"RUN{value.removeprefix(prefix[:-1])}" if inside else value


def as_script(stages: Sequence[Stage]) -> str:
    """The stages as a shell script for machines where the runner does not run: in order, stopping at the first failure.

    Each command continues its own unfinished work; nothing is skipped, and no rule ends the script early.
    """
    lines = [
        "#!/usr/bin/env bash",
        "# Written by `prefopt pipeline --write_script`: stages of the run, in order.",
        "set -euo pipefail",
    ]
    for stage in stages:
        after = f" (after {', '.join(stage.needs)})" if stage.needs else ""
        lines += ["", f"# {stage.name}{after}", stage.line]
    return "\n".join(lines) + "\n"
