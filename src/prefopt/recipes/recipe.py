"""From settings to dataclasses: every key is known and every value has the right type, or one line says why not."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, get_args, get_type_hints

import yaml

from prefopt.arguments import default_of, masked, missing, remember_secrets, without_secrets
from prefopt.recipes.convert import convert, is_required, unknown_key
from prefopt.recipes.legacy import LEGACY_KEYS, translate
from prefopt.recipes.source import BASE_KEY, Setting, read_settings, split_recipe

# Keys that say the same thing in different ways, each with the keys that belong to it. One way may be used at a time;
# a later source (the command line over the recipe, the recipe over its base) replaces another way of an earlier one.
ALTERNATIVES: tuple[tuple[tuple[str, ...], ...], ...] = (
    (
        ("dataset_mixer", "dataset_splits", "dataset_configs"),
        ("dataset_mixture",),
        ("datasets",),
        ("dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split"),
    ),
    (("test_split_size",), ("dataset_test_split",)),
    (("global_batch_size",), ("gradient_accumulation_steps",)),
    (("checkpointing",), ("gradient_checkpointing", "selective_checkpointing")),
)

# annotations that are narrower than what is accepted here
WIDENED: dict[str, Any] = {
    "resume_from_checkpoint": bool | str | None,
    "report_to": str | list[str],
}  # "none" is a name there
DEFAULTS = "# Defaults of the versions in package_versions.json."  # what follows in a resolved recipe
BEFORE_TRAINING = "nothing has been trained yet"


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


@contextmanager
def before_training() -> Iterator[None]:
    """Note on errors that nothing has been trained yet, so that what else is wrong can be looked for in peace."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        error.add_note(BEFORE_TRAINING)
        raise


def apply_environment(settings: list[Setting]) -> list[Setting]:
    """Set the variables of the `env:` mappings, and return the settings without them.

    Raises:
        ValueError: `env` is not a mapping of names to single values.
    """
    for setting in settings:
        if setting.key != "env":
            continue
        if not isinstance(setting.value, dict) or any(isinstance(v, (dict, list)) for v in setting.value.values()):
            raise ValueError(f"{setting.place}: env must map names of environment variables to values.")
        for name, value in ((str(name), str(value)) for name, value in setting.value.items()):
            if not name or "=" in name or "\0" in name + value:
                raise ValueError(f"{setting.place}: env: {name!r} cannot be an environment variable with this value.")
            os.environ[name] = value
    return [setting for setting in settings if setting.key != "env"]


def load_settings(words: list[str]) -> tuple[str | None, list[Setting]]:
    """Return the name of the recipe among `words`, and all settings, with `env:` applied."""
    name, rest = split_recipe(words)
    return name, apply_environment(read_settings(name, rest))


def read_recipe(words: list[str], classes: Sequence[type]) -> Recipe:
    """Read a recipe and command-line words: `["llama3/wpo", "--learning_rate", "5e-7"]`; see `parse_settings`."""
    return parse_settings(*load_settings(words), classes)


def parse_settings(name: str | None, settings: list[Setting], classes: Sequence[type]) -> Recipe:
    """Make the recipe of a command whose arguments are the fields of `classes`.

    Args:
        name: what the user called the recipe, or `None`.
        settings: where they were written, later ones winning over earlier ones.
        classes: dataclasses; a key that several of them declare goes to each.

    Returns:
        The recipe; `build` makes the dataclasses from it.

    Raises:
        ValueError: one line that names the key, its file and line, and the nearest known key or the expected type.
    """
    problems: list[str] = []
    recipe = collect(name, settings, classes, problems)
    if problems:
        raise ValueError(problems[0])
    return recipe


def collect(name: str | None, settings: list[Setting], classes: Sequence[type], problems: list[str]) -> Recipe:
    """Make a recipe as `parse_settings` does, but append every problem to `problems` instead of raising."""
    fields, hints = _fields(classes), _hints(classes)
    recipe = Recipe(name)
    remember_secrets({setting.key: setting.value for setting in settings})
    settings = translate(settings, set(fields), recipe.notices, problems)
    levels: dict[str, int] = {}
    for setting in settings:
        try:
            value = _read(setting, fields, hints)
            if levels.get(setting.key) == setting.level:
                raise ValueError(
                    f"{setting.place}: {setting.key} is given twice (also by {recipe.places[setting.key]})."
                )
        except ValueError as error:
            problems.append(masked(str(error)))
            continue
        recipe.values[setting.key], recipe.places[setting.key] = value, setting.place
        levels[setting.key] = setting.level
    _choose_alternatives(recipe, levels, problems)
    remember_secrets(recipe.values)  # what was one word on the command line is a mapping by now
    return recipe


