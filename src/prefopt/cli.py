"""The command line: `prefopt COMMAND [RECIPE] [--key value ...]`; `scripts/*.py` call the same function."""

from __future__ import annotations

import dataclasses
import importlib
import os
import sys
import time
import warnings
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from prefopt.launch import (
    USER_MISTAKE,
    launch,
    exit_process,
    rank,
    split_launch_settings,
    print_on_main,
    without_launch_words,
)
from prefopt.recipes.convert import unknown_key
from prefopt.recipes.recipe import build, load_settings, parse_settings
from prefopt.recipes.source import Setting


class Command(NamedTuple):
    """Where a command lives.

    A method's dataclass is its trainer's config, and its function is the trainer. A tool's function takes an instance
    of each of its
    dataclasses; one without dataclasses takes the words of the command line, since its keys depend on them.
    """

    summary: str
    module: str
    arguments: tuple[str, ...]
    function: str
    several: bool = False  # may run on several processes
    rows: str = ""  # what a method trains on
    aliases: str = ""  # the module's table of older names of its keys

    @property
    def is_method(self) -> bool:
        """Whether the command trains a model."""
        return bool(self.rows)


def _method(summary: str, module: str, name: str, rows: str = "pairs") -> Command:
    return Command(
        summary, f"prefopt.trainers.{module}", (f"{name}Config",), f"{name}Trainer", several=True, rows=rows
    )


COMMANDS: dict[str, Command] = {
    "dpo": _method("direct preference optimization, with any pairwise loss", "dpo", "DPO"),
    "wpo": _method("weighted preference optimization", "wpo", "WPO"),
    "sppo": _method("self-play preference optimization, and GPO", "sppo", "SPPO"),
    "multi-reference-dpo": _method("DPO against several reference models", "multi_reference", "MultiReferenceDPO"),
    "reward-model": _method("a scalar reward model", "reward", "Reward", "comparisons"),
    "adversarial-reward-model": _method(
        "the reward model of adversarial preference optimization", "reward", "AdversarialReward", "comparisons"
    ),
    "general-preference-model": _method(
        "a general preference model", "general_preference", "GeneralPreference", "comparisons"
    ),
    "rrhf": _method("ranking of scored answers by their likelihood", "rrhf", "RRHF", "comparisons"),
    "generate": Command(
        "sample candidates from a model",
        "prefopt.candidates.generate",
        ("GenerateArguments",),
        "run",
        several=True,
        aliases="FLAG_ALIASES",
    ),
    "rank": Command(
        "score candidates", "prefopt.candidates.rank", ("RankArguments",), "run", several=True, aliases="FLAG_ALIASES"
    ),
    "build-pairs": Command(
        "choose pairs among scored candidates", "prefopt.candidates.build_pairs", ("BuildPairsArguments",), "run"
    ),
    "build-rows": Command(
        "make training rows that are no pairs: best of n, scored answers, golden against sampled answers",
        "prefopt.candidates.build_rows",
        ("BuildRowsArguments",),
        "run",
    ),
    "convert": Command(
        "read and write other projects' data formats", "prefopt.candidates.convert", ("ConvertArguments",), "run"
    ),
    "split": Command("split prompts into disjoint sets", "prefopt.candidates.split", ("SplitArguments",), "run"),
    "score-references": Command(
        "fill the cache of reference scores",
        "prefopt.score_references",
        (),
        "run",
        several=True,
    ),
    "evaluate": Command(
        "evaluate a model", "prefopt.evaluation.evaluate", ("EvaluateArguments",), "run", several=True
    ),
    "report": Command("write a report about runs", "prefopt.evaluation.report", ("ReportArguments",), "run"),
    "sweep": Command("run a recipe over a grid of settings", "prefopt.pipelines.sweep", ("SweepArguments",), "run"),
    "pipeline": Command("run a resumable loop of stages", "prefopt.pipelines.run", (), "run"),
    "sft": Command(
        "supervised fine-tuning with TRL's trainer",
        "prefopt.trainers.sft",
        ("SFTArguments", "SFTConfig", "ModelConfig"),
        "run",
        several=True,
    ),
    "check": Command("show what a recipe would run, and what would stop it", "prefopt.check", (), "run"),
}
# said of names that TRL, accelerate and DeepSpeed use, over and over; nothing that a user could mend
LIBRARY_WARNINGS = ("`gradient_checkpointing", "`torch.distributed")
METHODS = tuple(name for name, command in COMMANDS.items() if command.is_method)


def main(words: list[str] | None = None) -> int:
    """Run one command.

    Args:
        words: command-line words, `sys.argv[1:]` by default; the first is the command's name.

    Returns:
        The exit status: 0, or 2 after a user's mistake, which is told in one line on stderr.
    """
    words = list(sys.argv[1:] if words is None else words)
    try:
        return _run(words)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:  # the last: a loss that is not finite
        if os.environ.get("PREFOPT_TRACEBACK"):
            raise
        _tell(error)
        return USER_MISTAKE


def arguments_of(name: str) -> tuple[type, ...]:
    """The dataclasses whose fields are the keys of the command `name`; imports its module."""
    command = COMMANDS[name]
    module = importlib.import_module(command.module)
    own = tuple(getattr(module, argument) for argument in command.arguments)
    if not command.is_method:
        return own
    from prefopt.training import shared_arguments

    return (*own, *shared_arguments())


