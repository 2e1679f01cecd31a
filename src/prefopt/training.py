"""One training run from a recipe: data first, then the model, then training, evaluation and what is kept.

`train` is the whole of it; everything that can be wrong is looked at before any weights are loaded and before anything is written.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from huggingface_hub import get_token
from peft import AutoPeftModelForCausalLM
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase, set_seed
from trl import ModelConfig, get_peft_config, get_quantization_config

from prefopt.data import TokenizationReport, describe_sample, load_datasets, tokenize_comparisons, tokenize_pairs
from prefopt.launch import is_launched, rank, world_size
from prefopt.recipes.arguments import DatasetArguments, RunArguments
from prefopt.recipes.recipe import Recipe, build, resolved_yaml
from prefopt.run_folder import find_start, open_folder
from prefopt.trainers.policy import load_model, with_pad_token

TOKENIZERS = {"pairs": tokenize_pairs, "comparisons": tokenize_comparisons}
LM_HEADS = ("lm_head", "embed_out", "output")


def shared_arguments() -> tuple[type, ...]:
    """The dataclasses whose keys every training method has, beside its own config."""
    return (DatasetArguments, ModelConfig, RunArguments)


def train(method: str, trainer_class: type, rows: str, recipe: Recipe, classes: Sequence[type]) -> None:
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
    resolved = resolved_yaml(recipe, classes, without_defaults=derived_keys(recipe))
    check_devices(recipe)
    output_dir, start = check_output(recipe, resolved)
    existed = output_dir.exists()
    try:
        args, data_args, model_args, run_args = build_configs(recipe, classes, world_size())
        set_seed(args.seed)
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


def derived_keys(recipe: Recipe) -> frozenset[str]:
    """Keys whose value follows from another one, so that the resolved recipe must not fix them."""
    return frozenset({"gradient_accumulation_steps"} if "global_batch_size" in recipe.values else set())


def check_devices(recipe: Recipe) -> None:
    """Refuse several visible GPUs without a launcher: one process would spread each batch over them.

    Raises:
        ValueError: says how to start on all of them, or on one.
    """
    count = torch.cuda.device_count()
    if count > 1 and world_size() == 1 and not is_launched() and not recipe.values.get("use_cpu"):
        raise ValueError(
            f"{count} GPUs are visible, but there is one process: add --num_processes {count}, start with `accelerate launch`, or "
            "show it one GPU with CUDA_VISIBLE_DEVICES=0."
        )


def check_output(recipe: Recipe, resolved: str) -> tuple[Path, str | None]:
    """The output folder, and the checkpoint to start from, if any.

    Raises:
        ValueError: no output_dir, or one that holds another run.
    """
    if not recipe.values.get("output_dir"):
        raise ValueError("output_dir is missing: set it in the recipe or with --output_dir.")
    output_dir = Path(recipe.values["output_dir"]).expanduser()
    resume = recipe.values.get("resume_from_checkpoint")
    start = find_start(output_dir, resume, bool(recipe.values.get("overwrite_output_dir")), resolved)
    if resume and start is None:
        tell(f"{output_dir} holds no checkpoint yet: training starts at the beginning.")
    return output_dir, start


def build_configs(recipe: Recipe, classes: Sequence[type], processes: int) -> tuple[Any, ...]:
    """The method's config, the data keys, the model's and the run's, with batch sizes for this number of processes.

    Raises:
        ValueError: values that a config refuses, or batch sizes that do not divide.
    """
    values = dict(recipe.values)
    values.update(batch_sizes(values, classes[0], processes))
    values.pop("resume_from_checkpoint", None)  # `train` has found the checkpoint
    values.pop("push_to_hub", None)  # `finish` pushes, once everything is on disk
    adjusted = Recipe(recipe.name, values, recipe.places, recipe.notices)
    if adjusted.values.get("model_name_or_path") is None:
        raise ValueError("model_name_or_path is missing: set it in the recipe or with --model_name_or_path.")
    check_adapter_keys(recipe)
    return build(adjusted, classes)


def batch_sizes(values: dict[str, Any], config: type, processes: int) -> dict[str, int]:
    """Per-device batch and accumulation that make `global_batch_size` with this number of processes.

    global_batch_size = per_device_train_batch_size x gradient_accumulation_steps x processes; the per-device batch is lowered where it is
    too large for many processes.

    Raises:
        ValueError: the global batch cannot be divided evenly.
    """
    wanted = values.get("global_batch_size")
    if wanted is None:
        return {}
    if wanted < 1 or wanted % processes:
        raise ValueError(f"global_batch_size {wanted} cannot be divided evenly over {processes} processes.")
    share = wanted // processes
    per_device = min(values.get("per_device_train_batch_size", config.per_device_train_batch_size), share)  # type: ignore[attr-defined]
    while share % per_device:
        per_device -= 1
    return {"per_device_train_batch_size": per_device, "gradient_accumulation_steps": share // per_device}


def check_adapter_keys(recipe: Recipe) -> None:
    """Refuse adapter settings that would be ignored, and an adapter on the LM head.

    Raises:
        ValueError: names the key.
    """
    values = recipe.values
    needs_peft = [
        key
        for key in values
        if key.startswith(("lora_", "use_rslora", "use_dora")) and values[key] not in (None, False)
    ]
    needs_peft += [key for key in ("load_in_4bit", "load_in_8bit") if values.get(key)]
    if not values.get("use_peft") and needs_peft:
        raise ValueError(
            f"{recipe.places[needs_peft[0]]}: {needs_peft[0]} needs use_peft: true; without it, remove it."
        )
    targets = values.get("lora_target_modules") or []
    heads = [name for name in ([targets] if isinstance(targets, str) else targets) if name in LM_HEADS]
    if heads:
        raise ValueError(
            f"{recipe.places['lora_target_modules']}: an adapter on {heads[0]} would be ignored, since log-probs are computed from its "
            "weight; remove it, or name it in lora_modules_to_save to train it whole."
        )


def make_trainer(
    trainer_class: type,
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
    check_model(name, model_args, args)
    tokenizer = load_tokenizer(name, model_args, args, run_args)
    train_dataset, eval_dataset = prepare_data(rows, tokenizer, args, data_args)
    if eval_dataset is None and args.eval_strategy != "no":
        tell("There are no evaluation rows, so eval_strategy is off (test_split_size: 0.05 would hold some out).")
        args.eval_strategy = type(args.eval_strategy)("no")
    args.model_init_kwargs = {**model_options(model_args), **(args.model_init_kwargs or {})}
    reference = load_reference(run_args, args, model_args)
    quantization = get_quantization_config(model_args)
    model: Any = name
    adapter = get_peft_config(model_args)
    if is_adapter(name):
        model = AutoPeftModelForCausalLM.from_pretrained(
            name,
            is_trainable=True,
            quantization_config=quantization,
            **{**args.model_init_kwargs, "dtype": torch_dtype(model_args)},
        )
        args.model_init_kwargs = quantization = adapter = None
        tell(f"{name} is an adapter: it is trained on, and its present weights are the reference.")
    return trainer_class(
        model=model,
        ref_model=reference,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        quantization_config=quantization,
        peft_config=adapter,
    )


def check_model(name: str, model_args: ModelConfig, args: Any) -> None:
    """Make sure that there is a model under `name`, without loading its weights.

    Raises:
        ValueError: there is none, or its attention does not run here.
    """
    path = Path(name).expanduser()
    if path.is_dir() and not (path / "config.json").exists() and not is_adapter(name):
        raise ValueError(f"model_name_or_path: the folder {name} holds no model (no config.json).")
    if (model_args.attn_implementation or "").startswith("flash_attention") and args.device.type == "cpu":
        raise ValueError(f"attn_implementation {model_args.attn_implementation} needs a GPU: use sdpa here.")
    if not is_adapter(name):
        with readable_errors("model_name_or_path", name):
            AutoConfig.from_pretrained(
                name, revision=model_args.model_revision, trust_remote_code=args.trust_remote_code
            )


def is_adapter(name: str) -> bool:
    """Whether a local folder holds an adapter and no whole model."""
    path = Path(name).expanduser()
    return (path / "adapter_config.json").is_file() and not (path / "config.json").is_file()


def load_tokenizer(name: str, model_args: ModelConfig, args: Any, run_args: RunArguments) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a pad token, and the recipe's chat template if it gives one."""
    with readable_errors("the tokenizer of model_name_or_path", name):
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=model_args.model_revision, trust_remote_code=args.trust_remote_code
        )
    if run_args.chat_template is not None:
        tokenizer.chat_template = run_args.chat_template
    return with_pad_token(tokenizer)


