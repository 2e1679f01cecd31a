"""How the settings of a command are declared: everything known about a setting stands in its field's metadata.

A dataclass of settings declares each field with `setting` and calls `check_settings` from `__post_init__`. Other parts
read the same
metadata: `--help` the text and the choices, pipelines whether a setting decides a result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


class _Metadata(dict[str, Any]):
    """What is known about a setting; only what argparse knows is listed.

    `HfArgumentParser` and `TrlParser` pass every listed entry of a field's metadata to `add_argument`, which raises
    for a name that it does not know. The trainers' configs must go on working with them.
    """

    def keys(self) -> Any:
        """List what argparse knows; any other entry is found by its name."""
        return {"help", "choices"} & super().keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())


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
        at_least, above, at_most: bounds of a number; None is never out of bounds.
        only_for: selector field -> its values for which this setting is read; set with another one, it raises.
            Selectors that the
            dataclass does not have are ignored, so that a mixin can name those of all its users.
        decides_result: False if a result made with another value is the same (addresses, batch sizes of inference,
            plots, pushing).
    """
    known = {
        "help": help,
        "choices": choices,
        "required": required,
        "at_least": at_least,
        "above": above,
        "at_most": at_most,
    }
    metadata = _Metadata({name: value for name, value in known.items() if value is not None and value is not False})
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
    if value is not None:
        for bound, holds, words in (
            ("at_least", lambda limit: value >= limit, "at least"),
            ("above", lambda limit: value > limit, "above"),
            ("at_most", lambda limit: value <= limit, "at most"),
        ):
            if bound in known and not holds(known[bound]):
                raise ValueError(f"{name} is {value}; it must be {words} {known[bound]}.")
    if value == default_of(declared):
        return
    for selector, values in known.get("only_for", {}).items():
        chosen = getattr(args, selector, None)
        if selector in args.__dataclass_fields__ and chosen not in values:
            raise ValueError(
                f"{name} is only read with {selector} {' or '.join(map(str, values))}, and that is {chosen!r}."
            )


def default_of(declared: dataclasses.Field[Any]) -> Any:
    """Return the default value of a field, made anew where it has a factory."""
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


@dataclass
class HubArguments:
    """Keys of the tools that write a dataset: its file format, and whether it is pushed to the hub."""

    output_format: str = setting("parquet", "parquet or jsonl.", choices=("parquet", "jsonl"))
    push_to_hub: bool = setting(
        False, "Also push the rows to the hub, after everything is written here.", decides_result=False
    )
    hub_dataset_id: str | None = setting(None, "Dataset repository to push to.", decides_result=False)
    hub_private_repo: bool = setting(True, "Whether that repository is private when it is made.", decides_result=False)


_SERVED = {"backend": ("server",), "ranker": ("judge",)}


@dataclass
class ServerArguments:
    """Keys of the tools that talk to an OpenAI-compatible server."""

    base_url: str = setting(
        "http://localhost:8000/v1", "Address of an OpenAI-compatible server.", only_for=_SERVED, decides_result=False
    )
    key_variable: str = setting(
        "OPENAI_API_KEY",
        "Environment variable that holds the server's key, if one is needed.",
        only_for=_SERVED,
        decides_result=False,
    )
    concurrency: int = setting(
        64, "Requests under way at a time, in each process.", at_least=1, only_for=_SERVED, decides_result=False
    )
    request_timeout: float = setting(
        600.0, "Seconds for one whole request.", above=0, only_for=_SERVED, decides_result=False
    )
    retries: int = setting(
        5,
        "Further attempts after a failed request, with growing pauses.",
        at_least=0,
        only_for=_SERVED,
        decides_result=False,
    )