def method_of(settings: list[Setting]) -> str:
    """The method that settings are for: their key `method`, taken out unless a config has it.

    Raises:
        ValueError: there is no such key, or no such method.
    """
    named = [setting for setting in settings if setting.key == "method"]
    if not named and any(setting.key == "pipeline" for setting in settings):
        raise ValueError(
            "this is the recipe of a loop: `prefopt pipeline RECIPE --dry_run` checks it and shows its stages."
        )
    if not named:
        raise ValueError(f"the recipe does not say for which method it is: add --method ({', '.join(METHODS)}).")
    name = str(named[-1].value).replace("_", "-")
    if name not in METHODS:
        raise ValueError(f"{named[-1].place}: {unknown_key(name, list(METHODS)).replace('key', 'method')}")
    return name


def function_of(name: str) -> Callable[..., Any]:
    """What the command `name` calls: a tool's function or a method's trainer class."""
    command = COMMANDS[name]
    return getattr(importlib.import_module(command.module), command.function)


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if words[0] == "--version":
        from prefopt import __version__

        print(__version__)
        return 0
    name, rest = words[0], words[1:]
    if name not in COMMANDS:
        near = get_close_matches(name, COMMANDS, n=1)
        raise ValueError(
            f"unknown command {name!r}; " + (f"did you mean {near[0]!r}?" if near else "`prefopt --help` lists them.")
        )
    if "-h" in rest or "--help" in rest:
        print(_help(name))
        return 0
    return _run_command(name, rest)


def _run_command(name: str, words: list[str]) -> int:
    for message in LIBRARY_WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=FutureWarning)
    command = COMMANDS[name]
    if not command.arguments:
        return int(function_of(name)(words) or 0)
    recipe_name, settings = load_settings(words)
    launch_settings, settings = split_launch_settings(settings)
    if launch_settings and not command.several:
        raise ValueError(f"`prefopt {name}` runs in one process: remove {', '.join(sorted(launch_settings))}.")
    classes = arguments_of(name)
    if command.aliases:
        names = getattr(importlib.import_module(command.module), command.aliases)
        settings = [dataclasses.replace(setting, key=names.get(setting.key, setting.key)) for setting in settings]
    recipe = parse_settings(recipe_name, settings, classes)
    if launch_settings:
        return launch(launch_settings, [name, *without_launch_words(words)])
    for notice in recipe.notices:
        print_on_main(notice)
    if command.is_method:
        from prefopt.training import train

        train(name, function_of(name), command.rows, recipe, classes)
    else:
        function_of(name)(*build(recipe, classes))
    return 0


def _tell(error: Exception) -> None:
    """One line on stderr, from the first process; another one speaks up only if it was not stopped meanwhile."""
    if rank() != 0:
        time.sleep(10)  # all processes usually meet the same mistake, and the launcher stops the rest
    message = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        message = f"{error.filename}: {error.strerror}."
    print(f"prefopt: error: {message}", file=sys.stderr, flush=True)


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = ["usage: prefopt COMMAND [RECIPE] [--key value | --key=value ...]", ""]
    for title, wanted in (("methods", True), ("tools", False)):
        lines.append(f"{title}:")
        lines += [
            f"  {name:<{width}}  {command.summary}"
            for name, command in COMMANDS.items()
            if command.is_method == wanted
        ]
        lines.append("")
    lines += [
        "A recipe is a YAML file or the name of a packaged one, such as llama3/wpo; the command line wins over it.",
        "On several GPUs: --num_processes 8 [--accelerate_config deepspeed_zero3], or start scripts/run_METHOD.py "
        "with accelerate.",
        "`prefopt COMMAND --help` lists the keys of a command.",
    ]
    return "\n".join(lines)


def _help(name: str) -> str:
    lines = [f"usage: prefopt {name} [RECIPE] [--key value | --key=value ...]", "", f"{COMMANDS[name].summary}", ""]
    if not COMMANDS[name].arguments:
        lines.append(str(importlib.import_module(COMMANDS[name].module).__doc__))
    seen: set[str] = set()
    for cls in arguments_of(name):
        lines.append(f"{cls.__name__}:")
        for field in sorted(dataclasses.fields(cls), key=lambda field: field.kw_only):  # those of mixins come last
            if not field.init or field.name in seen:
                continue
            seen.add(field.name)
            default = "" if field.default in (dataclasses.MISSING, None) else f" (default: {field.default})"
            text = " ".join(str(field.metadata.get("help", "")).replace("%%", "%").split())
            lines.append(f"  --{field.name}{default}" + (f"\n      {text}" if text else ""))
        lines.append("")
    return "\n".join(lines)


def script(command: str) -> None:
    """The body of `scripts/*.py`: run `command` with the words after the script's name, and leave with its status."""
    folder = Path(sys.argv[0]).resolve().parent
    sys.path[:] = [
        path for path in sys.path if Path(path or ".").resolve() != folder
    ]  # scripts/evaluate.py is no module
    exit_process(main([command, *sys.argv[1:]]))


if __name__ == "__main__":
    sys.exit(main())
