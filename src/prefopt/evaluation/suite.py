"""`prefopt evaluate`: one evaluation, or a suite of several over several models with one table."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

from prefopt.arguments import missing, setting
from prefopt.candidates.shards import current_processes
from prefopt.evaluation.evaluate import EvaluateArguments
from prefopt.evaluation.evaluate import run as run_one
from prefopt.evaluation.figures import shown
from prefopt.files import write_json, write_text
from prefopt.launch import print_on_main
from prefopt.pages import escape, printable, table
from prefopt.recipes.convert import convert

SUITE_FILE, SUITE_PAGE, SUITE_TABLE = "suite.json", "suite.md", "suite.csv"
LABEL = "label"
# an entry that brings its answers along needs no model
_PLACE = re.compile(r"\{(\w+)\}")
ANSWERS = ("answers", "model_outputs", "annotations", "judgments")


@dataclass
class SuiteArguments(EvaluateArguments):
    """What is evaluated: a model on pairs, answers against others' answers, a benchmark, or a suite of these."""

    evaluation: list[dict[str, Any]] = setting(
        factory=list,
        help="A suite: evaluations, each a mapping of this command's keys (and a `label`). {model} in a value stands "
        "for a model's name, {key} for a key of its mapping.",
    )
    models: dict[str, Any] = setting(
        factory=dict, help="Models of a suite by name: a folder or hub name, or a mapping with model_name_or_path."
    )

    def __post_init__(self) -> None:
        if self.evaluation:
            if not self.output_dir:
                raise ValueError(missing("output_dir"))
            suite_entries(self)
            return
        if self.models:
            raise ValueError("`models` are those of a suite: list what is evaluated under `evaluation`.")
        super().__post_init__()


@dataclass(frozen=True)
class Entry:
    """One evaluation of a suite: the model's name ("" without models), its label, and its settings."""

    model: str
    label: str
    settings: EvaluateArguments


def run(args: SuiteArguments) -> dict[str, Any]:
    """Run one evaluation or a suite.

    Returns:
        The content of `evaluation.json`, or that of `suite.json`.

    Raises:
        ValueError: see `evaluate.run`; in a suite before anything is evaluated, where the settings tell.
    """
    if not args.evaluation:
        return run_one(args)
    results: dict[str, dict[str, Any]] = {}
    for entry in suite_entries(args):
        print_on_main(printable(f"evaluate: {entry.label}{f' of {entry.model}' if entry.model else ''}"))
        results.setdefault(entry.label, {})[entry.model] = run_one(entry.settings)
    suite = {label: {model: _kept(found) for model, found in by_model.items()} for label, by_model in results.items()}
    if current_processes().is_main:
        write_suite(Path(args.output_dir), suite)
    return suite


def _kept(result: Mapping[str, Any]) -> dict[str, Any]:
    return {key: result[key] for key in ("kind", "model", "figures")}


def suite_entries(args: SuiteArguments) -> list[Entry]:
    """Return every evaluation of a suite, with its settings checked.

    Raises:
        ValueError: an entry that is no mapping, has an unknown key or the label of another, or wrong settings.
    """
    own = {declared.name for declared in fields(SuiteArguments)} - {
        declared.name for declared in fields(EvaluateArguments)
    }
    if given := [name for name in ("answers", "pairs", "kind", "study") if getattr(args, name)]:
        raise ValueError(f"`{given[0]}` stands beside `evaluation`: put it into an entry of the suite.")
    found: list[Entry] = []
    for model, value in (args.models or {"": {}}).items():
        keys_of_model = {"model_name_or_path": value} if isinstance(value, str) else value
        if not isinstance(keys_of_model, dict):
            raise ValueError(f"models: {model}: expected a folder, a hub name or a mapping, not {value!r}.")
        for number, entry in enumerate(args.evaluation, start=1):
            if not isinstance(entry, dict):
                raise ValueError(f"evaluation, entry {number}: expected a mapping of keys, not {entry!r}.")
            label = str(entry.get(LABEL) or entry.get("kind") or ("generations" if "answers" in entry else "pairs"))
            where = f"evaluation, entry {number} ({label})"
            if (own | {"study"}) & set(entry):
                raise ValueError(f"{where}: a suite holds no suites and no studies.")
            if any((each.model, each.label) == (model, label) for each in found):
                raise ValueError(f"{where}: an earlier entry has this name too; give each a `{LABEL}`.")
            found.append(Entry(model, label, _settings(args, entry, model, keys_of_model, label, where)))
    return found