def _read(setting: Setting, fields: dict[str, dataclasses.Field[Any]], hints: dict[str, Any]) -> Any:
    if setting.key not in fields:
        known = [*fields, *sorted(LEGACY_KEYS), BASE_KEY, "env"]
        raise ValueError(f"{setting.place}: {unknown_key(setting.key, known)}")
    if setting.bare and bool not in (hints[setting.key], *get_args(hints[setting.key])):
        raise ValueError(f"--{setting.key} needs a value.")
    try:
        return convert(setting.value, hints[setting.key], fields[setting.key].metadata.get("choices"))
    except ValueError as error:
        raise ValueError(f"{setting.place}: {setting.key}: {error}.") from None


def _choose_alternatives(recipe: Recipe, levels: dict[str, int], problems: list[str]) -> None:
    """Keep the way from the latest source where several ways of saying one thing are given."""
    for ways in ALTERNATIVES:
        said = [way for way in ways if recipe.values.get(way[0]) is not None]  # null says nothing
        given = {way: max(levels[key] for key in way if key in levels) for way in said}
        latest_first = sorted(given, key=lambda way: -given[way])
        for way in latest_first[1:]:
            kept, other = latest_first[0][0], way[0]
            if given[way] == given[latest_first[0]]:
                problems.append(f"{recipe.places[other]}: {other} and {kept} are two ways to say one thing; give one.")
                continue
            recipe.notices.append(f"{recipe.places[kept]}: {kept} replaces {other} of {recipe.places[other]}.")
            for key in way:
                recipe.values.pop(key, None)
                recipe.places.pop(key, None)


def build(recipe: Recipe, classes: Sequence[type]) -> tuple[Any, ...]:
    """Make an instance of each class of `classes` from the recipe's values.

    Raises:
        ValueError: a value that the class itself rejects, or a required key that is missing; with the recipe's name.
    """
    instances = []
    for cls in classes:
        fields = _fields([cls])
        given = {key: value for key, value in recipe.values.items() if key in fields}
        for name, declared in fields.items():
            if name not in given and is_required(declared):
                raise ValueError(missing(name))
        try:
            instances.append(cls(**given))
        except (ValueError, TypeError, NotImplementedError) as error:
            where = f"{recipe.name}: " if recipe.name else ""
            raise ValueError(f"{where}{error}") from error
    return tuple(instances)


def resolved_yaml(recipe: Recipe, classes: Sequence[type], *, without_defaults: frozenset[str] = frozenset()) -> str:
    """Write the recipe as YAML that can be run again: what was set, then the defaults of everything else.

    Secrets are left out at any depth, and so are fields whose default is nothing or that `without_defaults` names.
    """
    given = without_secrets(plain(recipe.values))
    defaults = {
        key: plain(default_of(declared))
        for key, declared in _fields(classes).items()
        if key not in {*recipe.values, *without_defaults} and not is_required(declared)
    }
    defaults = {key: value for key, value in without_secrets(defaults).items() if value is not None}
    parts = ["# Set by the recipe or on the command line.", dumped(given)]
    if defaults:
        parts += [f"\n{DEFAULTS}", dumped(defaults)]
    return "\n".join(parts)


def dumped(values: dict[str, Any]) -> str:
    """Write settings as YAML, in their order; nothing where there are none."""
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, default_flow_style=False) if values else ""


def plain(value: Any) -> Any:
    """Return a converted value as YAML and JSON have it."""
    if isinstance(value, Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        value = {name: part for name, part in parts.items() if part is not None}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def _fields(classes: Sequence[type]) -> dict[str, dataclasses.Field[Any]]:
    return {field.name: field for cls in reversed(classes) for field in dataclasses.fields(cls) if field.init}


def _hints(classes: Sequence[type]) -> dict[str, Any]:
    return {key: kind for cls in reversed(classes) for key, kind in get_type_hints(cls).items()} | WIDENED
