"""`prefopt` commands as stages: the words to type, what in them decides the result, and what both loops share."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import shlex
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from prefopt.arguments import MASK, names_without_effect, without_secrets
from prefopt.cli import COMMANDS, METHODS, arguments_of, function_of
from prefopt.evaluation.evaluate import EVALUATION_FILE
from prefopt.files import user_path
from prefopt.launch import LAUNCH_KEYS, launch_words
from prefopt.pipelines.stages import Stage
from prefopt.recipes.convert import unknown_key
from prefopt.recipes.recipe import Recipe, build, collect, plain
from prefopt.recipes.source import Setting, read_settings
from prefopt.run import FREE_TO_CHANGE, batch_sizes, config_values

TRAININGS = {*METHODS, "sft"}
# A continued training may get other lengths and another folder, but their outcome is another model.
FREE_IN_TRAINING = FREE_TO_CHANGE - {"num_train_epochs", "max_steps", "output_dir"}
# The files that other stages read.
CANDIDATES = ("candidates.*",)
MODEL = ("*.safetensors", "*config.json")  # the second is config.json, or adapter_config.json of an adapter


@dataclass(frozen=True)
class Place:
    """A path within a run, `Place("iteration-1/rank")`: typed with the run's folder, compared without it."""

    path: str


# A model: a name on the hub or a path, or the place of the stage that trains it.
Model = str | Place


@dataclass(frozen=True)
class Commands:
    """Makes the stages of one run.

    Args:
        run_dir: the run's folder.
        launchers: last part of a stage's name -> what is typed instead of `prefopt`, for instance another
            environment's `.venv-vllm/bin/python -m prefopt`, or `srun ... python -m prefopt`.
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
        inputs: Sequence[str | Place | None] = (),
    ) -> Stage:
        """Make the stage that runs `prefopt TOOL [RECIPE] --key=value ...` and writes to a folder of its name.

        Args:
            name: such as "iteration-1/rank".
            tool: the command.
            settings: its keys; values as in YAML, and `Place` for paths within the run. None stands for null; a
                launcher's key (num_processes, ...) that is None is left out.
            recipe: a recipe that the command reads first; `settings` override it.
            outputs: patterns within the stage's folder, of the files that other stages read.
            needs: earlier stages.
            inputs: what it reads from outside the run. Only local paths are hashed: names on the hub and places
                within the run are skipped.

        Raises:
            ValueError: an unknown key or an invalid value, before anything is started.
        """
        given = {key: value for key, value in settings.items() if key not in LAUNCH_KEYS or value is not None}
        typed = [f"--{key}={self._typed(value)}" for key, value in given.items()]
        try:
            if recipe is not None and not isinstance(recipe, str):
                raise ValueError(f"recipe: expected the name or path of a recipe, found {recipe!r}.")
            launch_words({key: str(value) for key, value in given.items() if key in LAUNCH_KEYS})
            deciding = self._deciding_settings(tool, recipe, typed)
            outside = [_local_path(path) for path in inputs if path and not isinstance(path, Place)]
            program = shlex.split(self.launchers.get(name.rsplit("/", 1)[-1], "prefopt"))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        return Stage(
            name=name,
            command=(*program, tool, *([recipe] if recipe else []), *typed),
            settings=deciding,
            folder=name,
            outputs=tuple(f"{name}/{pattern}" for pattern in outputs),
            needs=tuple(needs),
            inputs=tuple(path for path in outside if path.exists()),
        )

    def _deciding_settings(self, tool: str, recipe: str | None, typed: list[str]) -> dict[str, Any]:
        settings = [setting for setting in read_settings(recipe, typed) if setting.key != "env"]
        parsed = parse_command(tool, recipe, settings)
        if tool in METHODS:
            check_training(tool, parsed)
        free = LAUNCH_KEYS | _free_to_change(command_of(tool, settings))
        values = {key: plain(value) for key, value in parsed.values.items() if key not in free}
        if "ranker_settings" in values:  # of `prefopt evaluate`: keys of `prefopt rank`
            free = LAUNCH_KEYS | _free_to_change("rank")
            values["ranker_settings"] = {k: v for k, v in values["ranker_settings"].items() if k not in free}
        return {"command": tool, **_replaced(without_secrets(values), self._without_run_dir)}

    def _typed(self, value: Any) -> str:
        """Write a value as it is typed on the command line."""
        value = _replaced(value, lambda item: str(self.run_dir / item.path) if isinstance(item, Place) else item)
        as_json = value is None or isinstance(value, (bool, dict, list))
        return json.dumps(value, ensure_ascii=False) if as_json else str(value)

    def _without_run_dir(self, value: Any) -> Any:
        """Replace the run's folder at the start of a path, so that a run may be moved."""
        inside = isinstance(value, str) and f"{value}/".startswith(f"{self.run_dir}/")
        return f"RUN{value.removeprefix(str(self.run_dir))}" if inside else value


