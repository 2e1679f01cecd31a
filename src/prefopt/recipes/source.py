"""Where settings come from: YAML files (with line numbers, one on top of another) and the command line."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from prefopt.recipes.convert import Text

PACKAGE = Path(__file__).resolve().parents[1]
FOLDERS = ("training_configs", "accelerate_configs")


def packaged_names(folder: str) -> list[str]:
    """The names of the YAML files that the package ships in `folder`, without the ending: `llama3/wpo`, ..."""
    assert folder in FOLDERS, folder
    root = PACKAGE / folder
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))


def locate(name: str, folder: str) -> Path:
    """The file that `name` means: a path that exists, or a packaged file named with or without its folder and ending.

    Args:
        name: what the user typed, for instance `my.yaml`, `training_configs/llama3/wpo.yaml` or `llama3/wpo`.
        folder: "training_configs" or "accelerate_configs", where packaged files are looked up.

    Returns:
        The path of an existing file.

    Raises:
        ValueError: neither a file nor a packaged name; the message gives the nearest packaged name.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
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


BASE_KEY = "base_recipe"  # another recipe, or several, whose values this one overrides


@dataclass(frozen=True)
class Setting:
    """One key with its value and the place where the user wrote it."""

    key: str
    value: Any
    place: str  # "llama3/wpo.yaml, line 12" or "the command line"
    level: int  # a later source wins over an earlier one; the command line has the highest level
    bare: bool = False  # `--flag` without a value, which only a boolean may be


def read_settings(recipe: str | None, arguments: list[str]) -> list[Setting]:
    """All settings of a run, in the order of their sources: base recipes, the recipe, the command line.

    Args:
        recipe: path or packaged name, or `None`.
        arguments: the words after it, `--key value`, `--key=value`, `--key v1 v2` or `--flag`.

    Raises:
        ValueError: a file that is missing or not a YAML mapping, a key given twice, a word that belongs to no key.
    """
    settings = list(_from_file(locate(recipe, "training_configs"), ())) if recipe is not None else []
    top = max((setting.level for setting in settings), default=-1) + 1
    return settings + list(_from_words(arguments, top))


def _from_file(path: Path, seen: tuple[Path, ...]) -> Iterator[Setting]:
    if path.resolve() in seen:
        raise ValueError(f"{path}: {BASE_KEY} leads back to this file.")
    entries = _read_yaml(path)
    level = 0
    for base in _base_names(path, entries):
        beside = path.parent / base
        for setting in _from_file(
            beside if beside.is_file() else locate(base, "training_configs"), (*seen, path.resolve())
        ):
            yield replace(setting, level=level + setting.level)
            top = level + setting.level
        level = top + 1
    for key, value, line in entries:
        if key != BASE_KEY:
            yield Setting(key, value, f"{path}, line {line}", level)


def _base_names(path: Path, entries: list[tuple[str, Any, int]]) -> list[str]:
    for key, value, line in entries:
        if key == BASE_KEY:
            names = value if isinstance(value, list) else [value]
            if not names or not all(isinstance(name, str) for name in names):
                raise ValueError(f"{path}, line {line}: {BASE_KEY} must name a recipe, or list several.")
            return names
    return []


def _read_yaml(path: Path) -> list[tuple[str, Any, int]]:
    """The top-level entries of a YAML mapping: key, value, line."""
    try:
        text = path.read_text(encoding="utf-8")
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a text file in UTF-8.") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if tree is None:
        raise ValueError(f"{path} is empty.")
    if not isinstance(tree, yaml.MappingNode):
        raise ValueError(f"{path} must hold `key: value` lines.")
    lines = _lines_of_keys(path, tree)
    return [(str(key), value, lines.get(str(key), 0)) for key, value in values.items()]


def _lines_of_keys(path: Path, node: yaml.Node) -> dict[str, int]:
    """The line of each key of a mapping; a key that stands twice, here or in anything below, is refused."""
    lines: dict[str, int] = {}
    for part in node.value if isinstance(node, yaml.CollectionNode) else ():
        key, value = part if isinstance(part, tuple) else (None, part)
        if key is not None:
            line = key.start_mark.line + 1
            if key.value in lines:
                raise ValueError(f"{path}, line {line}: {key.value!r} was already given in line {lines[key.value]}.")
            lines[key.value] = line
        _lines_of_keys(path, value)
    return lines


def _from_words(words: list[str], level: int) -> Iterator[Setting]:
    given: set[str] = set()
    position = 0
    while position < len(words):
        word = words[position]
        if not word.startswith("--") or word == "--":
            raise ValueError(f"{word!r} on the command line belongs to no key; write --key value.")
        name, equals, attached = word[2:].partition("=")
        key = name.replace("-", "_")
        position += 1
        values = [attached] if equals else []
        if not equals:
            while position < len(words) and not words[position].startswith("--"):
                values.append(words[position])
                position += 1
        if key in given:
            raise ValueError(f"--{name} is given twice on the command line.")
        given.add(key)
        texts = [Text(value) for value in values]
        value = True if not texts else texts[0] if len(texts) == 1 else texts
        yield Setting(key, value, "the command line", level, bare=not texts)


def split_recipe(words: list[str]) -> tuple[str | None, list[str]]:
    """The recipe (the first word, or what follows `--config`) and the words that remain.

    Raises:
        ValueError: two recipes, or `--config` without one.
    """
    recipe: str | None = None
    rest = list(words)
    if rest and not rest[0].startswith("-"):
        recipe = rest.pop(0)
    for position, word in enumerate(rest):
        name, equals, attached = word.partition("=")
        if name != "--config":
            continue
        if recipe is not None:
            raise ValueError(f"two recipes: {recipe} and --config; give one.")
        if not equals and (position + 1 >= len(rest) or rest[position + 1].startswith("--")):
            raise ValueError("--config needs the path or the name of a recipe.")
        recipe = attached if equals else rest[position + 1]
        del rest[position : position + (1 if equals else 2)]
        break
    return recipe, rest
