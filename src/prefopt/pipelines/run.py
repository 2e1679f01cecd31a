"""`prefopt pipeline RECIPE`: plan a loop, show it, write it as a script, or run it.

Keys of every loop: pipeline (self-play, adversarial), run_dir, launchers. A recipe's nested settings may be given one
by one with a dot,
`--training.beta 0.01`, in the recipe (`training.beta: 0.01`) and on the command line.

  --dry_run            show the stages, their commands, and which of them would run
  --from STAGE         do this stage and all after it again (a name, or its beginning: iteration-2)
  --until STAGE        end after this stage
  --write_script FILE  write all commands (those from --from to --until) as a shell script
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from prefopt.files import write_text
from prefopt.launch import LAUNCH_KEYS
from prefopt.pipelines.commands import Commands, as_script
from prefopt.pipelines.stages import Runner, Stage, table
from prefopt.recipes.convert import parsed, unknown_key
from prefopt.recipes.recipe import build, load_settings, parse_settings, plain
from prefopt.recipes.source import Setting

RECIPE_FILE = "pipeline.yaml"


class Loop(NamedTuple):
    """Where a loop lives: its module, the dataclass of its keys, and (optionally) functions that check its data and end it early."""

    module: str
    keys: str
    check: str | None = None  # (loop) -> counts to be told
    stop_after: str | None = None  # (stage, run_dir) -> reason or None


LOOPS = {
    "self-play": Loop("prefopt.pipelines.self_play", "SelfPlayLoop", stop_after="stop_after"),
    "adversarial": Loop("prefopt.pipelines.adversarial", "AdversarialLoop", check="check_data"),
}
ALIASES = {"from": "first", "until": "last"}


@dataclass
class PipelineArguments:
    """The keys of every pipeline."""

    pipeline: str = field(default="", metadata={"help": f"Which loop: {', '.join(LOOPS)}."})
    run_dir: str = field(
        default="", metadata={"help": "Folder of the run: its state, logs, and every stage's results."}
    )
    launchers: dict[str, str] = field(
        default_factory=dict,
        metadata={
            "help": "Kind of stage (the last part of its name) -> what is typed instead of `prefopt`, such as "
            "{generate: .venv-vllm/bin/python -m prefopt}."
        },
    )
    dry_run: bool = field(default=False, metadata={"help": "Show what would be done."})
    write_script: str | None = field(default=None, metadata={"help": "Write all commands to this file."})
    first: str | None = field(default=None, metadata={"help": "Do again from this stage on (--from)."})
    last: str | None = field(default=None, metadata={"help": "End after this stage (--until)."})

    def __post_init__(self) -> None:
        for name in ("pipeline", "run_dir"):
            if not getattr(self, name):
                raise ValueError(f"{name} is missing: set it in the recipe or with --{name}.")


def run(words: list[str]) -> int:
    """Do what the command line says.

    Raises:
        ValueError: a mistake in the recipe, or a stage that failed.
    """
    name, settings = load_settings(words)
    arguments, loop, resolved = read_pipeline(name, settings)
    run_dir = Path(arguments.run_dir).expanduser()
    entry = LOOPS[arguments.pipeline]
    module = importlib.import_module(entry.module)
    stages: list[Stage] = module.stages_of(loop, Commands(run_dir, arguments.launchers))
    check_launchers(arguments.launchers, stages)
    if entry.check is not None:
        counts = getattr(module, entry.check)(loop)
        print(f"pipeline: {', '.join(f'{number} {what}' for what, number in counts.items())}")
    rule = getattr(module, entry.stop_after) if entry.stop_after is not None else None
    runner = Runner(
        stages,
        run_dir,
        stop_after=lambda stage: rule(stage, run_dir) if rule is not None else None,
        begin=lambda: write_text(run_dir / RECIPE_FILE, resolved),
    )
    if arguments.write_script is not None:
        chosen = runner.selected(arguments.first, arguments.last)
        write_text(arguments.write_script, as_script(chosen))
        Path(arguments.write_script).chmod(0o755)
        print(f"pipeline: {len(chosen)} commands written to {arguments.write_script}")
    if arguments.dry_run:
        planned = runner.plan(arguments.first, arguments.last)
        print(table(planned))
        print("\n".join(f"\n# {item.stage.name}\n{item.stage.line}" for item in planned))
    elif arguments.write_script is None:
        runner.run(arguments.first, arguments.last)
    return 0


def read_pipeline(name: str | None, settings: list[Setting]) -> tuple[PipelineArguments, Any, str]:
    """The settings of a pipeline's recipe: what every loop has, the loop's own keys, and all of them as YAML.

    Raises:
        ValueError: a mistake in the recipe.
    """
    settings = [replace(setting, key=ALIASES.get(setting.key, setting.key)) for setting in folded(settings)]
    kinds = [setting for setting in settings if setting.key == "pipeline"]
    if not kinds:
        raise ValueError(f"{name or 'the command line'}: pipeline is missing: {', '.join(LOOPS)}.")
    if kinds[-1].value not in LOOPS:
        raise ValueError(f"{kinds[-1].place}: {unknown_key(kinds[-1].value, list(LOOPS)).replace('key', 'pipeline')}.")
    launching = [setting for setting in settings if setting.key in LAUNCH_KEYS]
    if launching:
        raise ValueError(
            f"{launching[0].place}: {launching[0].key} belongs to one kind of stage: write "
            f"training.{launching[0].key}."
        )
    entry = LOOPS[str(kinds[-1].value)]
    keys = getattr(importlib.import_module(entry.module), entry.keys)
    recipe = parse_settings(name, settings, (PipelineArguments, keys))
    arguments, loop = build(recipe, (PipelineArguments, keys))
    values = {k: plain(v) for k, v in recipe.values.items() if k not in ("dry_run", "write_script", "first", "last")}
    return arguments, loop, yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def folded(settings: list[Setting]) -> list[Setting]:
    """The settings with every `training.beta: 0.01` put into the mapping `training` of the sources before it.

    Raises:
        ValueError: the key before the dot holds something else.
    """
    outers = dict.fromkeys(setting.key.partition(".")[0] for setting in settings if "." in setting.key)
    result = [setting for setting in settings if setting.key.partition(".")[0] not in outers]
    for outer in outers:
        parts = [setting for setting in settings if setting.key.partition(".")[0] == outer]
        parts.sort(key=lambda setting: (setting.level, "." in setting.key))
        value: Any = {}
        for part in parts:
            path = part.key.split(".")[1:]
            value = _put(value, path, _value(part.value), f"{part.place}: {part.key}")
        result.append(Setting(outer, value, parts[-1].place, parts[-1].level))
    return result


def _put(mapping: Any, path: list[str], value: Any, where: str) -> Any:
    """`mapping` with `value` at the end of `path`."""
    if not path:
        return value
    if not isinstance(mapping, dict):
        raise ValueError(f"{where}: what is before {path[0]!r} is no mapping.")
    return {**mapping, path[0]: _put(mapping.get(path[0], {}), path[1:], value, where)}


def _value(value: Any) -> Any:
    if isinstance(value, list):
        return [_value(item) for item in value]
    return parsed(value)


def check_launchers(launchers: dict[str, str], stages: list[Stage]) -> None:
    """Refuse a launcher for a kind of stage that the run does not have."""
    kinds = list(dict.fromkeys(stage.name.rsplit("/", 1)[-1] for stage in stages))
    for kind in launchers:
        if kind not in kinds:
            raise ValueError(
                f"launchers: {unknown_key(kind, kinds).replace('key', 'kind of stage')}; there are {', '.join(kinds)}."
            )
