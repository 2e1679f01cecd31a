"""`prefopt score-references RECIPE`: fill the score cache ahead of training, for the recipe of any pair method.

With a multi-reference recipe the text of all its rows is scored under each of its references, one of them in memory at
a time, and their health cards are printed. With any other recipe the policy's initial model scores the policy's own
token ids.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import Accelerator
from datasets import Dataset, concatenate_datasets

from prefopt.arguments import missing
from prefopt.data import load_datasets
from prefopt.data.rows import CONTEXT_COLUMNS
from prefopt.launch import launch, print_on_main, split_launch_settings, without_launch_words, world_size
from prefopt.progress import library_bars
from prefopt.recipes.recipe import Recipe, load_settings, parse_settings
from prefopt.references.cache import default_folder
from prefopt.references.health import cards_table
from prefopt.references.text import ScoringReport, ScoringSettings, cards_of, score_reference
from prefopt.run import build_configs

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
    with library_bars(shown=not recipe.values.get("disable_tqdm")):
        if method == MULTI_REFERENCE:
            _score_text(recipe, classes)
        else:
            _score_tokens(function_of(method), recipe, classes)
    return 0


def _score_tokens(trainer_class: Any, recipe: Recipe, classes: Any) -> None:
    """Build the method's trainer with cached scores, which scores whatever its cache lacks."""
    from prefopt.training import make_trainer

    recipe.values["precompute_ref_log_probs"] = True
    args, data_args, model_args, run_args = build_configs(recipe, classes, world_size())
    make_trainer(trainer_class, "pairs", args, data_args, model_args, run_args)


def _score_text(recipe: Recipe, classes: Any) -> None:
    args, data_args, *_ = build_configs(recipe, classes, world_size())
    if not args.references:
        raise ValueError(missing("references"))
    rows = _rows(args, data_args)
    settings = ScoringSettings(
        root=Path(args.ref_logps_dir) if args.ref_logps_dir else default_folder(),
        max_length=args.max_length,
        dtype=args.reference_dtype,
        batch_layout=args.batch_layout,
        max_tokens=CPU_TOKENS if args.device.type == "cpu" else GPU_TOKENS,
        num_proc=args.dataset_num_proc,
        show_progress=not args.disable_tqdm,
    )
    accelerator = Accelerator()
    for reference in args.references:
        print_on_main(_summary(score_reference(rows, reference, settings, accelerator=accelerator)))
    cards = cards_of(rows, args.references, settings.root, dtype=settings.dtype)
    if accelerator.is_main_process:
        print(cards_table(cards), flush=True)
    print_on_main(f"The scores are in {settings.root}.")


def _rows(args: Any, data_args: Any) -> Dataset:
    """Load all rows that training and evaluation will read, each once."""
    main = data_args.resolve(evaluates=args.do_eval or args.eval_strategy != "no", seed=args.seed)
    sources = [main, *(source for _, source in data_args.named_evaluations())]
    loaded = [part for source in sources for part in load_datasets(source, "pairs", num_proc=args.dataset_num_proc)]
    parts = [
        part.select_columns([name for name in _TEXT_COLUMNS if name in part.column_names])
        for part in loaded
        if part is not None
    ]
    rows = concatenate_datasets(parts)
    first = {row_id: number for number, row_id in reversed(list(enumerate(rows["row_id"])))}
    return rows.select(sorted(first.values()))


def _summary(report: ScoringReport) -> str:
    """Describe what scoring one reference did, in one line."""
    counts = {"rows too long": report.too_long, "rejected by its template": report.refused}
    dropped = ", ".join(f"{count} {words}" for words, count in counts.items() if count)
    found = f"{report.name}: {report.scored} completions scored, {report.found} found"
    return f"{found}{f'; {dropped}' if dropped else ''}."
