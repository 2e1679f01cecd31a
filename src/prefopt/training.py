"""One training run from a recipe: data first, then the model, then training, evaluation and what is kept.

`train` is the whole of it; everything that can be wrong is checked before any weights are loaded and before anything
is written.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from datasets import Dataset
from huggingface_hub import get_token
from transformers import PreTrainedTokenizerBase, set_seed
from trl import ModelConfig

from prefopt.data import RowTokenizer, TokenizationReport, Truncation, describe_sample, load_tokenized
from prefopt.data.rows import Kind
from prefopt.launch import print_on_main, rank, world_size
from prefopt.recipes.arguments import DatasetArguments, RunArguments
from prefopt.recipes.recipe import Recipe
from prefopt.run import (
    build_configs,
    check_devices,
    check_output,
    check_reference,
    load_tokenizer,
    missing_packages,
    model_options,
    open_folder,
    pair_models,
    read_config,
    resolved_recipe,
    single_model,
)


def shared_arguments() -> tuple[type, ...]:
    """Return the dataclasses whose keys every training method has, beside its own config."""
    return (DatasetArguments, ModelConfig, RunArguments)


def train(method: str, trainer_class: Any, rows: Kind, recipe: Recipe, classes: Sequence[type]) -> None:
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
            print_on_main(f"The recipe is written for {run_args.method}; it is run as {method}.")
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
    rows: Kind,
    args: Any,
    data_args: DatasetArguments,
    model_args: ModelConfig,
    run_args: RunArguments,
) -> Any:
    """Prepare the data, load the weights and build the trainer, in this order.

    Raises:
        ValueError: a user's mistake.
    """
    name = model_args.model_name_or_path
    assert name is not None
    trainer_class.check_settings(args)
    check_reference(run_args, args, rows)
    read_config(name, model_args, args)
    tokenizer = load_tokenizer(name, model_args, args, run_args)
    train_dataset, eval_dataset = prepare_data(trainer_class, rows, tokenizer, args, data_args)
    if eval_dataset is None and (args.do_eval or args.eval_strategy != "no"):
        print_on_main(
            "There are no evaluation rows, so nothing is evaluated (test_split_size: 0.05 would hold some out)."
        )
        args.eval_strategy = type(args.eval_strategy)("no")
    args.model_init_kwargs = {**model_options(model_args), **(args.model_init_kwargs or {})}
    load_models = pair_models if rows == "pairs" else single_model
    models = load_models(name, args, model_args, run_args)
    return trainer_class(
        args=args, train_dataset=train_dataset, eval_dataset=eval_dataset, processing_class=tokenizer, **models
    )


def prepare_data(
    trainer_class: Any, rows: Kind, tokenizer: PreTrainedTokenizerBase, args: Any, data_args: DatasetArguments
) -> tuple[Dataset, Dataset | dict[str, Dataset] | None]:
    """Return tokenised training and evaluation rows; print the counts and one decoded sample."""
    datasets, reports = tokenise_data(rows, tokenizer, args, data_args)
    if rank() == 0:
        for report in reports:
            print(report.table(), flush=True)
        print(describe_sample(tokenizer, datasets["train"][0]), flush=True)
    if rows != "pairs":  # the pair trainers check them before they load weights
        for name, dataset in datasets.items():
            trainer_class.check_data(dataset, args, name)
    train_dataset = datasets.pop("train")
    return train_dataset, datasets if set(datasets) - {"eval"} else datasets.get("eval")


def tokenise_data(
    rows: Kind, tokenizer: PreTrainedTokenizerBase, args: Any, data_args: DatasetArguments
) -> tuple[dict[str, Dataset], list[TokenizationReport]]:
    """Tokenise the rows that the recipe names.

    Returns:
        Each data set by name ("train", "eval" if there is one, and the names of `eval_datasets`); a report for each.
    """
    evaluates = args.do_eval or args.eval_strategy != "no"
    sources = data_args.resolve(evaluates=evaluates, seed=args.seed)
    tokenize = RowTokenizer(tokenizer, rows, Truncation(args.max_length, args.max_prompt_length, args.truncation_mode))
    train, evaluation = load_tokenized(sources, tokenize, num_proc=args.dataset_num_proc)
    mapped = {"train": train}
    if evaluation is not None and data_args.evaluates:  # rows held out are left out of training all the same
        mapped["eval"] = evaluation
    for name, source in data_args.named_evaluations():
        mapped[name], _ = load_tokenized(source, tokenize, num_proc=args.dataset_num_proc)
    done = {
        name: tokenize.settle(dataset, on_bad_row=args.on_bad_row, name=name, one_form=True)
        for name, dataset in mapped.items()
    }
    return {name: dataset for name, (dataset, _) in done.items()}, [report for _, report in done.values()]


def fit(trainer: Any, start: str | None) -> None:
    """Train, from a checkpoint if there is one. An error that a library raises keeps its traceback."""
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
    *_, last = traceback.extract_tb(error.__traceback__)
    return str(Path(__file__).parent) in last.filename


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
    print_on_main(f"The model is in {trainer.args.output_dir}.", stream=sys.stdout)
    if push:
        if trainer.args.hub_token is None and get_token() is None:
            print_on_main(
                "Not pushed: no hub login was found. `hf auth login`, then `hf upload NAME "
                f"{trainer.args.output_dir}`."
            )
        else:
            trainer.push_to_hub()
