"""`prefopt score-references RECIPE`: fill the score cache ahead of training, for the recipe of any pair method.

A multi-reference recipe: the text of all its rows is scored under each of its references, one of them in memory at a
time, and their health cards are printed. Any other: the policy's initial model scores the policy's own token ids.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import Accelerator
from datasets import Dataset, concatenate_datasets

from prefopt.data import load_datasets
from prefopt.data.rows import CONTEXT_COLUMNS
from prefopt.launch import launch, split_launch_settings, print_on_main, without_launch_words
from prefopt.recipes.recipe import Recipe, load_settings, parse_settings
from prefopt.references.cache import default_folder
from prefopt.references.health import cards_table
from prefopt.references.text import (
    ScoringReport,
    ScoringSettings,
    cards_of,
    score_reference,
)

COMMAND = "score-references"
MULTI_REFERENCE = "multi-reference-dpo"
GPU_TOKENS, CPU_TOKENS = 16384, 1024
_TEXT_COLUMNS = ("row_id", "prompt", "chosen", "rejected", *CONTEXT_COLUMNS, "fault", "fault_detail")


def run(words: list[str]) -> int:
    """Score what the recipe among `words` needs.

    Raises:
        ValueError: a mistake in the recipe, or a reference that cannot score its rows.
    """
    from prefopt.cli import COMMANDS, arguments_of, function_of, method_of

    name, settings = load_settings(words)
    launch_settings, settings = split_launch_settings(settings)
    method = method_of(settings)
    if COMMANDS[method].rows != "pairs":
        raise ValueError(f"`{method}` has no reference model, so there is nothing to score.")
    classes = arguments_of(method)
    recipe = parse_settings(name, settings, classes)
    if launch_settings:
        return launch(launch_settings, [COMMAND, *without_launch_words(words)])
    if method == MULTI_REFERENCE:
        _score_text(recipe, classes)
    else:
        _score_tokens(function_of(method), recipe, classes)
    return 0


def _configs(recipe: Recipe, classes: Any) -> tuple[Any, ...]:
    from prefopt.launch import world_size
    from prefopt.run import build_configs

    return build_configs(recipe, classes, world_size())


def _score_tokens(trainer_class: Any, recipe: Recipe, classes: Any) -> None:
    """Build the method's trainer with cached scores, which scores whatever its cache lacks, and stop there."""
    from prefopt.training import make_trainer

    recipe.values["precompute_ref_log_probs"] = True
    args, data_args, model_args, run_args = _configs(recipe, classes)
    make_trainer(trainer_class, "pairs", args, data_args, model_args, run_args)


def _score_text(recipe: Recipe, classes: Any) -> None:
    args, data_args, *_ = _configs(recipe, classes)
    if not args.references:
        raise ValueError("references is missing: name the models whose scores are wanted.")
    rows = _rows(args, data_args)
    settings = ScoringSettings(
        root=Path(args.ref_logps_dir) if args.ref_logps_dir else default_folder(),
        max_length=args.max_length,
        dtype=args.reference_dtype,
        batch_layout=args.batch_layout,
        max_tokens=CPU_TOKENS if args.device.type == "cpu" else GPU_TOKENS,
        num_proc=args.dataset_num_proc,
    )
    accelerator = Accelerator()
    for reference in args.references:
        _tell_report(score_reference(rows, reference, settings, accelerator=accelerator))
    cards = cards_of(rows, args.references, settings.root, dtype=settings.dtype)
    if accelerator.is_main_process:
        print(cards_table(cards), flush=True)
    print_on_main(f"The scores are in {settings.root}.")


def _rows(args: Any, data_args: Any) -> Dataset:
    """All rows that training and evaluation will read, each once."""
    sources = data_args.resolve(evaluates=args.do_eval or args.eval_strategy != "no", seed=args.seed)
    train, evaluation = load_datasets(sources, "pairs", num_proc=args.dataset_num_proc)
    named = [
        load_datasets(source, "pairs", num_proc=args.dataset_num_proc)[0]
        for _, source in data_args.named_evaluations()
    ]
    parts = [
        part.select_columns([name for name in _TEXT_COLUMNS if name in part.column_names])
        for part in (train, evaluation, *named)
        if part is not None
    ]
    rows = concatenate_datasets(parts)
    first = {row_id: number for number, row_id in reversed(list(enumerate(rows["row_id"])))}
    return rows.select(sorted(first.values()))


def _tell_report(report: ScoringReport) -> None:
    lost = [f"{report.too_long} rows too long", f"{report.refused} refused by its template"]
    words = ", ".join(part for part, count in zip(lost, (report.too_long, report.refused)) if count)
    print_on_main(
        f"{report.name}: {report.scored} completions scored, {report.found} found"
        + (f"; {words}" if words else "")
        + "."
    )