def prepare_data(
    rows: str, tokenizer: PreTrainedTokenizerBase, args: Any, data_args: DatasetArguments
) -> tuple[Dataset, Dataset | None]:
    """Tokenised training and evaluation rows; the counts and one decoded sample are printed."""
    evaluates = args.do_eval or args.eval_strategy != "no"
    sources = data_args.resolve(evaluates=evaluates, seed=args.seed)
    datasets = load_datasets(sources, rows, num_proc=args.dataset_num_proc)
    tokenised: list[Dataset | None] = []
    for name, dataset in zip(("train", "eval"), datasets):
        if dataset is None:
            tokenised.append(None)
            continue
        result, report = TOKENIZERS[rows](
            dataset,
            tokenizer,
            max_length=args.max_length,
            max_prompt_length=args.max_prompt_length,
            truncation_mode=args.truncation_mode,
            on_bad_row=args.on_bad_row,
            num_proc=args.dataset_num_proc,
            name=name,
        )
        tokenised.append(result)
        show(report, describe_sample(tokenizer, result[0]) if name == "train" else None)
    train_dataset, eval_dataset = tokenised
    assert train_dataset is not None
    return train_dataset, eval_dataset


def show(report: TokenizationReport, sample: str | None) -> None:
    """Print what became of the rows (main process only)."""
    if rank() == 0:
        print(report.table(), flush=True)
        if sample is not None:
            print(sample, flush=True)


