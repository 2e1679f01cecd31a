"""One training run from a recipe: data first, then the model, then training, evaluation and what is kept.

`train` is the whole of it; everything that can be wrong is looked at before any weights are loaded and before anything
is written.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from datasets import Dataset
from huggingface_hub import get_token
from transformers import PreTrainedTokenizerBase, set_seed
from trl import ModelConfig

from prefopt.data import TokenizationReport, describe_sample, load_datasets, tokenize_comparisons, tokenize_pairs
from prefopt.launch import rank, tell, world_size
from prefopt.recipes.arguments import DatasetArguments, RunArguments
from prefopt.recipes.recipe import Recipe
from prefopt.run import (
    build_configs,
    check_devices,
    check_model,
    check_output,
    check_reference,
    load_tokenizer,
    missing_packages,
    open_folder,
    pair_models,
    resolved_recipe,
    single_model,
)
from prefopt.trainers.config import model_options

TOKENIZERS = {"pairs": tokenize_pairs, "comparisons": tokenize_comparisons}


def shared_arguments() -> tuple[type, ...]:
    """The dataclasses whose keys every training method has, beside its own config."""
    return (DatasetArguments, ModelConfig, RunArguments)


def train(method: str, trainer_class: Any, rows: str, recipe: Recipe, classes: Sequence[type]) -> None:
    """Run one training method.

    Args:
        method: the command's name.
        trainer_class: the method's trainer.
        rows: what it trains on, "pairs" or "comparisons".
        recipe: all settings.
        classes: the method's config and `shared_arguments()`.

    Raises:
        ValueError: a user's mistake; nothing is left in output_dir.
    """
    resolved = resolved_recipe(recipe, classes)
    check_devices(recipe)
    output_dir, start = check_output(recipe, resolved)
    existed = output_dir.exists()
    try:
        args, data_args, model_args, run_args = build_configs(recipe, classes, world_size())
        set_seed(args.seed)
        if run_args.method is not None and run_args.method.replace("_", "-") != method:
            tell(f"The recipe is written for {run_args.method}; it is run as {method}.")
        for sentence in missing_packages(recipe):
            raise ValueError(sentence)
        trainer = make_trainer(trainer_class, rows, args, data_args, model_args, run_args)
    except BaseException:
        if not existed and rank() == 0:
            with suppress(OSError):  # not empty: not ours
                output_dir.rmdir()
        raise
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        open_folder(output_dir, resolved, overwrite=run_args.overwrite_output_dir)
    trainer.accelerator.wait_for_everyone()
    fit(trainer, start)
    finish(trainer, data_args, push=bool(recipe.values.get("push_to_hub")))


def make_trainer(
    trainer_class: Any,
    rows: str,
    args: Any,
    data_args: DatasetArguments,
    model_args: ModelConfig,
    run_args: RunArguments,
) -> Any:
    """Data, then weights, then the trainer.

    Raises:
        ValueError: what a user can mend.
    """
    name = model_args.model_name_or_path
    assert name is not None
    trainer_class.check_settings(args)
    check_reference(run_args, args, rows)
    check_model(name, model_args, args)
    tokenizer = load_tokenizer(name, model_args, args, run_args)
    train_dataset, eval_dataset = prepare_data(trainer_class, rows, tokenizer, args, data_args)
    if eval_dataset is None and (args.do_eval or args.eval_strategy != "no"):
        tell("There are no evaluation rows, so nothing is evaluated (test_split_size: 0.05 would hold some out).")
        args.eval_strategy = type(args.eval_strategy)("no")
    args.model_init_kwargs = {**model_options(model_args), **(args.model_init_kwargs or {})}
    models = (
        pair_models(name, args, model_args, run_args)
        if rows == "pairs"
        else single_model(name, args, model_args, run_args)
    )
    return trainer_class(
        args=args, train_dataset=train_dataset, eval_dataset=eval_dataset, processing_class=tokenizer, **models
    )


def prepare_data(
    trainer_class: Any, rows: str, tokenizer: PreTrainedTokenizerBase, args: Any, data_args: DatasetArguments
) -> tuple[Dataset, Dataset | dict[str, Dataset] | None]:
    """Tokenised training and evaluation rows; the counts and one decoded sample are printed."""
    datasets, reports = tokenise_data(rows, tokenizer, args, data_args)
    if rank() == 0:
        for report in reports:
            print(report.table(), flush=True)
        print(describe_sample(tokenizer, datasets["train"][0]), flush=True)
    if rows != "pairs":  # the pair trainers look at them before they load weights
        for name, dataset in datasets.items():
            trainer_class.check_data(dataset, args, name)
    train_dataset = datasets.pop("train")
    return train_dataset, datasets if set(datasets) - {"eval"} else datasets.get("eval")


def tokenise_data(
    rows: str, tokenizer: PreTrainedTokenizerBase, args: Any, data_args: DatasetArguments
) -> tuple[dict[str, Dataset], list[TokenizationReport]]:
    """The rows that the recipe names as token ids, and what became of them.

    Returns:
        Each data set by name ("train", "eval" if there is one, and the names of `eval_datasets`); a report for each.
    """
    evaluates = args.do_eval or args.eval_strategy != "no"
    sources = data_args.resolve(evaluates=evaluates, seed=args.seed)
    train_dataset, eval_dataset = load_datasets(sources, rows, num_proc=args.dataset_num_proc)
    if not data_args.evaluates:
        eval_dataset = None  # rows held out are left out of training all the same
    named = {
        name: load_datasets(source, rows, num_proc=args.dataset_num_proc)[0]
        for name, source in data_args.named_evaluations()
    }
    raw = {"train": train_dataset, **({"eval": eval_dataset} if eval_dataset is not None else {}), **named}
    done = {}
    reports = []
    for name, dataset in raw.items():
        done[name], report = TOKENIZERS[rows](
            dataset,
            tokenizer,
            max_length=args.max_length,
            max_prompt_length=args.max_prompt_length,
            truncation_mode=args.truncation_mode,
            on_bad_row=args.on_bad_row,
            num_proc=args.dataset_num_proc,
            name=name,
        )
        reports.append(report)
    return done, reports


def fit(trainer: Any, start: str | None) -> None:
    """Train, from a checkpoint if there is one; errors from here on that are not ours keep their traceback."""
    try:
        result = trainer.train(resume_from_checkpoint=start)
    except (ValueError, OSError) as error:
        if _raised_here(error):
            raise
        raise RuntimeError("training stopped on an error of a library") from error
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()


def _raised_here(error: BaseException) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(Path(__file__).parent) in trace.tb_frame.f_code.co_filename


def finish(trainer: Any, data_args: DatasetArguments, *, push: bool) -> None:
    """Save model, tokenizer and card, evaluate, and push to the hub when asked."""
    trainer.save_model()
    trainer.create_model_card(
        dataset_name=data_args.dataset_name if not Path(data_args.dataset_name or ".").exists() else None
    )
    if trainer.eval_dataset is not None:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    tell(f"The model is in {trainer.args.output_dir}.", stream=sys.stdout)
    if push:
        if trainer.args.hub_token is None and get_token() is None:
            tell(
                "Not pushed: no hub login was found. `hf auth login`, then `hf upload NAME "
                f"{trainer.args.output_dir}`."
            )
        else:
            trainer.push_to_hub()