def _settings(
    args: SuiteArguments,
    entry: Mapping[str, Any],
    model: str,
    keys_of_model: Mapping[str, Any],
    label: str,
    where: str,
) -> EvaluateArguments:
    keys = {key: value for key, value in entry.items() if key != LABEL}
    if model:
        try:
            keys = {key: _filled(value, {**keys_of_model, "model": model}) for key, value in keys.items()}
        except KeyError as error:
            raise ValueError(f"{where}: {{{error.args[0]}}} is no key of models: {model}.") from None
        if "model_name_or_path" in keys_of_model and not any(name in keys for name in ANSWERS):
            keys.setdefault("model_name_or_path", keys_of_model["model_name_or_path"])
        keys.setdefault("model_name", model)
    keys.setdefault("output_dir", str(Path(args.output_dir, model, label)))
    keys.setdefault("confidence", args.confidence)
    if unknown := sorted(set(keys) - {declared.name for declared in fields(EvaluateArguments)}):
        raise ValueError(f"{where}: unknown key {unknown[0]!r}; `prefopt evaluate --help` lists the keys.")
    try:
        return EvaluateArguments(**_converted(keys))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _converted(keys: dict[str, Any]) -> dict[str, Any]:
    """Return the values with the types that the settings declare."""
    hints = get_type_hints(EvaluateArguments)
    found = {}
    for key, value in keys.items():
        try:
            found[key] = convert(value, hints[key])
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error
    return found


def _filled(value: Any, names: Mapping[str, Any]) -> Any:
    """Replace {name} in the strings of a value, at any depth."""
    if isinstance(value, str):
        return _PLACE.sub(lambda found: str(names[found[1]]), value)
    if isinstance(value, dict):
        return {key: _filled(item, names) for key, item in value.items()}
    return [_filled(item, names) for item in value] if isinstance(value, list) else value


# ---- the table


def write_suite(folder: Path, suite: Mapping[str, Mapping[str, Any]]) -> None:
    """Write `suite.json`, `suite.md` and `suite.csv`, and print the table."""
    write_json(folder / SUITE_FILE, suite)
    lines = suite_table(suite)
    write_text(folder / SUITE_PAGE, "\n".join(["# Evaluation", "", *lines, ""]))
    write_text(folder / SUITE_TABLE, suite_csv(suite))
    print(printable("\n".join(lines)))
    print(printable(f"evaluate: suite -> {folder / SUITE_PAGE}"), flush=True)


def suite_table(suite: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the lines of a Markdown table: a figure of an evaluation in each row, a model in each column."""
    models = list(dict.fromkeys(model for by_model in suite.values() for model in by_model))
    rows: list[Sequence[object]] = []
    for label, by_model in suite.items():
        for name in dict.fromkeys(name for found in by_model.values() for name in found["figures"]):
            cells = [shown(by_model.get(model, {}).get("figures", {}).get(name)) for model in models]
            rows.append((escape(label), escape(name), *cells))
    return table(("evaluation", "figure", *(escape(model) or "value" for model in models)), rows)


def suite_csv(suite: Mapping[str, Mapping[str, Any]]) -> str:
    """Write one line for each evaluation, model and figure."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(("evaluation", "model", "figure", "value", "low", "high", "interval", "count"))
    for label, by_model in suite.items():
        for model, found in by_model.items():
            for name, figure in found["figures"].items():
                writer.writerow((label, model, name, *figure.values()))
    return file.getvalue()
