"""Pages of the site that are written from the code: settings, recipes, memory, older keys; and the notebooks.

    python docs/generated_pages.py FOLDER      (docs/conf.py calls `write` before each build)

What is true of the code cannot be wrong on a page that is made of it. The folder is not committed.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from transformers import Gemma2Config, LlamaConfig, Qwen2Config
from trl import DPOConfig as TRLDPOConfig
from trl import ModelConfig

from prefopt import DPOConfig, WPOConfig, memory
from prefopt.arguments import default_of
from prefopt.cli import COMMANDS, arguments_of
from prefopt.files import read_yaml
from prefopt.hardware import GIB
from prefopt.pages import escape
from prefopt.pipelines.run import LOOPS, PipelineArguments
from prefopt.recipes.arguments import DatasetArguments, RunArguments
from prefopt.recipes.help import WITHOUT_EFFECT, about, declaring_class
from prefopt.recipes.legacy import ALWAYS_SO, RENAMED
from prefopt.recipes.recipe import plain
from prefopt.recipes.source import PACKAGE, locate, packaged_names
from prefopt.trainers.config import NOT_HONOURED, WITHOUT_COUNTERPART

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


def write(folder: Path) -> None:
    """Write all generated pages to `folder`, and nothing else into it."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "tables").mkdir(parents=True)
    pages = {
        "settings_of_methods": settings_of_methods(),
        "settings_shared": settings_shared(),
        "settings_of_tools": settings_of_tools(),
        "settings_of_libraries": settings_of_libraries(),
        "recipes": recipes(),
        "tables/memory": memory_table(),
        "tables/older_keys": older_keys(),
        "tables/other_defaults": other_defaults(),
        "tables/unsupported": unsupported(),
        "tables/more_explanation": unlisted(HERE),
        "tables/more_how_to": unlisted(HERE / "how_to"),
        "tables/commands": commands(),
    }
    for name, text in pages.items():
        (folder / f"{name}.md").write_text(text.rstrip() + "\n", encoding="utf-8")
    for notebook in sorted((ROOT / "examples" / "notebooks").glob("*.ipynb")):
        shutil.copy(notebook, folder / notebook.name)


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """Write a table; cells are Markdown already."""
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


# --- settings


def own_fields(cls: type) -> list[dataclasses.Field[Any]]:
    """Return the fields that a class declares itself, or declares anew with another default."""
    return [field for field in dataclasses.fields(cls) if field.init and declaring_class(cls, field.name) is cls]


def fields_table(fields: Iterable[dataclasses.Field[Any]]) -> str:
    """Write fields with default and meaning."""
    return table(("setting", "default", "meaning"), [field_row(field) for field in fields])


def field_row(field: dataclasses.Field[Any]) -> tuple[str, str, str]:
    """Return the cells of one setting: what its declaration says, in words."""
    known = field.metadata
    default = default_of(field)
    shown = "required" if known.get("required") or default is dataclasses.MISSING else _code(plain(default))
    meaning = [" ".join(str(known.get("help", "")).replace("%%", "%").split())]
    if known.get("choices"):
        meaning.append("One of " + ", ".join(_code(choice) for choice in known["choices"]) + ".")
    bounds = [
        f"{name.replace('_', ' ')} {known[name]:g}" for name in ("at_least", "above", "at_most") if name in known
    ]
    if bounds:
        meaning.append(f"Must be {' and '.join(bounds)}.")
    for selector, values in known.get("only_for", {}).items():
        meaning.append(f"Read with `{selector}` " + " or ".join(_code(value) for value in values) + " only.")
    text = " ".join(part for part in meaning if part)
    return f"`{field.name}`", shown, _cell(text)


