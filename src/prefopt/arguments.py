"""How the settings of a command are declared: everything known about a setting stands in its field's metadata.

A dataclass of settings declares each field with `setting` and calls `check_settings` from `__post_init__`. Other parts
read the same metadata: `--help` prints the text and the choices, pipelines ask whether a setting decides a result.
"""

from __future__ import annotations

import dataclasses
import json
import operator
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from urllib.parse import quote


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
    metadata = _Metadata({name: value for name, value in known.items() if value is not None and value is not False})
    if only_for is not None:
        metadata["only_for"] = {selector: tuple(values) for selector, values in only_for.items()}
    if not decides_result:
        metadata["decides_result"] = False
    if factory is not None:
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


def only_read_with(declared: dataclasses.Field[Any], **selectors: Sequence[Any]) -> Any:
    """Declare a field of another dataclass again, read with these values of a selector only; see `setting`."""
    only_for = {selector: tuple(values) for selector, values in selectors.items()}
    # `items` gives all entries, those that are not listed among them
    metadata = _Metadata([*declared.metadata.items(), ("only_for", only_for)])
    return field(default=declared.default, metadata=metadata)


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


# --- Secrets: one list of the keys that hold them, and what keeps their values out of files, logs and messages.

MASK = "***"
# a key that is one of these, or ends with one after an underscore; `eos_token` and the like are none
SECRET_KEYS = (
    "token", "hub_token", "hf_token", "auth_token", "access_token", "refresh_token", "session_token", "bearer_token",
    "api_token", "secret_token", "sas_token", "api_key", "apikey", "access_key", "secret_key", "private_key",
    "account_key", "signing_key", "encryption_key", "subscription_key", "openai_key", "secret", "password", "passwd",
    "pwd", "passphrase", "credential", "authorization", "auth", "bearer", "cookie", "jwt", "connection_string",
    "signature", "sig",
)  # fmt: skip
# values that give themselves away wherever they stand: tokens of hubs and servers, and passwords within addresses
_SHAPES = re.compile(
    r"(?<=://)[^\s'\"/@:]*:(?!\d+/)[^\s'\"]+(?=@)"  # a password may hold what an address must not: / and @
    r"|(?<=://)[^/\s@'\"]+(?=@)|(?<=Bearer )[^\s'\"]+|(?<=(?i:authorization: basic) )[^\s'\"]+"
    r"|\b(?:hf_[A-Za-z0-9]{16,}|api_org_[A-Za-z0-9]{16,}|sk-[\w-]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}"
    r"|glpat-[\w-]{16,}|xox[abprs]-[\w-]{10,}|AKIA[A-Z0-9]{12,}|AIza[\w-]{30,}|(?:gsk|r8)_[A-Za-z0-9]{20,}"
    r"|(?:nvapi|xai|pplx)-[\w-]{20,}|wandb_v1_\w{20,}|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]+)"
)
# name=value and "name": value; then {name: value, name: value}, as YAML has it on one line
_PAIRS = (
    re.compile(r"""([\w-]+)(['"]\s*:\s*|=)('(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|[^\s,;'"})\]]+)"""),
    re.compile(r"(?<=[{,])(\s*[\w-]+)(:\s*)([^\s,}]+)"),
)
_SHORTEST = 4  # shorter values are not replaced in texts: they would take half of a message with them
_seen: set[str] = set()


def is_secret(key: str) -> bool:
    """Return whether a setting, a header or an environment variable of this name holds a secret."""
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key.lstrip("-")).lower().replace("-", "_")  # accessToken
    name = re.sub(r"_?\d+$", "", name)  # API_KEY_2
    if name != "tokens":
        name = name.removesuffix("s")
    return name in SECRET_KEYS or any(name.endswith(f"_{end}") for end in SECRET_KEYS if end != "token")


def without_secrets(value: Any) -> Any:
    """Return a config, at any depth, as it may be written or shown: secret keys are left out.

    Mappings and sequences are copied, other values are kept as they are. Among command-line words the values after
    secret keys are masked, and so are strings with the shape of a secret.
    """
    if isinstance(value, str):
        return _mask_shapes(value) if type(value) is str else value
    if isinstance(value, dict):
        return {k: without_secrets(v) for k, v in value.items() if not (is_secret(str(k)) and _holds_secret(v))}
    if type(value) in (list, tuple):
        words = [None, *value]
        shown = [
            MASK
            if isinstance(before, str) and before.startswith("--") and is_secret(before)
            else without_secrets(word)
            for before, word in zip(words, value)
        ]
        return type(value)(shown)
    return value


def remember_secrets(value: Any, *, secret: bool = False) -> None:
    """Note the secret values of a config, at any depth, so that `masked` finds them in any text from now on.

    Args:
        value: a config, or a part of one.
        secret: whether it stands below a key that says so.
    """
    if isinstance(value, Mapping):
        for key, item in value.items():
            remember_secrets(item, secret=secret or is_secret(str(key)))
    elif isinstance(value, (list, tuple)):
        for item in value:
            remember_secrets(item, secret=secret)
    elif secret and isinstance(value, (str, int, float)) and _holds_secret(value):
        _seen.add(str(value))


def masked(text: str) -> str:
    """Replace the secrets in a log line or an error message: noted ones, the environment's, and their shapes."""
    environment = {value for name, value in os.environ.items() if is_secret(name)}
    for secret in sorted(_seen | environment, key=len, reverse=True):
        if len(secret) >= _SHORTEST:
            for form in {
                secret,
                json.dumps(secret)[1:-1],
                json.dumps(secret, ensure_ascii=False)[1:-1],
                quote(secret),
            }:
                text = text.replace(form, MASK)
    return _mask_shapes(text)


def _holds_secret(value: Any) -> bool:
    return value is not None and not isinstance(value, bool)  # `token: true` means the login of this machine


def _mask_shapes(text: str) -> str:
    text = _SHAPES.sub(MASK, text)
    for pattern in _PAIRS:
        text = pattern.sub(lambda pair: pair[1] + pair[2] + MASK if is_secret(pair[1].strip()) else pair[0], text)
    return text


class SecretsStayOut:
    """Mixin of trainer configs, before transformers' class: secrets stay in memory and out of every copy on disk.

    transformers pickles the config beside each checkpoint (`training_args.bin`), pushes that file, and hands
    `to_dict()` to trackers; a notebook shows `repr`.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.__repr__ = cls.__str__ = SecretsStayOut.__repr__  # type: ignore  # before @dataclass adds one

    def __getstate__(self) -> dict[str, Any]:
        return without_secrets(self.__dict__)

    def __copy__(self) -> Any:
        return self._copied(dict(self.__dict__))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self._copied(deepcopy(self.__dict__, memo))

    def _copied(self, state: dict[str, Any]) -> Any:
        # a copy in memory keeps the secrets, unlike a pickle
        made = object.__new__(type(self))
        made.__dict__.update(state)
        return made

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as trackers show them."""
        return without_secrets(super().to_dict())  # type: ignore[misc]

    def __repr__(self) -> str:
        declared = dataclasses.fields(self)  # type: ignore[arg-type]
        shown = without_secrets({field.name: getattr(self, field.name) for field in declared})
        return f"{type(self).__name__}(\n" + "".join(f"{name}={value!r},\n" for name, value in shown.items()) + ")"
