"""Where settings come from: YAML files (with line numbers, one on top of another) and the command line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .convert import Text
from .locate import locate

BASE_KEY = "base_recipe"  # another recipe, whose values this one overrides


@dataclass(frozen=True)
class Setting:
    """One key with its value and the place where the user wrote it."""

    key: str
    value: Any
    place: str  # "llama3/wpo.yaml, line 12" or "the command line"
    level: int  # a later source wins over an earlier one; the command line has the highest level


def read_settings(recipe: str | None, arguments: list[str], flags: Iterable[str] = ()) -> list[Setting]:
    """All settings of a run, in the order of their sources: base recipes, the recipe, the command line.

    Args:
        recipe: path or packaged name, or `None`.
        arguments: the words after it, `--key value`, `--key=value`, `--key v1 v2` or `--flag`.
        flags: keys that need no value on the command line (booleans).

    Raises:
        ValueError: a file that is missing or not a YAML mapping, a key given twice, a word that belongs to no key.
    """
    settings = list(_from_file(locate(recipe, "training_configs"), ())) if recipe is not None else []
    top = max((setting.level for setting in settings), default=-1) + 1
    return settings + list(_from_words(arguments, set(flags), top))


def _from_file(path: Path, seen: tuple[Path, ...]) -> Iterator[Setting]:
    if path.resolve() in seen:
        raise ValueError(f"{path}: {BASE_KEY} leads back to this file.")
    entries = _read_yaml(path)
    bases = [value for key, value, _ in entries if key == BASE_KEY]
    below: list[Setting] = []
    if bases:
        if not isinstance(bases[0], str):
            raise ValueError(f"{path}: {BASE_KEY} must name one recipe.")
        beside = path.parent / bases[0]
        base = beside if beside.is_file() else locate(bases[0], "training_configs")
        below = list(_from_file(base, (*seen, path.resolve())))
        yield from below
    level = max((setting.level for setting in below), default=-1) + 1
    for key, value, line in entries:
        if key != BASE_KEY:
            yield Setting(key, value, f"{path}, line {line}", level)


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
    lines: dict[str, int] = {}
    for node, _ in tree.value:
        line = node.start_mark.line + 1
        if node.value in lines:
            raise ValueError(f"{path}, line {line}: {node.value!r} was already given in line {lines[node.value]}.")
        lines[node.value] = line
    return [(str(key), value, lines.get(str(key), 0)) for key, value in values.items()]


def _from_words(words: list[str], flags: set[str], level: int) -> Iterator[Setting]:
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
        if not values and key not in flags:
            raise ValueError(f"--{name} needs a value.")
        texts = [Text(value) for value in values]
        yield Setting(key, True if not texts else texts[0] if len(texts) == 1 else texts, "the command line", level)


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
