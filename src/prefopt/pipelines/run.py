"""`prefopt pipeline RECIPE`: plan a loop, show it, write it as a script, or run it.

Keys of every loop: pipeline (self-play, adversarial), run_dir, launchers. A recipe's nested settings may be given one
by one with a dot, `--training.beta 0.01`, in the recipe (`training.beta: 0.01`) and on the command line.

  --dry_run            show the stages, their commands, and which of them would run
  --from STAGE         do this stage and all after it again (a name, or its beginning: iteration-2)
  --until STAGE        end after this stage
  --write_script FILE  write all commands (those from --from to --until) as a shell script
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from prefopt.arguments import check_settings, setting, without_secrets
from prefopt.files import user_path, write_text
from prefopt.launch import LAUNCH_KEYS
from prefopt.pipelines import adversarial, self_play
from prefopt.pipelines.commands import Commands, as_script
from prefopt.pipelines.stages import Runner, Stage, table
from prefopt.recipes.convert import parsed, unknown_key
from prefopt.recipes.recipe import build, load_settings, parse_settings, plain
from prefopt.recipes.source import Setting

RECIPE_FILE = "pipeline.yaml"
ALIASES = {"from": "first", "until": "last"}
# Keys that say what is done now; the others describe the run and are written to its folder.
OF_ONE_CALL = ("dry_run", "write_script", "first", "last")


class Loop(NamedTuple):
    """A loop: the dataclass of its keys, its stages, and how it checks its data and ends early, if it does."""

    keys: type
    stages_of: Callable[[Any, Commands], list[Stage]]
    check_data: Callable[[Any], dict[str, int]] = lambda loop: {}
    stop_after: Callable[[Stage, Path], str | None] = lambda stage, run_dir: None


LOOPS = {
    "self-play": Loop(self_play.SelfPlayLoop, self_play.stages_of, stop_after=self_play.stop_after),
    "adversarial": Loop(adversarial.AdversarialLoop, adversarial.stages_of, adversarial.check_data),
}


@dataclass
class PipelineArguments:
    """The keys of every pipeline."""

    pipeline: str = setting("", f"Which loop: {', '.join(LOOPS)}.", required=True)
    run_dir: str = setting("", "Folder of the run: its state, logs, and every stage's results.", required=True)
    launchers: dict[str, str] = setting(
        factory=dict,
        help="Kind of stage (the last part of its name) -> what is typed instead of `prefopt`, such as {generate: "
        ".venv-vllm/bin/python -m prefopt}.",
    )
    dry_run: bool = setting(False, "Show what would be done.")
    write_script: str | None = setting(None, "Write all commands to this file.")
    first: str | None = setting(None, "Do again from this stage on (--from).")
    last: str | None = setting(None, "End after this stage (--until).")

    def __post_init__(self) -> None:
        check_settings(self)
        for kind, words in self.launchers.items():
            try:
                usable = bool(shlex.split(words))
            except ValueError:
                usable = False
            if not usable:
                raise ValueError(f"launchers: {kind}: {words!r} is no command line; see its quotes.")


def run(words: list[str]) -> int:
    """Run `prefopt pipeline` with the words of the command line.

    Raises:
        ValueError: a mistake in the recipe, or a stage that failed.
    """
    name, settings = load_settings(words)
    arguments, loop, resolved = read_pipeline(name, settings)
    run_dir = user_path(arguments.run_dir)
    if run_dir.exists() and not run_dir.is_dir():
        raise ValueError(f"run_dir {run_dir} is a file; name a folder.")
    if arguments.write_script is not None and Path(arguments.write_script).is_dir():
        raise ValueError(f"write_script {arguments.write_script} is a folder; name a file.")
    entry = LOOPS[arguments.pipeline]
    stages = entry.stages_of(loop, Commands(run_dir, arguments.launchers))
    check_launchers(arguments.launchers, stages)
    if counts := entry.check_data(loop):
        print(f"pipeline: {', '.join(f'{number} {what}' for what, number in counts.items())}")
    runner = Runner(
        stages,
        run_dir,
        stop_after=lambda stage: entry.stop_after(stage, run_dir),
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
    """Read a pipeline's recipe; return the keys of every loop, the loop's own, and all of them as YAML.

    Raises:
        ValueError: a mistake in the recipe.
    """
    if bare := [item.key for item in settings if item.bare and item.key in ("pipeline", *ALIASES)]:
        raise ValueError(f"--{bare[0]} needs a value.")
    settings = [replace(item, key=ALIASES.get(item.key, item.key)) for item in folded(settings)]
    kinds = [item for item in settings if item.key == "pipeline"]
    if not kinds:
        raise ValueError(f"{name or 'the command line'}: pipeline is missing: {', '.join(LOOPS)}.")
    if not isinstance(kinds[-1].value, str):
        raise ValueError(f"{kinds[-1].place}: pipeline: expected one name, found {kinds[-1].value!r}.")
    if kinds[-1].value not in LOOPS:
        raise ValueError(f"{kinds[-1].place}: {unknown_key(kinds[-1].value, list(LOOPS)).replace('key', 'pipeline')}.")
    if launching := [item for item in settings if item.key in LAUNCH_KEYS]:
        place, key = launching[0].place, launching[0].key
        raise ValueError(f"{place}: {key} belongs to one kind of stage: write training.{key}.")
    classes = (PipelineArguments, LOOPS[str(kinds[-1].value)].keys)
    recipe = parse_settings(name, settings, classes)
    arguments, loop = build(recipe, classes)
    values = {key: plain(value) for key, value in recipe.values.items() if key not in OF_ONE_CALL}
    return arguments, loop, yaml.safe_dump(without_secrets(values), sort_keys=False, allow_unicode=True)


def folded(settings: list[Setting]) -> list[Setting]:
    """Put every `training.beta: 0.01` into the mapping `training` of the sources before it.

    Raises:
        ValueError: the key before the dot holds something else.
    """
    outers = dict.fromkeys(item.key.partition(".")[0] for item in settings if "." in item.key)
    result = [item for item in settings if item.key.partition(".")[0] not in outers]
    for outer in outers:
        parts = [item for item in settings if item.key.partition(".")[0] == outer]
        parts.sort(key=lambda item: (item.level, "." in item.key))
        value: Any = {}
        for part in parts:
            where = f"{part.place}: {part.key}"
            try:
                given = _parsed(part.value)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
            value = _put(value, part.key.split(".")[1:], given, where)
        result.append(Setting(outer, value, parts[-1].place, parts[-1].level))
    return result


def _put(mapping: Any, path: list[str], value: Any, where: str) -> Any:
    """Return `mapping` with `value` at the end of `path`."""
    if not path:
        return value
    if not isinstance(mapping, dict):
        raise ValueError(f"{where}: what is before {path[0]!r} is no mapping.")
    return {**mapping, path[0]: _put(mapping.get(path[0], {}), path[1:], value, where)}


def _parsed(value: Any) -> Any:
    if isinstance(value, list):
        return [_parsed(item) for item in value]
    return parsed(value)


def check_launchers(launchers: dict[str, str], stages: list[Stage]) -> None:
    """Raise a ValueError where a launcher is named for a kind of stage that the run does not have."""
    kinds = list(dict.fromkeys(stage.name.rsplit("/", 1)[-1] for stage in stages))
    for kind in launchers:
        if kind not in kinds:
            raise ValueError(
                f"launchers: {unknown_key(kind, kinds).replace('key', 'kind of stage')}; there are {', '.join(kinds)}."
            )
