"""Values from YAML or the command line, converted strictly to the type that a dataclass field declares."""

from __future__ import annotations

import dataclasses
import math
from difflib import get_close_matches
from enum import Enum
from inspect import isclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

TRUE = ("true", "yes", "on", "t", "y", "1")
FALSE = ("false", "no", "off", "f", "n", "0")
NONE = ("none", "null")


class Text(str):
    """A value as typed on the command line, not parsed yet: `8` may become a number or stay a string."""


def convert(value: Any, kind: Any, choices: list[Any] | None = None) -> Any:
    """`value` as an instance of the annotation `kind`.

    YAML's own surprises are mended where only one reading is possible (`1e-6` is a string to PyYAML, `no` a bool);
    everything else that does not fit is refused.

    Args:
        value: a YAML value, a `Text`, or a list of `Text` (several words after one flag).
        kind: the resolved annotation of the field.
        choices: the values that the field allows, if it lists them.

    Raises:
        ValueError: what was expected and what was found, as half a sentence.
    """
    result = _convert(value, kind)
    if choices is not None and result is not None and result not in choices:
        raise ValueError(_not_among(result, choices))
    return result


def _convert(value: Any, kind: Any) -> Any:
    origin = get_origin(kind)
    if kind is Any:
        return yaml.safe_load(value) if isinstance(value, Text) else value
    if origin in (Union, UnionType):
        return _union(value, get_args(kind))
    if origin is Literal:
        return _literal(value, get_args(kind))
    if origin is list or kind is list:
        return _list(value, (get_args(kind) or (Any,))[0])
    if origin is dict or kind is dict:
        return _dict(value, get_args(kind) or (Any, Any))
    if origin is tuple or kind is tuple:
        return tuple(_list(value, (get_args(kind) or (Any,))[0]))
    if isclass(kind) and issubclass(kind, Enum):
        return _literal(value, tuple(member.value for member in kind))
    if dataclasses.is_dataclass(kind):
        return _dataclass(value, kind)
    if kind in _SCALARS:
        return _SCALARS[kind](value)
    if kind is NoneType:
        if value is None or (isinstance(value, Text) and value.lower() in NONE):
            return None
        raise ValueError(f"expected nothing (null), found {_show(value)}")
    raise ValueError(f"a value of type {getattr(kind, '__name__', kind)} cannot be given in a recipe")


def _bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in TRUE + FALSE:
        return value.lower() in TRUE
    raise ValueError(f"expected true or false, found {_show(value)}")


def _float(value: Any) -> float:
    try:
        number = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else math.nan
    except ValueError:
        number = math.nan
    if math.isnan(number):  # no setting means anything when it is not a number
        raise ValueError(f"expected a number, found {_show(value)}")
    return number


def _int(value: Any) -> int:
    try:
        number = _float(value)
        return int(value) if isinstance(value, int) else int(number) if number.is_integer() else _fail()
    except (ValueError, OverflowError):
        raise ValueError(f"expected a whole number, found {_show(value)}") from None


def _str(value: Any) -> str:
    if isinstance(value, str):
        return str(value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    raise ValueError(f"expected text, found {_show(value)}")


_SCALARS = {bool: _bool, int: _int, float: _float, str: _str}


def _fail() -> Any:
    raise ValueError


def _literal(value: Any, choices: tuple[Any, ...]) -> Any:
    if value in choices and not isinstance(value, bool):
        return str(value) if isinstance(value, Text) else value
    if isinstance(value, Text) and value.lower() in ("true", "false"):
        value = value.lower() == "true"
    if isinstance(value, bool):  # YAML reads an unquoted `no` as false
        if any(choice is value for choice in choices):
            return value
        words = [word for word in (TRUE if value else FALSE) if word in choices]
        if len(words) == 1:
            return words[0]
    for choice in choices:
        if not isinstance(choice, str) and str(choice).lower() == str(value).lower():
            return choice
    raise ValueError(_not_among(value, list(choices)))


def _union(value: Any, members: tuple[Any, ...]) -> Any:
    if NoneType in members:
        if value is None or (isinstance(value, Text) and value.lower() in NONE):
            return None
        members = tuple(member for member in members if member is not NoneType)
    if any(isclass(member) and issubclass(member, Enum) for member in members):
        members = tuple(
            member for member in members if member is not str
        )  # `SchedulerType | str` means the former's values
    errors = []
    for member in sorted(members, key=lambda member: _rank(value, member)):
        try:
            return _convert(value, member)
        except ValueError as error:
            errors.append(str(error))
    raise ValueError(errors[0])


def _rank(value: Any, member: Any) -> int:
    """Which member of a union is tried first: the value's own type, then the strictest."""
    plain = get_origin(member) or member
    if not isinstance(value, Text) and isclass(plain) and type(value) is plain:
        return 0
    order = [bool, int, float, dict, list]
    return order.index(plain) + 1 if plain in order else 20 if plain is str else 10


def _list(value: Any, kind: Any) -> list[Any]:
    if isinstance(value, Text):
        value = (
            yaml.safe_load(value)
            if value.lstrip().startswith("[")
            else [Text(part.strip()) for part in value.split(",")]
        )
    if isinstance(value, dict) or value is None:
        raise ValueError(f"expected a list, found {_show(value)}")
    items = value if isinstance(value, list) else [value]
    return [_convert(item, kind) for item in items]


def _dict(value: Any, kinds: tuple[Any, Any]) -> dict[Any, Any]:
    if isinstance(value, Text) and value.lstrip().startswith("{"):
        value = yaml.safe_load(value)
    if not isinstance(value, dict):
        raise ValueError(f"expected a mapping, found {_show(value)}")
    return {_convert(key, kinds[0]): _convert(item, kinds[1]) for key, item in value.items()}


def _dataclass(value: Any, kind: Any) -> Any:
    if isinstance(value, Text):
        value = yaml.safe_load(value)
    if not isinstance(value, dict):
        raise ValueError(f"expected a mapping, found {_show(value)}")
    hints = get_type_hints(kind)
    known = {field.name: field for field in dataclasses.fields(kind) if field.init}
    converted = {}
    for key, item in value.items():
        if key not in known:
            raise ValueError(unknown_key(key, list(known)))
        try:
            converted[key] = convert(item, hints[key], known[key].metadata.get("choices"))
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None
    missing = [name for name, field in known.items() if name not in converted and is_required(field)]
    if missing:
        raise ValueError(f"{missing[0]} is missing")
    return kind(**converted)


def is_required(field: dataclasses.Field[Any]) -> bool:
    """Whether a dataclass cannot be built without a value for `field`."""
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def unknown_key(key: Any, known: list[str]) -> str:
    """The message about a key that nobody reads, with the nearest key that somebody does."""
    near = get_close_matches(str(key), known, n=1, cutoff=0.5)
    return f"unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else "")


def _not_among(value: Any, choices: list[Any]) -> str:
    near = get_close_matches(str(value), [str(choice) for choice in choices], n=1, cutoff=0.5)
    if len(choices) > 12 and near:
        return f"found {_show(value)}; did you mean {near[0]!r}?"
    return f"expected one of {', '.join(str(choice) for choice in choices)}; found {_show(value)}"


def _show(value: Any) -> str:
    text = repr(str(value)) if isinstance(value, str) else "nothing" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