def torch_dtype(model_args: ModelConfig) -> Any:
    """The recipe's dtype as `from_pretrained` takes it."""
    return getattr(torch, model_args.dtype) if model_args.dtype not in (None, "auto") else model_args.dtype


def model_options(model_args: ModelConfig) -> dict[str, Any]:
    """How the weights are loaded."""
    options: dict[str, Any] = {"revision": model_args.model_revision, "dtype": model_args.dtype}
    if model_args.attn_implementation is not None:
        options["attn_implementation"] = model_args.attn_implementation
    return options


def load_reference(run_args: RunArguments, args: Any, model_args: ModelConfig) -> Any:
    """The reference model that the recipe names, or `None`: the policy before training."""
    name = run_args.ref_model_name_or_path
    if name is None:
        return None
    with readable_errors("ref_model_name_or_path", name):
        AutoConfig.from_pretrained(name, trust_remote_code=args.trust_remote_code)
    kept = args.model_init_kwargs
    args.model_init_kwargs = {**kept, "revision": run_args.ref_model_revision or "main"}
    try:
        return load_model(name, args)
    finally:
        args.model_init_kwargs = kept


class readable_errors:
    """Turn what transformers raises about a missing or unreadable model into one sentence."""

    def __init__(self, key: str, name: str) -> None:
        self.key, self.name = key, name

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, (OSError, ValueError, KeyError)):
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ValueError(f"{self.key} {self.name!r} cannot be read: {reason}") from error


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
                f"Not pushed: no hub login was found. `hf auth login`, then `hf upload NAME {trainer.args.output_dir}`."
            )
        else:
            trainer.push_to_hub()


def tell(message: str, stream: Any = None) -> None:
    """One line from the main process."""
    if rank() == 0:
        print(f"prefopt: {message}", file=stream or sys.stderr, flush=True)
