"""One training run from a recipe: data first, then the model, then training, evaluation and what is kept.

`train` is the whole of it; everything that can be wrong is checked before any weights are loaded and before anything
is written.
"""

from __future__ import annotations

import gc
import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from huggingface_hub import get_token
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase, TrainerCallback, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from trl import ModelConfig

from prefopt.data import (
    RowTokenizer,
    TokenizationReport,
    Truncation,
    check_fits_model,
    describe_sample,
    load_tokenized,
)
from prefopt.data.rows import Kind
from prefopt.evaluation import suite
from prefopt.evaluation.figures import EVALUATION_FOLDER
from prefopt.evaluation.suite import SuiteArguments
from prefopt.files import (
    locked,
    parse_yaml,
    read_json,
    storage_fault,
    user_path,
    write_json,
    write_jsonl,
    write_text,
)
from prefopt.hardware import describe_hardware
from prefopt.launch import check_launcher, print_on_main, rank, split_launch_settings, world_size
from prefopt.pages import printable
from prefopt.recipes.arguments import DatasetArguments, RunArguments
from prefopt.recipes.recipe import Recipe, before_training, parse_settings, resolved_yaml
from prefopt.recipes.source import packaged_name, read_settings
from prefopt.references.filling import SHARED_FOLDER_WAIT
from prefopt.reports.runs import NOT_COMPARED, write_report
from prefopt.run import (
    LOG_FILE,
    RECIPE_FILE,
    RUN_FILE,
    TRAIN_FIGURES,
    build_configs,
    check_devices,
    check_output,
    check_reference,
    check_reference_tokenizer,
    is_finished,
    load_tokenizer,
    missing_packages,
    open_folder,
    pair_models,
    read_config,
    resolved_recipe,
    single_model,
)
from prefopt.trainers.config import model_options
from prefopt.trainers.data_tables import show_report
from prefopt.trainers.policy import is_adapter
from prefopt.trainers.samples import SampleCompletionsCallback
from prefopt.waiting import announced_wait, watch_extension_locks

# The Trainer's push to the hub leaves out files whose names begin with an underscore.
LOCK_FILE = "_lock"
DROPPED_FILE = "dropped.jsonl"
SUITE_RECIPE = "suite.yaml"
# settings that say where a run writes, or follow from the machine
NOT_REPORTED = NOT_COMPARED | {"gradient_accumulation_steps", "method"}


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
    watch_extension_locks()
    evaluation = suite_of(recipe)
    with _locked_output(recipe):
        trainer, data_args, output_dir, start, resolved = _prepare(method, trainer_class, rows, recipe, classes)
        with announced_wait("the other ranks to load model and data"):
            trainer.accelerator.wait_for_everyone()
        with writing_to(output_dir, trainer):
            if trainer.is_world_process_zero():
                open_folder(output_dir, resolved, overwrite=bool(recipe.values.get("overwrite_output_dir")))
                write_dropped(output_dir, trainer.data_reports)
                facts = {"method": method, "rows": rows, **differences(recipe, classes, resolved)}
                write_json(output_dir / RUN_FILE, facts | facts_of(trainer))
            with announced_wait("the first rank to open the run's folder"):
                trainer.accelerator.wait_for_everyone()
            if trainer.args.save_strategy != "no":
                check_shared(output_dir)
            trained = fit(trainer, start)
            if trainer.is_world_process_zero() and not (output_dir / RECIPE_FILE).exists():
                open_folder(output_dir, resolved, overwrite=False)  # somebody has emptied the folder meanwhile
            if not trained and is_finished(output_dir, evaluated=trainer.eval_dataset is not None):
                print_on_main(
                    f"{output_dir}: the run had reached its end already; its model and figures are unchanged."
                )
                return
            finish(trainer, data_args, push=bool(recipe.values.get("push_to_hub")))
    if evaluation is not None:
        alone = world_size() == 1 and not trainer.is_deepspeed_enabled
        del trainer
        evaluate_trained(evaluation, alone=alone)


def suite_of(recipe: Recipe) -> SuiteArguments | None:
    """Return the suite that a recipe's `evaluation` asks for after training, checked; None without one.

    Raises:
        ValueError: an entry that cannot be evaluated.
    """
    if not recipe.values.get("evaluation"):
        return None
    model = user_path(recipe.values.get("output_dir") or ".")
    return SuiteArguments(
        output_dir=str(model / EVALUATION_FOLDER),
        models={model.absolute().name: str(model)},
        evaluation=recipe.values["evaluation"],
    )