def _local_path(name: Any) -> Path:
    if not isinstance(name, str):
        raise ValueError(f"expected a name or a path, found {name!r}; a number needs quotes.")
    return user_path(name)


def _free_to_change(command: str) -> frozenset[str]:
    """Return the keys of a command that do not decide its result, so that changing them makes nothing again."""
    if command in TRAININGS:
        return FREE_IN_TRAINING
    return names_without_effect(*arguments_of(command))


def _replaced(value: Any, replace_leaf: Callable[[Any], Any]) -> Any:
    """Apply a function to every value in nested mappings and lists."""
    if isinstance(value, dict):
        return {key: _replaced(item, replace_leaf) for key, item in value.items()}
    if isinstance(value, list):
        return [_replaced(item, replace_leaf) for item in value]
    return replace_leaf(value)


# ---- checks before anything is started


def command_of(tool: str, settings: Sequence[Setting]) -> str:
    """Return the command whose keys `tool` reads: itself, or the method that `score-references` scores for."""
    if COMMANDS[tool].arguments:
        return tool
    return check_method(next((str(s.value) for s in reversed(settings) if s.key == "method"), None))


def parse_command(tool: str, recipe: str | None, settings: list[Setting]) -> Recipe:
    """Parse the settings of a command: every key is known and of the right type, and a tool's own checks pass.

    Raises:
        ValueError: the first problem.
    """
    settings = [setting for setting in settings if setting.key not in LAUNCH_KEYS]
    name = command_of(tool, settings)
    classes = arguments_of(name)
    if COMMANDS[tool].aliases:
        names = getattr(importlib.import_module(COMMANDS[tool].module), COMMANDS[tool].aliases)
        settings = [replace(setting, key=names.get(setting.key, setting.key)) for setting in settings]
    problems: list[str] = []
    parsed = collect(recipe, settings, classes, problems)
    if problems:
        raise ValueError(problems[0])
    if name not in TRAININGS:  # a training config reads this machine's devices, which need not be those of the run
        build(parsed, classes)
    return parsed


def check_training(method: str, parsed: Recipe) -> None:
    """Check a method's settings now; its own checks come only once its data are sampled and ranked.

    They run in a child process, because a training config sets up devices and reads variables of launchers.

    Raises:
        ValueError: they are invalid.
    """
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_send_problem, args=(method, parsed, sending))
    process.start()
    sending.close()
    try:
        problem = receiving.recv()
    except EOFError:
        problem = f"the check of the settings of {method} ended without an answer; its last words are above."
    process.join()
    if problem:
        raise ValueError(problem)


def _send_problem(method: str, parsed: Recipe, answer: Connection) -> None:
    values = config_values(parsed)
    # the machine that trains may have a GPU and bf16 where this one has none
    values |= {"use_cpu": True, "bf16": values.get("bf16", not values.get("fp16"))}
    config_class = arguments_of(method)[0]
    trainer_class: Any = function_of(method)
    problem = None
    warnings.simplefilter("ignore")  # the command itself will show them
    try:
        values |= batch_sizes(values, config_class, processes=1)
        (config,) = build(Recipe(parsed.name, values, parsed.places), [config_class])
        trainer_class.check_settings(config)
    except ValueError as error:
        problem = str(error)
    answer.send(problem)


def check_method(name: Any) -> str:
    """Return the training command called `name`.

    Raises:
        ValueError: there is none.
    """
    if name is not None and not isinstance(name, str):
        raise ValueError(f"method: expected the name of a training method, found {name!r}.")
    clean = (name or "").replace("_", "-")
    if clean not in METHODS:
        raise ValueError(unknown_key(name, list(METHODS)).replace("key", "method") + ".")
    return clean


def check_left_to_loop(name: str, settings: Mapping[str, Any], own: Sequence[str]) -> None:
    """Raise a ValueError where a mapping of a loop's recipe holds one of the keys that the loop itself sets."""
    if taken := [key for key in own if key in settings]:
        raise ValueError(f"{name}: {taken[0]} is set by the loop; leave it out.")


# ---- the stages that both loops have


