"""The command line: `prefopt COMMAND [RECIPE] [--key value ...]`; `scripts/*.py` call the same function."""

from __future__ import annotations

import dataclasses
import importlib
import os
import sys
import time
import warnings
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from prefopt import __version__
from prefopt.arguments import masked
from prefopt.launch import (
    USER_MISTAKE,
    end_with_launcher,
    exit_process,
    is_launched,
    launch,
    print_on_main,
    rank,
    split_launch_settings,
    without_launch_words,
)
from prefopt.pages import printable
from prefopt.progress import library_bars
from prefopt.recipes.convert import unknown_key
from prefopt.recipes.help import keys_help
from prefopt.recipes.recipe import BEFORE_TRAINING, before_training, build, load_settings, parse_settings
from prefopt.recipes.source import Setting


@dataclass(frozen=True)
class Command:
    """Where a command lives.

    A method's dataclass is its trainer's config, and its function is the trainer. A tool's function takes an instance
    of each of its dataclasses; one without dataclasses takes the words of the command line, since its keys depend on
    them.
    """

    summary: str
    module: str
    arguments: tuple[str, ...] = ()
    function: str = "run"
    rows: Literal["", "pairs", "comparisons"] = ""  # what a method trains on; tools have none
    launched: bool = False  # a tool that may run on several processes, as every method may
    aliases: str = ""  # the module's table of older names of its keys
    positional: str = ""  # the key of the words before the first option, which are no recipe here

    @property
    def is_method(self) -> bool:
        """Return whether the command trains a model."""
        return bool(self.rows)


# fmt: off
COMMANDS: dict[str, Command] = {
    "dpo": Command("direct preference optimization, with any pairwise loss", "prefopt.trainers.dpo",
                   ("DPOConfig",), "DPOTrainer", rows="pairs"),
    "wpo": Command("weighted preference optimization", "prefopt.trainers.wpo",
                   ("WPOConfig",), "WPOTrainer", rows="pairs"),
    "sppo": Command("self-play preference optimization, and GPO", "prefopt.trainers.sppo",
                    ("SPPOConfig",), "SPPOTrainer", rows="pairs"),
    "multi-reference-dpo": Command("DPO against several reference models", "prefopt.trainers.multi_reference",
                                   ("MultiReferenceDPOConfig",), "MultiReferenceDPOTrainer", rows="pairs"),
    "reward-model": Command("a scalar reward model", "prefopt.trainers.reward",
                            ("RewardConfig",), "RewardTrainer", rows="comparisons"),
    "adversarial-reward-model": Command("the reward model of adversarial preference optimization",
                                        "prefopt.trainers.reward", ("AdversarialRewardConfig",),
                                        "AdversarialRewardTrainer", rows="comparisons"),
    "general-preference-model": Command("a general preference model", "prefopt.trainers.general_preference",
                                        ("GeneralPreferenceConfig",), "GeneralPreferenceTrainer", rows="comparisons"),
    "rrhf": Command("ranking of scored answers by their likelihood", "prefopt.trainers.rrhf",
                    ("RRHFConfig",), "RRHFTrainer", rows="comparisons"),

    "generate": Command("sample candidates from a model", "prefopt.candidates.generate",
                        ("GenerateArguments",), launched=True, aliases="FLAG_ALIASES"),
    "rank": Command("score candidates", "prefopt.candidates.rank",
                    ("RankArguments",), launched=True, aliases="FLAG_ALIASES"),
    "build-pairs": Command("choose pairs among scored candidates", "prefopt.candidates.build_pairs",
                           ("BuildPairsArguments",)),
    "build-rows": Command("make rows that are no pairs: best of n, scored answers, golden against sampled",
                          "prefopt.candidates.build_rows", ("BuildRowsArguments",)),
    "convert": Command("read and write other projects' data formats", "prefopt.candidates.convert",
                       ("ConvertArguments",)),
    "split": Command("split prompts into disjoint sets", "prefopt.candidates.split", ("SplitArguments",)),
    "score-references": Command("fill the cache of reference scores", "prefopt.score_references", launched=True),
    "evaluate": Command("evaluate models: pairs, generations, benchmarks, suites of them",
                        "prefopt.evaluation.suite", ("SuiteArguments",), launched=True),
    "report": Command("show runs on one page: curves, data, evaluation, samples", "prefopt.reports.command",
                      ("ReportArguments",), positional="run_dir"),
    "sweep": Command("run a recipe over a grid of settings", "prefopt.pipelines.sweep", ("SweepArguments",)),
    "pipeline": Command("run a resumable loop of stages", "prefopt.pipelines.run"),
    "sft": Command("supervised fine-tuning with TRL's trainer", "prefopt.trainers.sft",
                   ("SFTArguments", "SFTConfig", "ModelConfig"), launched=True),
    "recipes": Command("list the packaged recipes", "prefopt.recipes.help", function="list_recipes"),
    "check": Command("show what a recipe would run, and what would stop it", "prefopt.check", function="check"),
}
# fmt: on
METHODS = tuple(name for name, command in COMMANDS.items() if command.is_method)
# FutureWarnings from inside TRL, accelerate and DeepSpeed that a user cannot act on
LIBRARY_WARNINGS = ("`gradient_checkpointing", "`torch.distributed")