def _code(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    text = str(value).replace("|", "\\|").replace("\n", " ")
    return f"`{text}`" if text else "empty"


def _cell(text: str) -> str:
    # code keeps its marks; everything else is shown literally, with the spaces around it
    parts = re.split(r"(`[^`]+`)", text)
    return "".join(part.replace("|", "\\|") if part.startswith("`") else _spaced(part) for part in parts)


def _spaced(text: str) -> str:
    inner = text.strip()
    return text.replace(inner, escape(inner)) if inner else text


def ancestry(cls: type) -> Iterator[type]:
    """Return the dataclasses that a config is made of, itself first."""
    for base in cls.__mro__:
        if dataclasses.is_dataclass(base) and any(
            declaring_class(cls, f.name) is base for f in dataclasses.fields(cls)
        ):
            yield base


def is_ours(cls: type) -> bool:
    """Return whether a class is prefopt's."""
    return cls.__module__.split(".")[0] == "prefopt"


def method_configs() -> dict[str, type]:
    """Return the command and the config class of each method."""
    return {name: arguments_of(name)[0] for name, command in COMMANDS.items() if command.is_method}


def settings_of_methods() -> str:
    """Write the settings that one method's config declares, or gives another default."""
    parts = [
        "# Settings of the methods",
        "Each method's config has these settings of its own (or with a default of its own), those that "
        "[methods share](settings_shared.md), and those of [TRL and transformers](settings_of_libraries.md). "
        "In a recipe and on the command line they are keys; in Python, arguments of the config.",
    ]
    for name, cls in method_configs().items():
        fields = own_fields(cls)
        parts += [f"## `{cls.__name__}`: `prefopt {name}`"]
        parts += [fields_table(fields) if fields else "Nothing beyond what methods share."]
    return "\n\n".join(parts)


def settings_shared() -> str:
    """Write the settings that several methods share, and those of every training recipe."""
    configs = method_configs()
    own = set(configs.values())
    bases: dict[type, list[str]] = {}
    for name, cls in configs.items():
        for base in ancestry(cls):
            if is_ours(base) and base not in own:
                bases.setdefault(base, []).append(name)
    parts = ["# Settings that methods share"]
    for base, names in bases.items():
        users = "all methods" if len(names) == len(configs) else ", ".join(f"`{name}`" for name in names)
        parts += [f"## `{base.__name__}`", f"In the configs of {users}.", fields_table(own_fields(base))]
    parts += [
        "## Data",
        "Keys of every training recipe: which rows are read.",
        fields_table(own_fields(DatasetArguments)),
    ]
    parts += ["## The run", "Keys of every training recipe.", fields_table(own_fields(RunArguments))]
    return "\n\n".join(parts)


def settings_of_tools() -> str:
    """Write the settings of the commands that train nothing, and of the loops."""
    parts = ["# Settings of the other commands"]
    for name, command in COMMANDS.items():
        fields = {
            field.name: field
            for cls in (() if command.is_method else arguments_of(name))
            for field in dataclasses.fields(cls)
            if field.init and is_ours(declaring_class(cls, field.name))
        }
        if fields:
            summary = f"{command.summary[:1].upper()}{command.summary[1:]}."
            parts += [f"## `prefopt {name}`", summary, fields_table(fields.values())]
    parts += ["## `prefopt pipeline`", "Keys of every loop.", fields_table(own_fields(PipelineArguments))]
    for name, loop in LOOPS.items():
        parts += [f"### The loop `{name}`", fields_table(own_fields(loop.keys))]
    return "\n\n".join(parts)


def settings_of_libraries() -> str:
    """Write the settings that come from TRL and transformers, each once."""
    seen: dict[type, dict[str, dataclasses.Field[Any]]] = {}
    for cls in [*method_configs().values(), ModelConfig]:
        for field in dataclasses.fields(cls):
            owner = declaring_class(cls, field.name)
            if field.init and not is_ours(owner) and field.name not in WITHOUT_EFFECT:
                seen.setdefault(owner, {}).setdefault(field.name, field)
    intro = (
        "Their help texts as they come. Where a method declares one of these anew, its own "
        "[page](settings_of_methods.md) or the [shared one](settings_shared.md) has the default that counts. Settings "
        "that would do nothing here raise, and are left out: "
        + ", ".join(f"`{name}`" for name in sorted(WITHOUT_EFFECT))
        + "."
    )
    parts = ["# Settings of TRL and transformers", intro]
    for owner, fields in seen.items():
        library, name = owner.__module__.partition(".")[0], owner.__name__
        title = f"what its configs share (`{name}`)" if name.startswith("_") else f"`{name}`"
        parts += [f"## {library}: {title}", fields_table(fields.values())]
    return "\n\n".join(parts)


def commands() -> str:
    """Write all commands."""
    return table(("command", "does"), [(f"`prefopt {name}`", escape(each.summary)) for name, each in COMMANDS.items()])


# --- recipes


def recipes() -> str:
    """Write the packaged recipes with model, data and where their values come from."""
    parts = [
        "# The packaged recipes",
        "`prefopt recipes` prints this list. *Published* and *ours* count the values of a recipe (those of its base "
        "included) by the comment beside them: published by the authors of the method, or chosen here.",
    ]
    groups: dict[str, list[str]] = {}
    for name in packaged_names("training_configs"):
        if not name.startswith("fragments/"):
            groups.setdefault(name.rpartition("/")[0] or "at the top level", []).append(name)
    for group, names in groups.items():
        rows = [recipe_row(name) for name in names]
        parts += [f"## {group}", table(("recipe", "what", "model", "data", "published", "ours"), rows)]
    return "\n\n".join(parts)


def recipe_row(name: str) -> tuple[str, ...]:
    """Return the cells of one recipe."""
    values, text = _with_bases(name)
    data = (
        values.get("dataset_name")
        or values.get("dataset_mixer")
        or values.get("dataset_mixture")
        or values.get("prompts")
    )
    return (
        f"`{name}`",
        escape(about(name)),
        _code(values["model_name_or_path"]) if "model_name_or_path" in values else "",
        ", ".join(f"`{source}`" for source in _sources(data)),
        str(len(re.findall(r"# published", text))),
        str(len(re.findall(r"# ours", text))),
    )


def _with_bases(name: str) -> tuple[dict[str, Any], str]:
    path = PACKAGE / "training_configs" / f"{name}.yaml"
    values, text = dict(read_yaml(path)[0]), path.read_text(encoding="utf-8")
    bases = values.get("base_recipe") or []
    for base in [bases] if isinstance(bases, str) else bases:
        known = packaged_names("training_configs")
        found = (
            base
            if base in known
            else str((path.parent / base).resolve().relative_to((PACKAGE / "training_configs").resolve()))
        )
        older, more = _with_bases(found.removesuffix(".yaml"))
        values, text = {**older, **values}, text + more
    return values, text


def _sources(data: Any) -> list[str]:
    if isinstance(data, str):
        return [data]
    if isinstance(data, dict):
        return [part["id"] for part in data["datasets"]] if "datasets" in data else [str(name) for name in data]
    parts = [part["path"] if isinstance(part, dict) else str(part) for part in data or ()]
    return list(dict.fromkeys(parts))


# --- memory

FITS = memory.USABLE * memory.ASSUMED_CARD  # bytes that an estimate may fill of the card that the marks are for
# published shapes; small changes of a config change little
MODELS = {
    "Qwen2.5-0.5B": Qwen2Config(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
                                num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True),
    "Qwen2.5-7B": Qwen2Config(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
                              num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=False),
    "Llama-3-8B": LlamaConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                              num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=False),
    "Gemma-2-9B": Gemma2Config(hidden_size=3584, intermediate_size=14336, num_hidden_layers=42, num_attention_heads=16,
                               num_key_value_heads=8, head_dim=256, vocab_size=256000),
    "Gemma-2-27B": Gemma2Config(hidden_size=4608, intermediate_size=36864, num_hidden_layers=46,
                                num_attention_heads=32, num_key_value_heads=16, head_dim=128, vocab_size=256000),
    "Llama-3-70B": LlamaConfig(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
                               num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=False),
}  # fmt: skip
# accelerate config, cards, 4-bit base with an adapter, the reference kept in memory
SETUPS = (
    ("single_gpu", 1, True, False),
    ("single_gpu", 1, False, False),
    ("deepspeed_zero2", 8, False, False),
    ("deepspeed_zero3", 8, False, True),
    ("deepspeed_zero3_offload", 8, False, True),
    ("deepspeed_zero3_multinode", 16, False, True),
    ("deepspeed_zero3_multinode", 64, False, True),
)
TOKENS, SCORED = 2 * 2 * 2048, 2 * 2 * 512  # a micro-batch of two pairs, unshared prompts


