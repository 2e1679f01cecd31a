"""From settings to dataclasses: every key is known, every value has the right type, or the user reads one line."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, get_args, get_type_hints

import yaml

from .convert import convert, is_required, unknown_key
from .legacy import LEGACY_KEYS, translate
from .source import BASE_KEY, Setting, read_settings, split_recipe

# annotations that are narrower than what is accepted here
WIDENED: dict[str, Any] = {"resume_from_checkpoint": bool | str | None}
SECRETS = frozenset({"hub_token", "api_key"})


@dataclass
class Recipe:
    """The settings of one run under today's keys, each converted, with the place where it was written.

    Attributes:
        name: what the user called the recipe, or `None` when everything came from the command line.
        values: key -> value, only of keys that were given.
        places: key -> where it was given.
        notices: sentences about old keys, to be shown once.
    """

    name: str | None
    values: dict[str, Any] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)

    def drop(self, key: str) -> Any:
        """Take `key` out and return its value (`None` when it was not given)."""
        self.places.pop(key, None)
        return self.values.pop(key, None)


def apply_environment(settings: list[Setting]) -> list[Setting]:
    """Set the variables of the `env:` mappings, and return the settings without them.

    Raises:
        ValueError: `env` is not a mapping of names to single values.
    """
    for setting in settings:
        if setting.key == "env":
            if not isinstance(setting.value, dict) or any(isinstance(v, (dict, list)) for v in setting.value.values()):
                raise ValueError(f"{setting.place}: env must map names of environment variables to values.")
            for name, value in setting.value.items():
                os.environ[str(name)] = str(value)
    return [setting for setting in settings if setting.key != "env"]


def load_settings(words: list[str], flags: set[str]) -> tuple[str | None, list[Setting]]:
    """The name of the recipe among `words`, and all settings, with `env:` applied."""
    name, rest = split_recipe(words)
    return name, apply_environment(read_settings(name, rest, flags))


def read_recipe(words: list[str], classes: Sequence[type]) -> Recipe:
    """Read a recipe and command-line words for a command whose arguments are the fields of `classes`.

    Args:
        words: for instance `["llama3/wpo", "--learning_rate", "5e-7"]`; the recipe is first or after `--config`.
        classes: dataclasses; a key that several of them declare goes to each.

    Returns:
        The recipe; `build` makes the dataclasses from it.

    Raises:
        ValueError: one line that names the key, its file and line, and the nearest known key or the expected type.
    """
    fields = _fields(classes)
    hints = _hints(classes)
    name, settings = load_settings(words, flags={key for key in fields if bool in _members(hints[key])})
    settings, notices = translate(settings, set(fields))
    recipe = Recipe(name, notices=notices)
    levels: dict[str, int] = {}
    for setting in settings:
        if setting.key not in fields:
            known = [*fields, *sorted(LEGACY_KEYS), BASE_KEY, "env"]
            raise ValueError(f"{setting.place}: {unknown_key(setting.key, known)}")
        if levels.get(setting.key) == setting.level:
            raise ValueError(f"{setting.place}: {setting.key} is given twice (also by {recipe.places[setting.key]}).")
        try:
            value = convert(setting.value, hints[setting.key], fields[setting.key].metadata.get("choices"))
        except ValueError as error:
            raise ValueError(f"{setting.place}: {setting.key}: {error}.") from None
        recipe.values[setting.key], recipe.places[setting.key] = value, setting.place
        levels[setting.key] = setting.level
    return recipe


def build(recipe: Recipe, classes: Sequence[type]) -> tuple[Any, ...]:
    """One instance of each class of `classes` from the recipe's values.

    Raises:
        ValueError: a value that the class itself refuses, or a required key that is missing; with the place.
    """
    instances = []
    for cls in classes:
        fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
        given = {key: value for key, value in recipe.values.items() if key in fields}
        for name, declared in fields.items():
            if name not in given and is_required(declared):
                raise ValueError(f"{name} is missing: set it in the recipe or with --{name}.")
        try:
            instances.append(cls(**given))
        except (ValueError, TypeError, NotImplementedError) as error:
            where = f"{recipe.name}: " if recipe.name else ""
            raise ValueError(f"{where}{error}") from error
    return tuple(instances)


def resolved_yaml(recipe: Recipe, classes: Sequence[type], *, without_defaults: frozenset[str] = frozenset()) -> str:
    """The recipe as YAML that can be run again: what was set, then the defaults of everything else.

    Secrets are left out, and so are fields whose default is nothing or that are named in `without_defaults`.
    """
    given = {key: _plain(value) for key, value in recipe.values.items() if key not in SECRETS}
    defaults = {}
    for key, declared in _fields(classes).items():
        if key in recipe.values or key in SECRETS or key in without_defaults or is_required(declared):
            continue
        factory = declared.default_factory
        value = declared.default if factory is dataclasses.MISSING else factory()
        if value is not None:
            defaults[key] = _plain(value)
    parts = ["# Set by the recipe or on the command line.", _dump(given)]
    if defaults:
        parts += ["\n# Defaults of the versions in package_versions.json.", _dump(defaults)]
    return "\n".join(parts)


def _dump(values: dict[str, Any]) -> str:
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, default_flow_style=False) if values else ""


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            f.name: _plain(getattr(value, f.name))
            for f in dataclasses.fields(value)
            if getattr(value, f.name) is not None
        }
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _fields(classes: Sequence[type]) -> dict[str, dataclasses.Field[Any]]:
    return {field.name: field for cls in reversed(classes) for field in dataclasses.fields(cls) if field.init}


def _hints(classes: Sequence[type]) -> dict[str, Any]:
    return {key: kind for cls in reversed(classes) for key, kind in get_type_hints(cls).items()} | WIDENED


def _members(kind: Any) -> tuple[Any, ...]:
    return (kind, *get_args(kind))
