"""How the settings of a command are declared: everything known about a setting stands in its field's metadata.

A dataclass of settings declares each field with `setting` and calls `check_settings` from `__post_init__`. Other parts
read the same metadata: `--help` prints the text and the choices, pipelines ask whether a setting decides a result.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any


def setting(
    default: Any = None,
    help: str = "",
    *,
    factory: Callable[[], Any] | None = None,
    choices: Sequence[Any] | None = None,
    required: bool = False,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    only_for: Mapping[str, Sequence[Any]] | None = None,
    decides_result: bool = True,
) -> Any:
    """Declare a dataclass field that is one setting.

    Args:
        default: its default value.
        help: one or two sentences for `--help`.
        factory: makes the default where that is a list or a mapping.
        choices: the only values allowed.
        required: an empty value raises.
        at_least: lowest number allowed. None is never out of bounds, in this and the next two.
        above: number that the value must exceed.
        at_most: highest number allowed.
        only_for: selector field -> its values for which this setting is read; set with another one, it raises.
            Selectors that the dataclass does not have are ignored, so that a mixin can name those of all its users.
        decides_result: False if a result made with another value is the same (addresses, batch sizes of inference,
            plots, pushing).
    """
    known: dict[str, Any] = {
        "help": help,
        "choices": choices,
        "required": required,
        "at_least": at_least,
        "above": above,
        "at_most": at_most,
    }
    metadata: dict[str, Any] = {
        name: value for name, value in known.items() if value is not None and value is not False
    }
    if only_for is not None:
        metadata["only_for"] = {selector: tuple(values) for selector, values in only_for.items()}
    if not decides_result:
        metadata["decides_result"] = False
    if factory is not None:
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


def missing(name: str) -> str:
    """Return the message about a setting that has to be given."""
    return f"{name} is missing: set it in the recipe or with --{name}."


_BOUNDS: dict[str, Callable[[Any, Any], bool]] = {
    "at_least": operator.ge,
    "above": operator.gt,
    "at_most": operator.le,
}


def check_settings(args: Any) -> None:
    """Check a dataclass of settings against what its fields declare.

    Raises:
        ValueError: a required setting is empty, a value is no choice or out of bounds, or a setting would be ignored.
    """
    for declared in dataclasses.fields(args):
        _check(args, declared, getattr(args, declared.name))


def _check(args: Any, declared: dataclasses.Field[Any], value: Any) -> None:
    name, known = declared.name, declared.metadata
    if known.get("required") and not value:
        raise ValueError(missing(name))
    choices = known.get("choices")
    if choices is not None and value is not None and value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, not {value!r}.")
    for bound, holds in _BOUNDS.items():
        # written so that NaN, for which every comparison is false, is out of bounds
        if value is not None and bound in known and not holds(value, known[bound]):
            raise ValueError(f"{name} is {value}; it must be {bound.replace('_', ' ')} {known[bound]}.")
    if value == default_of(declared):
        return
    for selector, values in known.get("only_for", {}).items():
        chosen = getattr(args, selector, None)
        if selector in args.__dataclass_fields__ and chosen not in values:
            raise ValueError(
                f"{name} is only read with {selector} {' or '.join(map(str, values))}, and that is {chosen!r}."
            )


def default_of(declared: dataclasses.Field[Any]) -> Any:
    """Return a field's default, made anew where it has a factory; `dataclasses.MISSING` where it has none."""
    return declared.default_factory() if declared.default_factory is not dataclasses.MISSING else declared.default


def check_together(args: Any, first: str, second: str) -> None:
    """Raise a ValueError where only one of two settings that need each other is given."""
    if bool(getattr(args, first)) != bool(getattr(args, second)):
        raise ValueError(f"{first} and {second} belong together: give both or neither.")


def names_without_effect(*classes: type) -> frozenset[str]:
    """Return the settings of dataclasses that do not decide the result."""
    return frozenset(
        declared.name
        for cls in classes
        for declared in dataclasses.fields(cls)
        if not declared.metadata.get("decides_result", True)
    )


def changed_keys(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the keys whose values differ between two mappings; an absent key counts as None."""
    return [key for key in dict.fromkeys([*before, *now]) if before.get(key) != now.get(key)]


def setting_changes(
    before: Mapping[str, Any], now: Mapping[str, Any], ignored: Collection[str] = frozenset()
) -> list[str]:
    """Describe each setting that differs as `key was OLD and is NEW`, without those in `ignored`."""
    return [
        f"{key} was {before.get(key)!r} and is {now.get(key)!r}"
        for key in changed_keys(before, now)
        if key not in ignored
    ]


@dataclass(kw_only=True)
class HubArguments:
    """Keys of the tools that write a dataset: its file format, and whether it is pushed to the hub."""

    output_format: str = setting("parquet", "parquet or jsonl.", choices=("parquet", "jsonl"))
    push_to_hub: bool = setting(
        False, "Also push the rows to the hub, after everything is written here.", decides_result=False
    )
    hub_dataset_id: str | None = setting(None, "Dataset repository to push to.", decides_result=False)
    hub_private_repo: bool = setting(True, "Whether that repository is private when it is made.", decides_result=False)


# a setting of the tools that talk to a server, which only their backend or ranker of that kind reads
_server_setting = partial(setting, only_for={"backend": ("server",), "ranker": ("judge",)}, decides_result=False)


@dataclass(kw_only=True)
class ServerArguments:
    """Keys of the tools that talk to an OpenAI-compatible server."""

    base_url: str = _server_setting("http://localhost:8000/v1", "Address of an OpenAI-compatible server.")
    key_variable: str = _server_setting(
        "OPENAI_API_KEY", "Environment variable that holds the server's key, if one is needed."
    )
    concurrency: int = _server_setting(64, "Requests under way at a time, in each process.", at_least=1)
    request_timeout: float = _server_setting(600.0, "Seconds for one whole request.", above=0)
    retries: int = _server_setting(5, "Further attempts after a failed request, with growing pauses.", at_least=0)