def memory_table() -> str:
    """Estimate the memory of one card for sizes of models and ways to spread them."""
    from peft import LoraConfig

    adapter = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    shapes = {
        (name, four_bit): memory.ModelShape.of(config, adapter if four_bit else None)
        for name, config in MODELS.items()
        for four_bit in (False, True)
    }
    rows = []
    for config, cards, four_bit, reference in SETUPS:
        launch = memory.Launch.read(locate(config, "accelerate_configs"), cards)
        what = "QLoRA, r = 16" if four_bit else "in full" if reference else "in full, cached reference"
        cells = [f"{cards} × `{config}`, {what}"]
        for name in MODELS:
            run = memory.Run(
                shapes[name, four_bit],
                launch,
                dtype="bfloat16",
                bf16=True,
                optimizer="adamw_torch",
                four_bit=four_bit,
                keeps_reference=reference,
            )
            size = memory.estimate(run, memory.Recomputation("all"), tokens=TOKENS, scored_tokens=SCORED).total
            number = f"{size / GIB:.0f}"
            cells.append(f"**{number}**" if size < FITS else number)
        rows.append(tuple(cells))
    return table(("cards × accelerate config, what is trained", *MODELS), rows)


# --- older keys


def older_keys() -> str:
    """Write how keys of older recipes are read, as the table that reads them has it."""
    rows = [(f"`{old}`", f"`{new}`") for old, new in RENAMED.items()]
    rows += [
        ("`torch_dtype`", "`dtype`; `null` is `float32`, which it meant then"),
        ("`warmup_ratio`", "`warmup_steps` below 1: a share of all steps"),
        ("`use_flash_attention_2: true`", "`attn_implementation: flash_attention_2`"),
        ("`gamma_beta_ratio` without `loss_type`", "`loss_type: simpo`"),
    ]
    for old, (value, reason) in ALWAYS_SO.items():
        word = {True: "true", False: "false", None: "null"}.get(value, value)
        given = f"`{old}`" if value is ... else f"`{old}: {word}`"
        rows.append((given, f"nothing: {_cell(reason)}" + ("" if value is ... else "; an error with another value")))
    return table(("older key", "read as"), rows)