class LoopPlan:
    """Puts the stages of a loop together, in order.

    Attributes:
        stages: what has been added so far.
    """

    def __init__(self, commands: Commands) -> None:
        self.commands = commands
        self.stages: list[Stage] = []

    def add(
        self, name: str, tool: str, settings: Mapping[str, Any], *, after: Sequence[Place] = (), **more: Any
    ) -> Place:
        """Append a stage and return its folder.

        Args:
            name: also its folder.
            tool: its command.
            settings: its keys, and `recipe`. Earlier stages in whose folders they name a `Place` are those it needs.
            after: folders of further stages that it needs.
            more: see `Commands.stage`.
        """
        keys = {**settings, "output_dir": Place(name)}
        recipe = keys.pop("recipe", None)
        places = [*_places(keys), *after]
        needs = [s.name for place in places for s in self.stages if f"{place.path}/".startswith(f"{s.name}/")]
        unique = tuple(dict.fromkeys(needs))
        self.stages.append(self.commands.stage(name, tool, keys, recipe=recipe, needs=unique, **more))
        return Place(name)

    def generate(self, name: str, policy: Model, settings: Mapping[str, Any]) -> Place:
        """Add the sampling of a policy's answers to the prompts that `settings` name."""
        keys = {"model_name_or_path": policy, **settings}
        return self.add(name, "generate", keys, outputs=CANDIDATES, inputs=(policy, settings["prompts"]))

    def rank(self, name: str, candidates: Place, ranking: Mapping[str, Any]) -> Place:
        """Add the scoring of answers."""
        keys = {"candidates": candidates, **ranking}
        return self.add(name, "rank", keys, outputs=CANDIDATES, inputs=_ranker_files(ranking))

    def train(
        self,
        name: str,
        method: str,
        start: Model,
        settings: Mapping[str, Any],
        *,
        inputs: Sequence[Model | None] = (),
        outputs: Sequence[str] = MODEL,
    ) -> Place:
        """Add a training, which continues from its last checkpoint when it was stopped; its folder is the model."""
        keys = {**settings, "model_name_or_path": start, "resume_from_checkpoint": True}
        return self.add(name, method, keys, outputs=outputs, inputs=(start, *inputs))

    def evaluate(self, number: int, ranking: Mapping[str, Any], more: Mapping[str, Any]) -> None:
        """Add the comparison of an iteration's answers with earlier ones, and the report so far."""
        prefix = f"iteration-{number}"
        opponents = {"base": Place("base/answers")}
        if number > 1:
            opponents["previous"] = Place(f"iteration-{number - 1}/answers")
        of_ranker = {key: value for key, value in ranking.items() if not key.startswith(("push", "hub"))}
        keys = {
            "answers": Place(f"{prefix}/answers"),
            "opponents": opponents,
            "ranker": of_ranker.pop("ranker", ""),
            "ranker_model": of_ranker.pop("model_name_or_path", ""),
            "ranker_settings": {key: value for key, value in of_ranker.items() if key not in LAUNCH_KEYS},
            **{key: value for key, value in of_ranker.items() if key in LAUNCH_KEYS},
            **more,
        }
        outputs, inputs = (EVALUATION_FILE,), _ranker_files(ranking)
        evaluated = self.add(f"{prefix}/evaluate", "evaluate", keys, outputs=outputs, inputs=inputs)
        keys = {"run_dir": Place("."), "iterations": number}
        self.add(f"{prefix}/report", "report", keys, outputs=("report.md",), after=(evaluated,))


def _places(value: Any) -> Iterator[Place]:
    if isinstance(value, Place):
        yield value
    elif isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _places(item)


def _ranker_files(ranking: Mapping[str, Any]) -> tuple[Model | None, ...]:
    """Return what a ranker reads that may be local: a model's folder or the file of a function, and a template."""
    name = ranking.get("model_name_or_path")
    if isinstance(name, str) and ".py:" in name:
        name = name.rpartition(":")[0]
    return name, ranking.get("judge_template")


def as_script(stages: Sequence[Stage]) -> str:
    """Write stages as a shell script for machines where the runner does not run: in order, up to the first failure.

    Each command continues its own unfinished work; nothing is skipped, and no rule ends the script early. Secrets are
    masked, and a comment says so.
    """
    lines = [
        "#!/usr/bin/env bash",
        "# Written by `prefopt pipeline --write_script`: stages of the run, in order.",
        "set -euo pipefail",
    ]
    for stage in stages:
        after = f" (after {', '.join(stage.needs)})" if stage.needs else ""
        lines += ["", f"# {stage.name}{after}"]
        if MASK in stage.line:
            lines.append(f"# {MASK} stands for a secret: name it by an environment variable, such as $HF_TOKEN")
        lines.append(stage.line)
    return "\n".join(lines) + "\n"
