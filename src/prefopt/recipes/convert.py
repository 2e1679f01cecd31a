"""Values from YAML or the command line, converted strictly to the type that a dataclass field declares."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from difflib import get_close_matches
from enum import Enum
from inspect import isclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from prefopt.arguments import default_of
from prefopt.files import parse_yaml

TRUE = ("true", "yes", "on", "t", "y", "1")
FALSE = ("false", "no", "off", "f", "n", "0")
NONE = ("none", "null")


class Text(str):
    """A value as typed on the command line, not parsed yet: `8` may become a number or stay a string."""


def convert(value: Any, kind: Any, choices: Sequence[Any] | None = None) -> Any:
    """Convert `value` to the annotation `kind`.

    YAML's own surprises are corrected where only one reading is possible (`1e-6` is a string to PyYAML, `no` a bool);
    everything else that does not fit raises.

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
    origin, members = get_origin(kind) or kind, get_args(kind)
    if kind is Any:
        return parsed(value)
    if origin in (Union, UnionType):
        return _union(value, members)
    if origin is Literal:
        return _literal(value, members)
    if origin in (list, tuple):
        return origin(_list(value, (members or (Any,))[0]))
    if origin is dict:
        return _dict(value, members or (Any, Any))
    if isclass(kind) and issubclass(kind, Enum):
        return _literal(value, [member.value for member in kind])
    if dataclasses.is_dataclass(kind):
        return _dataclass(value, kind)
    if kind in _SCALARS:
        return _SCALARS[kind](value)
    raise ValueError(f"a value of type {getattr(kind, '__name__', kind)} cannot be given in a recipe")


def parsed(value: Any) -> Any:
    """Return a value as YAML has it, where it is a word of the command line."""
    return parse_yaml(value, "the value")[0] if isinstance(value, Text) else value


def _none(value: Any) -> None:
    if value is not None and not (isinstance(value, Text) and value.lower() in NONE):
        raise ValueError(f"expected nothing (null), found {_show(value)}")


def _bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in TRUE + FALSE:
        return value.lower() in TRUE
    raise ValueError(f"expected true or false, found {_show(value)}")


def _float(value: Any) -> float:
    with suppress(ValueError, OverflowError):
        if isinstance(value, (int, float, str)) and not isinstance(value, bool) and not math.isnan(float(value)):
            return float(value)
    raise ValueError(f"expected a number, found {_show(value)}")


def _int(value: Any) -> int:
    with suppress(ValueError):
        if (number := _float(value)).is_integer():
            return value if isinstance(value, int) else int(number)  # a large whole number has no exact float
    raise ValueError(f"expected a whole number, found {_show(value)}")


def _str(value: Any) -> str:
    if isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)
    raise ValueError(f"expected text, found {_show(value)}")


_SCALARS: dict[Any, Callable[[Any], Any]] = {NoneType: _none, bool: _bool, int: _int, float: _float, str: _str}


def _literal(value: Any, choices: Sequence[Any]) -> Any:
    if value in choices and not isinstance(value, bool):
        return str(value) if isinstance(value, Text) else value
    if isinstance(value, Text) and value.lower() in ("true", "false"):
        value = value.lower() == "true"
    if isinstance(value, bool):  # YAML reads an unquoted `no` as false
        words = [word for word in (TRUE if value else FALSE) if word in choices]
        if any(choice is value for choice in choices):
            return value
        if len(words) == 1:
            return words[0]
    for choice in choices:
        if not isinstance(choice, str) and str(choice).lower() == str(value).lower():
            return choice
    raise ValueError(_not_among(value, choices))


def _union(value: Any, members: Sequence[Any]) -> Any:
    if NoneType in members:
        with suppress(ValueError):
            return _none(value)
    enums = any(isclass(member) and issubclass(member, Enum) for member in members)
    # `SchedulerType | str` means the values of the former
    members = [member for member in members if member is not NoneType and not (enums and member is str)]
    errors = []
    for member in sorted(members, key=lambda member: _rank(value, member)):
        try:
            return _convert(value, member)
        except ValueError as error:
            errors.append(error)
    raise errors[0]


def _rank(value: Any, member: Any) -> int:
    """Order the members of a union: the value's own type first, then the strictest, text last."""
    plain = get_origin(member) or member
    if not isinstance(value, Text) and type(value) is plain:
        return 0
    order = [bool, int, float, dict, list]
    return order.index(plain) + 1 if plain in order else 20 if plain is str else 10


def _list(value: Any, kind: Any) -> list[Any]:
    if isinstance(value, Text):
        is_yaml = value.lstrip().startswith("[")
        value = parsed(value) if is_yaml else [Text(part.strip()) for part in value.split(",")]
    if isinstance(value, dict) or value is None:
        raise ValueError(f"expected a list, found {_show(value)}")
    return [_convert(item, kind) for item in (value if isinstance(value, list) else [value])]


def _dict(value: Any, kinds: Sequence[Any]) -> dict[Any, Any]:
    # a word that is no mapping may be the name of a file, which other members of a union take
    given = value if isinstance(value, Text) and not value.lstrip().startswith("{") else parsed(value)
    if not isinstance(given, dict):
        raise ValueError(f"expected a mapping, found {_show(value)}")
    return {_convert(key, kinds[0]): _convert(item, kinds[1]) for key, item in given.items()}


def _dataclass(value: Any, kind: Any) -> Any:
    value = parsed(value)
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
    for name, field in known.items():
        if name not in converted and is_required(field):
            raise ValueError(f"{name} is missing")
    return kind(**converted)


def is_required(field: dataclasses.Field[Any]) -> bool:
    """Return whether a dataclass cannot be built without a value for `field`."""
    return default_of(field) is dataclasses.MISSING


def unknown_key(key: Any, known: Sequence[str]) -> str:
    """Return the message about a key that nothing reads, with the nearest known one."""
    near = get_close_matches(str(key), known, n=1, cutoff=0.5)
    return f"unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else "")


def _not_among(value: Any, choices: Sequence[Any]) -> str:
    near = get_close_matches(str(value), [str(choice) for choice in choices], n=1, cutoff=0.5)
    if len(choices) > 12 and near:
        return f"found {_show(value)}; did you mean {near[0]!r}?"
    return f"expected one of {', '.join(map(str, choices))}; found {_show(value)}"


def _show(value: Any) -> str:
    text = repr(str(value)) if isinstance(value, str) else "nothing" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
