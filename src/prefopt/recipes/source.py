"""Where settings come from: YAML files (with line numbers, one on top of another) and the command line."""

from __future__ import annotations

from dataclasses import dataclass, replace
from difflib import get_close_matches
from os.path import isdir, isfile  # unlike those of Path, False for a name too long to be one
from pathlib import Path
from typing import Any

from prefopt.files import read_yaml, user_path
from prefopt.recipes.convert import Text

PACKAGE = Path(__file__).resolve().parents[1]
BASE_KEY = "base_recipe"  # another recipe, or several, whose values this one overrides


@dataclass(frozen=True)
class Setting:
    """One key with its value and the place where the user wrote it."""

    key: str
    value: Any
    place: str  # "llama3/wpo.yaml, line 12" or "the command line"
    level: int  # a later source wins over an earlier one; the command line has the highest level
    bare: bool = False  # `--flag` without a value, which only a boolean may be


def packaged_names(folder: str) -> list[str]:
    """Return the names of the YAML files that the package ships in `folder`, without the ending: `llama3/wpo`, ..."""
    root = PACKAGE / folder
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))


def locate(name: str, folder: str) -> Path:
    """Find the file that `name` means: an existing path, or a packaged file named with or without folder and ending.

    Args:
        name: as typed, for instance `my.yaml`, `training_configs/llama3/wpo.yaml` or `llama3/wpo`.
        folder: "training_configs" or "accelerate_configs", where packaged files are looked up.

    Raises:
        ValueError: neither a file nor a packaged name; the message gives the nearest packaged name.
    """
    path = user_path(name)
    if isfile(path):
        return path
    if isdir(path):
        raise ValueError(f"{name} is a folder; a YAML file is needed.")
    if path.is_absolute():
        raise ValueError(f"{name} does not exist.")
    inside = name.removeprefix("./").removeprefix(f"{folder}/").removesuffix(".yaml").removesuffix(".yml")
    known = packaged_names(folder)
    if inside in known:
        return PACKAGE / folder / f"{inside}.yaml"
    near = get_close_matches(inside, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"packaged ones: {', '.join(known)}."
    raise ValueError(f"{name} is neither a file nor one of the packaged {folder}; {hint}")


def packaged_name(name: str) -> str | None:
    """Return the name of the packaged training recipe that `name` means; None for another file, or for none."""
    root = (PACKAGE / "training_configs").resolve()
    try:
        path = locate(name, "training_configs").resolve()
    except ValueError:
        return None
    return path.relative_to(root).with_suffix("").as_posix() if root in path.parents else None


def split_recipe(words: list[str]) -> tuple[str | None, list[str]]:
    """Split words into the recipe (the first word, or what follows `--config`) and the rest.

    Raises:
        ValueError: two recipes, or `--config` without one.
    """
    rest = list(words)
    recipe = rest.pop(0) if rest and not rest[0].startswith("-") else None
    for position, word in enumerate(rest):
        name, equals, attached = word.partition("=")
        if name != "--config":
            continue
        if recipe is not None:
            raise ValueError(f"two recipes: {recipe} and --config; give one.")
        if not equals and (position + 1 >= len(rest) or rest[position + 1].startswith("--")):
            raise ValueError("--config needs the path or the name of a recipe.")
        recipe = attached if equals else rest.pop(position + 1)
        del rest[position]
        break
    return recipe, rest


def read_settings(recipe: str | None, arguments: list[str]) -> list[Setting]:
    """Read all settings of a run, in the order of their sources: base recipes, the recipe, the command line.

    Args:
        recipe: path or packaged name, or `None`.
        arguments: the words after it, `--key value`, `--key=value`, `--key v1 v2` or `--flag`.

    Raises:
        ValueError: a file that is missing or not a YAML mapping, a key given twice, a word that belongs to no key.
    """
    settings = _from_file(locate(recipe, "training_configs"), ()) if recipe is not None else []
    return settings + _from_words(arguments, _next_level(settings))


def _next_level(settings: list[Setting]) -> int:
    return max((setting.level for setting in settings), default=-1) + 1


def _from_file(path: Path, above: tuple[Path, ...]) -> list[Setting]:
    if path.resolve() in above:
        raise ValueError(f"{path}: {BASE_KEY} leads back to this file.")
    entries = _read_entries(path)
    settings: list[Setting] = []
    for base in _base_names(path, entries):
        beside = path.parent / base
        below = _from_file(beside if isfile(beside) else locate(base, "training_configs"), (*above, path.resolve()))
        level = _next_level(settings)
        settings += [replace(setting, level=level + setting.level) for setting in below]
    level = _next_level(settings)
    return settings + [
        Setting(key, value, f"{path}, line {line}", level) for key, value, line in entries if key != BASE_KEY
    ]


def _base_names(path: Path, entries: list[tuple[str, Any, int]]) -> list[str]:
    for key, value, line in entries:
        if key == BASE_KEY:
            names = value if isinstance(value, list) else [value]
            if not names or not all(isinstance(name, str) for name in names):
                raise ValueError(f"{path}, line {line}: {BASE_KEY} must name a recipe, or list several.")
            return names
    return []


def _read_entries(path: Path) -> list[tuple[str, Any, int]]:
    """Read the top-level entries of a YAML mapping: key, value, line."""
    values, lines = read_yaml(path)
    if values is None:
        raise ValueError(f"{path} is empty.")
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold `key: value` lines.")
    return [(str(key), value, lines.get(str(key), 1)) for key, value in values.items()]


def _from_words(words: list[str], level: int) -> list[Setting]:
    given: dict[str, list[Text]] = {}
    values: list[Text] | None = None  # those of the key before, while it takes more
    for word in words:
        is_key = word.startswith("--") and word != "--"
        if not is_key and (values is None or word == "--"):
            raise ValueError(f"{word!r} on the command line belongs to no key; write --key value.")
        if not is_key and values is not None:
            values.append(Text(word))
            continue
        name, equals, attached = word.partition("=")
        key = name.removeprefix("--").replace("-", "_")
        if key in given:
            raise ValueError(f"{name} is given twice on the command line.")
        given[key] = [Text(attached)] if equals else []
        values = None if equals else given[key]
    return [
        Setting(key, texts[0] if len(texts) == 1 else texts or True, "the command line", level, bare=not texts)
        for key, texts in given.items()
    ]