def main(words: list[str] | None = None) -> int:
    """Run one command.

    Args:
        words: command-line words, `sys.argv[1:]` by default; the first is the command's name.

    Returns:
        The exit status: 0, or 2 after a user's mistake, which is printed in one line on stderr.
    """
    words = list(sys.argv[1:] if words is None else words)
    try:
        return _run(words)
    except BrokenPipeError:  # `prefopt recipes | head`: nobody reads any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, ImportError, FloatingPointError) as error:  # the last: a loss that is not finite
        if os.environ.get("PREFOPT_TRACEBACK"):
            raise
        _print_error(error)
        if BEFORE_TRAINING in getattr(error, "__notes__", ()) and not is_launched():
            _print_further_problems(words, first=error)
        return USER_MISTAKE


def script(command: str) -> None:
    """Run `command` with the words after the script's name, and exit with its status: the body of `scripts/*.py`."""
    folder = Path(sys.argv[0]).resolve().parent
    # the scripts' folder must not be searched: scripts/evaluate.py is not the package `evaluate`
    sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != folder]
    exit_process(main([command, *sys.argv[1:]]))


def arguments_of(name: str) -> tuple[type, ...]:
    """Return the dataclasses whose fields are the keys of the command `name`; imports its module."""
    command = COMMANDS[name]
    module = importlib.import_module(command.module)
    arguments = tuple(getattr(module, argument) for argument in command.arguments)
    if not command.is_method:
        return arguments
    from prefopt.training import shared_arguments

    return (*arguments, *shared_arguments())


def function_of(name: str) -> Any:
    """Return what the command `name` calls: a tool's function or a method's trainer class."""
    command = COMMANDS[name]
    return getattr(importlib.import_module(command.module), command.function)


def method_of(settings: list[Setting]) -> str:
    """Return the method that settings are for: the value of their key `method`.

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
    value = named[-1].value
    if isinstance(value, list):
        raise ValueError(f"method takes one word; the recipe comes first, as in: {value[1]} --method {value[0]}.")
    name = str(value).replace("_", "-")
    if name not in METHODS:
        raise ValueError(f"{named[-1].place}: {unknown_key(name, METHODS).replace('key', 'method')}")
    return name


def with_positional(command: Command, words: list[str]) -> list[str]:
    """Put the words before the first option under the key that they belong to, where the command reads no recipe."""
    count = next((place for place, word in enumerate(words) if word.startswith("-")), len(words))
    if not command.positional or not count:
        return words
    return [f"--{command.positional}", *words[:count], *words[count:]]


def with_current_names(name: str, settings: list[Setting]) -> list[Setting]:
    """Replace older names of a command's keys, which its module lists, by the current ones."""
    command = COMMANDS[name]
    if not command.aliases:
        return settings
    current = getattr(importlib.import_module(command.module), command.aliases)
    return [dataclasses.replace(setting, key=current.get(setting.key, setting.key)) for setting in settings]


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if words[0] == "--version":
        print(__version__)
        return 0
    name, rest = words[0], words[1:]
    if name not in COMMANDS:
        near = get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "`prefopt --help` lists them."
        raise ValueError(f"unknown command {name!r}; {hint}")
    if "-h" in rest or "--help" in rest:
        print(_help(name, everything="all" in rest))
        return 0
    return _run_command(name, rest)