def evaluate_trained(args: SuiteArguments, *, alone: bool) -> None:
    """Run a suite on the model that has been trained, and write it as `suite.yaml`.

    Args:
        args: the suite.
        alone: False where several processes or DeepSpeed have trained: their memory is not free again, and the command
            that evaluates is printed instead.
    """
    place = Path(args.output_dir) / SUITE_RECIPE
    if rank() == 0:
        keys = {name: getattr(args, name) for name in ("output_dir", "models", "evaluation")}
        write_text(place, yaml.safe_dump(keys, sort_keys=False))
    if not alone:
        print_on_main(f"Evaluate the model with: prefopt evaluate {place}", stream=sys.stdout)
        return
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    suite.run(args)


def differences(recipe: Recipe, classes: Sequence[type], resolved: str) -> dict[str, Any]:
    """Return what the run's report says about the recipe: how it differs from the packaged one, or from the defaults.

    Returns:
        `baseline`, the packaged recipe's name (None: the defaults), and `differences`, key -> [there, here].
    """
    name = packaged_name(recipe.name) if recipe.name is not None else None
    base = Recipe(None)
    if name is not None:  # its `env:` has had its effect already, where the user left it
        settings = [setting for setting in read_settings(name, []) if setting.key != "env"]
        base = parse_settings(name, split_launch_settings(settings)[1], classes)
    before = parse_yaml(resolved_yaml(base, classes), "the baseline")[0] or {}
    now = parse_yaml(resolved, "the recipe")[0]
    keys = [key for key in now if key not in NOT_REPORTED and before.get(key) != now[key]]
    keys += [key for key in before if key not in now and key in base.values]
    return {"baseline": name, "differences": {key: [before.get(key), now.get(key)] for key in keys}}


def facts_of(trainer: Any) -> dict[str, Any]:
    """Return what the run's report says about data and hardware, as JSON values."""
    data = [
        {key: value for key, value in asdict(report).items() if key not in ("dropped_rows", "examples", "shown")}
        for report in trainer.data_reports
    ]
    hardware = describe_hardware(processes=trainer.args.world_size, device=trainer.args.device)
    return {"data": data, "hardware": hardware}


class LogFile(TrainerCallback):
    """Appends every log to the run's log file as it is made, so that a run that is killed leaves all but the last."""

    def __init__(self, output_dir: Path) -> None:
        self.path = output_dir / LOG_FILE
        self._trains = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note after which step training begins: logs of later ones, of an earlier attempt, count no more."""
        self._trains = state.global_step < state.max_steps  # a finished run that is started again logs nothing new
        if self._trains:
            self._append(state, {"step": state.global_step, "max_steps": state.max_steps})

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Append the last log, as the trainer's state has it."""
        if self._trains and state.log_history:
            self._append(state, state.log_history[-1])

    def _append(self, state: Any, entry: dict[str, Any]) -> None:
        if state.is_world_process_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)  # somebody may have removed it meanwhile
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")


@contextmanager
def _locked_output(recipe: Recipe) -> Iterator[None]:
    """Hold the lock of the run's folder, on the first process; folders that were made for it and are empty go again.

    Raises:
        ValueError: another run is at work there.
    """
    output_dir = user_path(recipe.values.get("output_dir") or ".").absolute()
    there = next(path for path in (output_dir, *output_dir.parents) if path.exists())
    if rank() != 0 or not recipe.values.get("output_dir") or not there.is_dir() or not os.access(there, os.W_OK):
        yield  # `check_output` says what is wrong with the folder
        return
    made = [path for path in (output_dir, *output_dir.parents) if not path.exists()]
    try:
        with locked(output_dir, name=LOCK_FILE, remove=True):
            yield
    finally:
        with suppress(OSError):  # not empty
            for folder in made:
                folder.rmdir()


def check_same_start(start: str | None) -> None:
    """Raise a ValueError on all ranks where they would not continue from the same checkpoint; all call it."""
    if world_size() == 1:
        return
    name = None if start is None else Path(start).name
    found = gather_object([(socket.gethostname(), name)])
    if len({seen for _, seen in found}) > 1:
        (first, wanted), (other, seen) = found[0], next(entry for entry in found if entry[1] != found[0][1])
        raise ValueError(
            f"The first rank, on {first}, would start from {wanted or 'the beginning'}, and another, on {other}, from "
            f"{seen or 'the beginning'}: output_dir must be a folder that all nodes see."
        )