def other_defaults() -> str:
    """Write the settings of TRL's `DPOConfig` that have another default here."""
    theirs = {field.name: default_of(field) for field in dataclasses.fields(TRLDPOConfig)}
    ours = [{field.name: default_of(field) for field in dataclasses.fields(cls)} for cls in (DPOConfig, WPOConfig)]
    rows = [
        (f"`{name}`", *(_code(plain(defaults[name])) for defaults in (theirs, *ours)))
        for name in theirs
        if any(defaults[name] != theirs[name] for defaults in ours)
    ]
    return table(("setting", "TRL", "`DPOConfig` here", "`WPOConfig`"), rows)


def unsupported() -> str:
    """Write the settings of TRL and transformers that raise when they are set."""
    rows = [(f"`{name}`", _cell(instead)) for name, _, instead in (*WITHOUT_COUNTERPART, *NOT_HONOURED)]
    return table(("setting", "instead"), rows)


# --- pages without a place


def unlisted(folder: Path) -> str:
    """Write a list of the folder's pages that no list of the site names, so that none is lost."""
    lists = [HERE / "index.md", HERE / "explanation.md", *HERE.glob("*/index.md")]
    named: set[Path] = set(lists)
    for path in lists:
        for block in re.findall(r"```{toctree}\n(.*?)```", path.read_text(encoding="utf-8"), flags=re.DOTALL):
            entries = [line for line in block.splitlines() if line and not line.startswith(":")]
            named |= {(path.parent / f"{entry}.md").resolve() for entry in entries}
    names = [path.stem for path in sorted(folder.glob("*.md")) if path.resolve() not in named]
    if not names:
        return "<!-- every page has its place -->"
    return "\n".join(["```{toctree}", ":maxdepth: 1", "", *names, "```"])


def main() -> int:
    """Write the pages to the folder that is named."""
    write(Path(sys.argv[1]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