def _run_command(name: str, words: list[str]) -> int:
    end_with_launcher()
    for message in LIBRARY_WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=FutureWarning)
    command = COMMANDS[name]
    if not command.arguments:
        return int(function_of(name)(words) or 0)
    recipe_name, settings = load_settings(with_positional(command, words))
    launch_settings, settings = split_launch_settings(settings)
    if launch_settings and not (command.launched or command.is_method):
        raise ValueError(f"`prefopt {name}` runs in one process: remove {', '.join(sorted(launch_settings))}.")
    classes = arguments_of(name)
    with before_training():
        recipe = parse_settings(recipe_name, with_current_names(name, settings), classes)
    if launch_settings:
        status = launch(launch_settings, [name, *without_launch_words(words)])
        if status == USER_MISTAKE:  # the processes print the first mistake that they meet
            _print_further_problems([name, *words])
        return status
    for notice in recipe.notices:
        print_on_main(notice)
    with library_bars(shown=not recipe.values.get("disable_tqdm")):
        if command.rows:
            from prefopt.training import train

            train(name, function_of(name), command.rows, recipe, classes)
        else:
            function_of(name)(*build(recipe, classes))
    return 0


def _print_error(error: Exception) -> None:
    """Print one line on stderr."""
    if rank() != 0:
        # All processes usually meet the same mistake, and the launcher stops the others when the first one ends; only
        # a process that is alone with its mistake is still here after this.
        time.sleep(10)
    message = _one_line(error)
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        message = f"{error.filename}: {error.strerror}."
    print(f"prefopt: error: {printable(masked(message))}", file=sys.stderr, flush=True)


def _print_further_problems(words: list[str], first: Exception | None = None) -> None:
    """Print what else would have stopped a training run, so that all of it can be corrected at once.

    Args:
        words: the command line.
        first: what has been printed; None where processes of a launcher have printed it: then one problem is that one.
    """
    name, rest = words[0], words[1:]
    if not COMMANDS[name].is_method:
        return
    inspect = importlib.import_module(COMMANDS["check"].module).inspect  # commands are imported when they are run
    problems: list[str] = []
    # the mistake itself has been printed: whatever goes wrong while looking for more must not hide it
    with suppress(Exception), open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        problems = inspect(rest, name).problems
    if first is None and len(problems) > 1:
        print(f"prefopt: all {len(problems)} problems of this run:", file=sys.stderr)
    for problem in problems if first is not None or len(problems) > 1 else []:
        if first is None or problem != _one_line(first):
            print(f"prefopt: error: {printable(masked(problem))}", file=sys.stderr, flush=True)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = ["usage: prefopt COMMAND [RECIPE] [--key value | --key=value ...]"]
    for title, wanted in (("methods", True), ("tools", False)):
        lines += ["", f"{title}:"]
        lines += [f"  {name:<{width}}  {c.summary}" for name, c in COMMANDS.items() if c.is_method == wanted]
    return "\n".join(lines) + (
        "\n\nA recipe is a YAML file or the name of a packaged one, such as llama3/wpo; the command line wins over it."
        "\nOn several GPUs: --num_processes 8 [--accelerate_config deepspeed_zero3], or start scripts/run_METHOD.py "
        "with accelerate.\n`prefopt COMMAND --help` lists the usual keys of a command, `--help all` every key; "
        "`prefopt recipes` lists the recipes."
    )


def _help(name: str, *, everything: bool) -> str:
    command = COMMANDS[name]
    first = "DIR [DIR ...]" if command.positional else "[RECIPE]"
    lines = [f"usage: prefopt {name} {first} [--key value | --key=value ...]", "", command.summary, ""]
    if command.is_method:
        words = "--model_name_or_path MODEL --dataset_name ROWS.jsonl --output_dir outputs/mine"
        lines += [f"example: prefopt {name} {words}", ""]
    if not command.arguments:
        return "\n".join([*lines, str(importlib.import_module(command.module).__doc__)])
    return "\n".join([*lines, keys_help(arguments_of(name), of_method=command.is_method, everything=everything)])


if __name__ == "__main__":
    sys.exit(main())