def check_shared(output_dir: Path) -> None:
    """Raise a ValueError on all ranks where one does not see the folder into which the first has written; all call it.

    Every rank leaves its part of a checkpoint in its folder, and none could be continued from otherwise.
    """
    if world_size() == 1:
        return
    (written,) = broadcast_object_list([_time_of(output_dir / RECIPE_FILE)])
    deadline = time.monotonic() + SHARED_FOLDER_WAIT
    while _time_of(output_dir / RECIPE_FILE) != written and time.monotonic() < deadline:
        time.sleep(0.2)  # a network file system may be late
    found = gather_object([(socket.gethostname(), _time_of(output_dir / RECIPE_FILE) == written)])
    if blind := [host for host, sees in found if not sees]:
        raise ValueError(
            f"{blind[0]} does not see what {found[0][0]} has written to output_dir {output_dir}, so that no "
            "checkpoint could be continued from: name a folder that all nodes see (by its absolute path, unless all "
            "nodes start in one working folder), or set save_strategy: 'no'."
        )


def _time_of(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None


class EndWithLauncher(TrainerCallback):
    """Ends the process at the next step after its launcher has ended, where the kernel has not."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the launcher."""
        check_launcher()


@before_training()
def _prepare(
    method: str, trainer_class: Any, rows: Kind, recipe: Recipe, classes: Sequence[type]
) -> tuple[Any, DatasetArguments, Path, str | None, str]:
    """Make every check, and the trainer; return it with the data's settings, the folder, the start and the recipe."""
    resolved = resolved_recipe(recipe, classes)
    check_devices(recipe)
    output_dir, start = check_output(recipe, resolved)
    with announced_wait("the other ranks to start"):  # the first config connects them
        args, data_args, model_args, run_args = build_configs(recipe, classes, world_size())
    check_same_start(start)
    set_seed(args.seed)
    if run_args.method is not None and run_args.method.replace("_", "-") != method:
        print_on_main(f"The recipe is written for {run_args.method}; it is run as {method}.")
    for sentence in missing_packages(recipe):
        raise ValueError(sentence)
    trainer = make_trainer(trainer_class, rows, args, data_args, model_args, run_args)
    trainer.add_callback(EndWithLauncher())
    trainer.add_callback(LogFile(output_dir))
    if run_args.sample_completions:
        trainer.add_callback(SampleCompletionsCallback(trainer, run_args.sample_completions))
    return trainer, data_args, output_dir, start, resolved


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
    config = read_config(name, model_args, args)
    tokenizer = load_tokenizer(name, model_args, args, run_args)
    check_reference_tokenizer(run_args, args, tokenizer)
    # an adapter may bring embeddings that its base's config does not know of
    fits = None if is_adapter(name) else config
    train_dataset, eval_dataset, reports = prepare_data(trainer_class, rows, tokenizer, args, data_args, fits)
    if eval_dataset is None and (args.do_eval or args.eval_strategy != "no"):
        print_on_main(
            "There are no evaluation rows, so nothing is evaluated (test_split_size: 0.05 would hold some out)."
        )
        args.eval_strategy = type(args.eval_strategy)("no")
    args.model_init_kwargs = {**model_options(model_args), **(args.model_init_kwargs or {})}
    load_models = pair_models if rows == "pairs" else single_model
    models = load_models(name, args, model_args, run_args)
    trainer = trainer_class(
        args=args, train_dataset=train_dataset, eval_dataset=eval_dataset, processing_class=tokenizer, **models
    )
    trainer.data_reports = reports
    return trainer


def prepare_data(
    trainer_class: Any,
    rows: Kind,
    tokenizer: PreTrainedTokenizerBase,
    args: Any,
    data_args: DatasetArguments,
    model_config: Any = None,
) -> tuple[Dataset, Dataset | dict[str, Dataset] | None, list[TokenizationReport]]:
    """Return tokenised training and evaluation rows, checked, and reports; print the counts and one decoded sample."""
    datasets, reports = tokenise_data(rows, tokenizer, args, data_args)
    if rank() == 0:
        for report in reports:
            show_report(report, args.max_length)
        print(printable(describe_sample(tokenizer, datasets["train"][0])), flush=True)
    if model_config is not None:
        for name, dataset in datasets.items():
            check_fits_model(dataset, model_config, name)
    if rows != "pairs":  # the pair trainers check them before they load weights
        for name, dataset in datasets.items():
            trainer_class.check_data(dataset, args, name)
    train_dataset = datasets.pop("train")
    return train_dataset, datasets if set(datasets) - {"eval"} else datasets.get("eval"), reports


def report_run(output_dir: Path) -> None:
    """Write the run's report; what fails there is printed and must not fail a run that has been trained."""
    try:
        page = write_report([output_dir])
    except Exception as error:
        print_on_main(f"The report could not be written: {' '.join(str(error).split()) or type(error).__name__}")
        return
    print_on_main(f"The report is in {page.with_suffix('.html')}.", stream=sys.stdout)


def write_dropped(output_dir: Path, reports: Sequence[TokenizationReport]) -> None:
    """Write every dropped row's set, number, id and reason beside the model, where rows were dropped."""
    rows = [{"set": report.name, **row} for report in reports for row in report.dropped_rows]
    if rows:
        write_jsonl(output_dir / DROPPED_FILE, rows)
    else:
        (output_dir / DROPPED_FILE).unlink(missing_ok=True)  # of a run that is overwritten


def tokenise_data(
    rows: Kind, tokenizer: PreTrainedTokenizerBase, args: Any, data_args: DatasetArguments
) -> tuple[dict[str, Dataset], list[TokenizationReport]]:
    """Tokenise the rows that the recipe names.

    Returns:
        Each data set by name ("train", "eval" if there is one, and the names of `eval_datasets`); a report for each.
    """
    evaluates = args.do_eval or args.eval_strategy != "no"
    sources = data_args.resolve(evaluates=evaluates, seed=args.seed)
    truncation = Truncation(args.max_length, args.max_prompt_length, args.truncation_mode)
    tokenize = RowTokenizer(tokenizer, rows, truncation, text_mode=args.text_mode)
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
    reports = [report for _, report in done.values()]
    for report in reports[1:]:
        if None not in (report.form, reports[0].form) and report.form != reports[0].form:
            raise ValueError(
                f"The train set holds {reports[0].form} and the {report.name} set {report.form}: the chat template is "
                "applied to messages alone, so give both in one form."
            )
    return {name: dataset for name, (dataset, _) in done.items()}, reports


@contextmanager
def writing_to(output_dir: Path, trainer: Any) -> Iterator[None]:
    """Say in one line why the run's folder could not be written, and how the run goes on.

    Raises:
        ValueError: it was full, read-only or removed.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        parameters = list(trainer.model.parameters())
        trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
        # weights, and two float32 moments of what trains
        needed = sum(parameter.numel() * parameter.element_size() for parameter in parameters) + 8 * trained
        reason = storage_fault(error.__cause__ or error, output_dir, needed)
        if reason is None:
            raise
        raise ValueError(
            f"{reason} The last whole checkpoint is kept: once the folder can be written, the same command with "
            "--resume_from_checkpoint true continues from it."
        ) from error


def fit(trainer: Any, start: str | None) -> bool:
    """Train, from a checkpoint if there is one; return whether a step was left to train.

    Errors of libraries from here on keep their traceback. Figures that exist are not replaced by those of no step.
    """
    before = read_json(Path(start) / TRAINER_STATE_NAME)["global_step"] if start else 0
    try:
        result = trainer.train(resume_from_checkpoint=start)
    except (ValueError, OSError) as error:
        if _raised_here(error):
            raise
        raise RuntimeError("training stopped on an error of a library") from error
    trained, output_dir = result.global_step > before, Path(trainer.args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)  # trained weights must not be lost where somebody removed it
    if trained or not (output_dir / TRAIN_FIGURES).exists():
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)
        trainer.save_state()
    return trained


def _raised_here(error: BaseException) -> bool:
    *_, last = traceback.extract_tb(error.__traceback__)
    return str(Path(__file__).parent) in last.filename


def finish(trainer: Any, data_args: DatasetArguments, *, push: bool) -> None:
    """Save model, tokenizer and card, evaluate, and push to the hub when asked."""
    trainer.save_model()
    if trainer.eval_dataset is not None:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    trainer.create_model_card(
        dataset_name=data_args.dataset_name if not Path(data_args.dataset_name or ".").exists() else None
    )
    if trainer.is_world_process_zero():
        report_run(Path(trainer.args.output_dir))
    print_on_main(f"The model is in {trainer.args.output_dir}.", stream=sys.stdout)
    if push:
        if trainer.args.hub_token is None and get_token() is None:
            print_on_main(
                "Not pushed: no hub login was found. `hf auth login`, then `hf upload NAME "
                f"{trainer.args.output_dir}`."
            )
        else:
            trainer.push_to_hub()
