"""What a training run needs of its recipe: checked settings, a folder of its own, and the models that it starts from.

Nothing here loads data, and everything up to the last section works without loading weights, so that `prefopt check`
makes the same checks as training.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase
from transformers.trainer import TRAINER_STATE_NAME
from trl import ModelConfig, get_peft_config, get_quantization_config

from prefopt.arguments import missing, names_without_effect, setting_changes
from prefopt.data.encoding import with_pad_token
from prefopt.files import parse_yaml, read_yaml, user_path, write_json, write_text
from prefopt.launch import is_launched, print_on_main, world_size
from prefopt.recipes.arguments import RunArguments
from prefopt.recipes.recipe import Recipe, build, plain, resolved_yaml
from prefopt.trainers.checkpoints import (
    cannot_resume,
    checkpoint_to_resume,
    checkpoints_of,
    is_whole,
    last_checkpoint,
    remove_checkpoint,
    try_saving,
)
from prefopt.trainers.pair_losses import REFERENCE_FREE_LOSSES
from prefopt.trainers.policy import is_adapter, load_model
from prefopt.trainers.samples import SAMPLES_FILE

# --- What we know of settings that transformers and TRL declare; of our own, it stands in the fields' metadata.

# may differ between a run and its continuation: where it writes, what it reports, how long it goes on
FREE_TO_CHANGE = names_without_effect(RunArguments) | {
    "output_dir", "resume_from_checkpoint", "resume_changed", "num_train_epochs", "max_steps", "master_weights",
    "checkpointing", "gradient_checkpointing", "gradient_checkpointing_kwargs", "selective_checkpointing",
    "activation_checkpointing", "activation_checkpointing_kwargs", "tokens_per_micro_batch",
    "push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo", "hub_revision",
    "report_to", "run_name", "project", "disable_tqdm", "log_level", "log_level_replica", "log_on_each_node",
    "logging_strategy", "logging_steps", "logging_first_step",
    "eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "do_eval", "per_device_eval_batch_size",
    "save_strategy", "save_steps", "save_total_limit", "dataset_num_proc", "ddp_timeout", "dataloader_num_workers",
    "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor",
}  # fmt: skip
# settings that the recipes of earlier versions do not hold, with the value that describes what happened then
ADDED_LATER: dict[str, Any] = {
    "lora_init": "default",
    "warmup_type": "linear",
    "chat_rendering": "joint",
    "special_tokens": "template",
    "completion_turns": "all",
    "compile_blocks": False,
}
# key, value (a pattern), module (one of several), how it is installed: packages that are no dependencies of this one
_QUANTIZATION = ("bitsandbytes", "pip install 'prefopt[quantization]'")
NEEDS_PACKAGE = (
    ("attn_implementation", "flash_attention_2*", "flash_attn|kernels", "pip install flash-attn --no-build-isolation"),
    ("load_in_4bit", "True", *_QUANTIZATION),
    ("load_in_8bit", "True", *_QUANTIZATION),
    ("optim", "paged_*", *_QUANTIZATION),
    ("optim", "*_8bit", *_QUANTIZATION),
    ("optim", "*_bnb*", *_QUANTIZATION),
    ("use_liger_kernel", "True", "liger_kernel", "pip install 'prefopt[fast]'"),
    ("report_to", "wandb", "wandb", "pip install wandb"),
    ("report_to", "tensorboard", "tensorboard", "pip install tensorboard"),
    ("report_to", "trackio", "trackio", "pip install trackio"),
    ("report_to", "mlflow", "mlflow", "pip install mlflow"),
)
# ignored without `use_peft`
ADAPTER_KEYS = (
    "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_target_parameters", "lora_modules_to_save",
    "lora_task_type", "lora_init", "use_rslora", "use_dora", "load_in_8bit", "load_in_4bit",
)  # fmt: skip
LM_HEADS = ("lm_head", "embed_out", "output")
# key -> name in an adapter's config
ADAPTER_SETTINGS = {
    "lora_r": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout", "use_rslora": "use_rslora",
    "use_dora": "use_dora",
}  # fmt: skip

# --- Settings


def resolved_recipe(recipe: Recipe, classes: Sequence[type]) -> str:
    """Write the recipe with all defaults as YAML, without values that follow from the number of processes."""
    derived = {"gradient_accumulation_steps"} if "global_batch_size" in recipe.values else set()
    if recipe.values.get("gradient_checkpointing") is not None:
        derived.add("checkpointing")
    return resolved_yaml(recipe, classes, without_defaults=frozenset(derived | {"local_rank"}))


def build_configs(recipe: Recipe, classes: Sequence[type], processes: int) -> tuple[Any, ...]:
    """Build the method's config, the data's, the model's and the run's, with batch sizes for this number of processes.

    Raises:
        ValueError: values that a config rejects, batch sizes that do not divide, or attention that does not run here.
    """
    values = config_values(recipe)
    values.update(batch_sizes(values, classes[0], processes))
    if values.get("model_name_or_path") is None:
        raise ValueError(missing("model_name_or_path"))
    check_adapter_keys(recipe)
    check_precision(values)
    configs = build(Recipe(recipe.name, values), classes)
    configs[1].evaluates = may_evaluate(recipe)
    if configs[0].device.type == "cpu":
        check_attention_on_cpu(recipe)
    return configs


def check_attention_on_cpu(recipe: Recipe) -> None:
    """Raise a ValueError where a recipe that runs on a CPU asks for flash attention."""
    attention = recipe.values.get("attn_implementation") or ""
    if attention.startswith("flash_attention"):
        place = recipe.places["attn_implementation"]
        raise ValueError(f"{place}: attn_implementation: {attention} needs a GPU; set sdpa on a CPU.")


def config_values(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe's values without those that configs must not see.

    Training finds the checkpoint itself, and pushes itself once everything is on disk.
    """
    return {key: value for key, value in recipe.values.items() if key not in ("resume_from_checkpoint", "push_to_hub")}


def batch_sizes(values: dict[str, Any], config: type, processes: int) -> dict[str, int]:
    """Return the per-device batch and the accumulation that make `global_batch_size` with this number of processes.

    global_batch_size = per_device_train_batch_size x gradient_accumulation_steps x processes; the per-device batch is
    lowered where it is too large for many processes.

    Raises:
        ValueError: the global batch cannot be divided evenly.
    """
    wanted = values.get("global_batch_size")
    if wanted is None:
        return {}
    if wanted < 1:
        raise ValueError(f"global_batch_size must be at least 1, not {wanted}.")
    if wanted < processes:
        raise ValueError(
            f"global_batch_size {wanted} on {processes} processes leaves {wanted}/{processes} of a pair for each, and "
            f"every process takes at least one a step ({processes} = 1 per device x 1 accumulation step x {processes} "
            f"processes). Use at most {wanted} processes, or raise global_batch_size to a multiple of {processes}, "
            "which changes the recipe."
        )
    if wanted % processes:
        below, above = wanted - wanted % processes, wanted + processes - wanted % processes
        raise ValueError(
            f"global_batch_size {wanted} cannot be divided evenly over {processes} processes ({wanted} = {processes} "
            f"x {wanted // processes} + {wanted % processes}): use a number of processes that divides {wanted}, or "
            f"{below} or {above} pairs."
        )
    share = wanted // processes
    default = config.per_device_train_batch_size  # type: ignore[attr-defined]
    per_device = min(values.get("per_device_train_batch_size", default), share)
    while share % per_device:
        per_device -= 1
    return {"per_device_train_batch_size": per_device, "gradient_accumulation_steps": share // per_device}


def may_evaluate(recipe: Recipe) -> bool:
    """Return whether evaluation data is read: always where the recipe names some, unless it says `do_eval: false`."""
    return recipe.values.get("do_eval") is not False or recipe.values.get("eval_strategy", "no") != "no"


def check_devices(recipe: Recipe) -> None:
    """Raise if several GPUs are visible without a launcher: one process would spread each batch over them.

    Raises:
        ValueError: says how to start on all of them, or on one.
    """
    count = torch.cuda.device_count()
    if count > 1 and world_size() == 1 and not is_launched() and not recipe.values.get("use_cpu"):
        raise ValueError(
            f"{count} GPUs are visible, but there is one process: add --num_processes {count}, start with `accelerate "
            "launch`, or show it one GPU with CUDA_VISIBLE_DEVICES=0."
        )


def check_precision(values: dict[str, Any]) -> None:
    """Raise if the recipe asks for full precision and the launcher's config, which would win, for another.

    Raises:
        ValueError: says how to make them equal.
    """
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if values.get("bf16") is False and not values.get("fp16") and launched not in ("no", ""):
        raise ValueError(
            f"bf16: false, but the accelerate config says mixed_precision: {launched}, which would win. Make them "
            "equal: leave bf16 out, or use a config with mixed_precision: 'no'."
        )


def check_adapter_keys(recipe: Recipe) -> None:
    """Raise for adapter settings that would be ignored, and for an adapter on the LM head.

    Raises:
        ValueError: names the key.
    """
    values, defaults = recipe.values, vars(ModelConfig()) | vars(RunArguments())
    given = [key for key in ADAPTER_KEYS if key in values and values[key] != defaults[key]]
    if given and not values.get("use_peft"):
        raise ValueError(f"{recipe.places[given[0]]}: {given[0]} needs use_peft: true; without it, remove it.")
    name = values.get("model_name_or_path")
    if name is not None and is_adapter(name):
        adapter = adapter_of(name)
        for key, its_name in ADAPTER_SETTINGS.items():
            has = getattr(adapter, its_name, values.get(key))
            if key in given and has != values[key]:
                raise ValueError(
                    f"{recipe.places[key]}: {key} is {values[key]}, and the adapter {name}, which is trained on, has "
                    f"{has}: remove it, or merge that adapter into its base first."
                )
    targets = values.get("lora_target_modules") or []
    heads = [name for name in ([targets] if isinstance(targets, str) else targets) if name in LM_HEADS]
    if heads:
        raise ValueError(
            f"{recipe.places['lora_target_modules']}: an adapter on {heads[0]} would be ignored, since log-probs are "
            "computed from its weight; remove it, or name it in lora_modules_to_save to train it whole."
        )


def missing_packages(recipe: Recipe) -> list[str]:
    """Return a sentence for each setting that needs a package which is not installed."""
    sentences: dict[str, None] = {}  # each once, in this order: one value may match two patterns
    for key, pattern, module, install in NEEDS_PACKAGE:
        if key == "attn_implementation" and recipe.values.get("use_cpu"):
            continue  # no package makes it run there
        given = plain(recipe.values.get(key))
        wanted = any(fnmatch(str(item), pattern) for item in (given if isinstance(given, list) else [given]))
        modules = module.split("|")
        if wanted and all(importlib.util.find_spec(name) is None for name in modules):
            sentences[f"{recipe.places[key]}: {key}: {given} needs the package {modules[0]}: {install}."] = None
    return list(sentences)


# --- The run's folder

RECIPE_FILE = "recipe.yaml"
VERSIONS_FILE = "package_versions.json"
TRAIN_FIGURES, EVAL_FIGURES = "train_results.json", "eval_results.json"  # transformers' names
RUN_FILE = "run.json"  # what is known when training starts: method, recipe, data, hardware
LOG_FILE = "log.jsonl"  # every log as it is made; a run that is killed keeps it
# Beside weights and checkpoints, overwriting removes these: a leftover would describe another model (an adapter's
# config) or another run (its figures).
LEFT_BY_RUNS = (
    TRAINER_STATE_NAME, "config.json", "adapter_config.json", "model.safetensors.index.json",
    TRAIN_FIGURES, EVAL_FIGURES, "all_results.json", LOG_FILE, SAMPLES_FILE, "report.md", "report.html",
)  # fmt: skip
# whatever decides what a run computes, as far as it is installed
PACKAGES = (
    "prefopt", "torch", "transformers", "trl", "accelerate", "datasets", "peft", "deepspeed", "tokenizers", "numpy",
    "bitsandbytes", "flash-attn", "liger-kernel", "vllm", "kernels",
)  # fmt: skip


def check_output(recipe: Recipe, resolved: str) -> tuple[Path, str | None]:
    """Return the output folder, and the checkpoint to start from, if any.

    Raises:
        ValueError: no output_dir, or one that holds another run or the model to start from.
    """
    if not recipe.values.get("output_dir"):
        raise ValueError(missing("output_dir"))
    output_dir = user_path(recipe.values["output_dir"])
    resume, overwrite = recipe.values.get("resume_from_checkpoint"), bool(recipe.values.get("overwrite_output_dir"))
    for key in ("model_name_or_path", "ref_model_name_or_path") if overwrite else ():
        model = user_path(recipe.values.get(key) or "").resolve()
        if recipe.values.get(key) and output_dir.resolve() in (model, *model.parents):
            raise ValueError(
                f"overwrite_output_dir would remove {key}, which lies in {output_dir}: choose another output_dir."
            )
    start = find_start(output_dir, resume, overwrite, resolved)
    if resume and start is None:
        print_on_main(f"{output_dir} holds no checkpoint yet: training starts at the beginning.")
    return output_dir, start


def find_start(output_dir: Path, resume: bool | str | None, overwrite: bool, resolved: str) -> str | None:
    """Return the checkpoint to continue from, or `None` to start at the beginning.

    Args:
        output_dir: the run's folder; it need not exist.
        resume: the path of a checkpoint, or true for the last one in `output_dir` (the beginning if there is none).
        overwrite: whether another run in `output_dir` may be replaced.
        resolved: this run's resolved recipe (YAML).

    Raises:
        ValueError: the folder cannot be one, or holds another run, or the run to continue had other settings.
    """
    _check_writable(output_dir)
    if resume and overwrite:
        raise ValueError(
            "resume_from_checkpoint continues a run and overwrite_output_dir replaces it: give one of them."
        )
    if isinstance(resume, str) and resume.lower() not in ("true", "false"):
        if not is_whole(Path(resume)):
            raise ValueError(cannot_resume(Path(resume)))
        _check_same_run(Path(resume).parent, resolved)
        return resume
    resumes = str(resume).lower() == "true"
    last = checkpoint_to_resume(output_dir) if resumes else last_checkpoint(output_dir)
    is_same, has_model = _changes(output_dir, resolved) == [], _has_model(output_dir)
    if resumes and last is not None:
        _check_same_run(output_dir, resolved)
        return last
    if resumes and (is_same or not has_model):
        return None
    if not resumes and (overwrite or not holds_run(output_dir) or (is_same and last is None and not has_model)):
        return None
    what = (
        f"a run that reached step {last.rpartition('-')[2]}"
        if last
        else "a trained model"
        if has_model
        else "another run"
    )
    what += " of other settings, without a checkpoint to continue from" if resumes else ""
    advice = "continue it with --resume_from_checkpoint true, " if last else ""
    raise ValueError(
        f"output_dir {output_dir} already holds {what}: {advice}replace it with --overwrite_output_dir true, or "
        "choose another output_dir."
    )


def holds_run(output_dir: Path) -> bool:
    """Return whether a training run has left anything in `output_dir`."""
    names = (RECIPE_FILE, TRAINER_STATE_NAME, "checkpoint-*")
    return any(True for name in names for _ in output_dir.glob(name)) or _has_model(output_dir)


def is_finished(output_dir: Path, *, evaluated: bool) -> bool:
    """Return whether a run has left all that it leaves at its end: a model, figures, and those of evaluation."""
    figures = [TRAIN_FIGURES, *([EVAL_FIGURES] if evaluated else [])]
    return _has_model(output_dir) and all((output_dir / name).exists() for name in figures)


def open_folder(output_dir: Path, resolved: str, *, overwrite: bool) -> None:
    """Write the recipe and the versions to the run's folder; with `overwrite`, first remove what another run left."""
    if overwrite:
        for checkpoint in checkpoints_of(output_dir):
            remove_checkpoint(checkpoint)
        for path in (*(output_dir / name for name in LEFT_BY_RUNS), *output_dir.glob("*.safetensors")):
            path.unlink(missing_ok=True)
    write_text(output_dir / RECIPE_FILE, resolved)
    write_json(output_dir / VERSIONS_FILE, package_versions())


def package_versions() -> dict[str, str]:
    """Return the versions of Python and of every package that decides what a run computes."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def _check_writable(output_dir: Path) -> None:
    there = next(path for path in (output_dir, *output_dir.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"output_dir {output_dir}: {there} is a file; name a folder.")
    if not os.access(there, os.W_OK):
        raise ValueError(f"output_dir {output_dir} cannot be made or written: {there} is not yours to write to.")


def _has_model(folder: Path) -> bool:
    return any(folder.glob("*.safetensors")) or (folder / "adapter_config.json").exists()


def _changes(folder: Path, resolved: str) -> list[str] | None:
    """Describe how the recipe in `folder` differs from `resolved`; `None` when the folder has no recipe."""
    written = folder / RECIPE_FILE
    if not written.is_file():
        return None
    try:
        before = read_yaml(written)[0]
    except ValueError as error:
        before = error
    if not isinstance(before, dict):
        raise ValueError(
            f"{written} is damaged, so nobody knows whether this run is the same: if it is, remove that file. "
            f"({before if isinstance(before, ValueError) else 'It holds no settings.'})"
        )
    now = parse_yaml(resolved, RECIPE_FILE)[0]
    added = {key: value for key, value in ADDED_LATER.items() if key in now}
    return setting_changes(added | before, now, FREE_TO_CHANGE)


def _check_same_run(folder: Path, resolved: str) -> None:
    changes = _changes(folder, resolved) or []
    if changes:
        shown = "; ".join(changes[:3]) + (f"; and {len(changes) - 3} more" if len(changes) > 3 else "")
        raise ValueError(f"{folder} holds a run with other settings, which cannot be continued: {shown}.")


# --- Models


def check_reference(run_args: RunArguments, args: Any, rows: str) -> None:
    """Raise if the reference model that a recipe names does not exist or is not used, without loading its weights.

    Raises:
        ValueError: there is none under this name, or the method has no reference.
    """
    name = run_args.ref_model_name_or_path
    if name is None:
        if run_args.ref_model_revision is not None:
            raise ValueError("ref_model_revision belongs to ref_model_name_or_path, which is not given.")
        return
    if rows != "pairs":
        raise ValueError("ref_model_name_or_path: this method has no reference model; remove it.")
    if set(args.loss_type) <= set(REFERENCE_FREE_LOSSES):
        raise ValueError(f"ref_model_name_or_path: {', '.join(args.loss_type)} has no reference; remove it.")
    _config_of("ref_model_name_or_path", name, run_args.ref_model_revision or "main", args.trust_remote_code)


def check_reference_tokenizer(run_args: RunArguments, args: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise if the reference has other ids for the policy's tokens: it scores the policy's ids.

    A reference that was saved without a tokenizer is not compared.

    Raises:
        ValueError: names one of these tokens.
    """
    name, revision = run_args.ref_model_name_or_path, run_args.ref_model_revision or "main"
    if name is None:
        return
    try:
        reference = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=args.trust_remote_code)
    except (OSError, ValueError, KeyError):
        return
    ids = reference.get_vocab()
    other = [(own, token) for token, own in tokenizer.get_vocab().items() if ids.get(token, own) != own]
    if other:
        own, token = min(other)
        raise ValueError(
            f"ref_model_name_or_path {name!r} has another tokenizer than model_name_or_path ({token!r} is token "
            f"{ids[token]} there and {own} here), so it would score other texts: choose a reference of the same "
            "family, or `multi-reference-dpo`, whose references score texts."
        )


def read_config(name: str, model_args: ModelConfig, args: Any) -> Any:
    """Read the config of a model, or of the base model of a local adapter; no weights are loaded.

    Raises:
        ValueError: there is no such model.
    """
    path = user_path(name)
    if path.is_dir() and not (path / "config.json").exists() and not is_adapter(name):
        raise ValueError(f"model_name_or_path: the folder {name} holds no model (no config.json).")
    return _config_of("model_name_or_path", name, model_args.model_revision, args.trust_remote_code)


def _config_of(key: str, name: str, revision: str, trusted: bool) -> Any:
    """Read the config of the model that a key names, or of a local adapter's base."""
    if is_adapter(name):
        with _readable_errors(key, name):
            name, revision = str(adapter_of(name).base_model_name_or_path), "main"
    with _readable_errors(key, name):
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trusted)


def load_tokenizer(name: str, model_args: ModelConfig, args: Any, run_args: RunArguments) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer, with a pad token, and the recipe's chat template if it gives one."""
    with _readable_errors("the tokenizer of model_name_or_path", name):
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=model_args.model_revision, trust_remote_code=args.trust_remote_code
        )
    if run_args.chat_template is not None:
        tokenizer.chat_template = run_args.chat_template
    return with_pad_token(tokenizer)


def adapter_of(name: str) -> PeftConfig:
    """Read the config of an adapter in a local folder."""
    return PeftConfig.from_pretrained(str(user_path(name)))


def adapter_config(model_args: ModelConfig, *, init: str = "default") -> PeftConfig | None:
    """Make the config of the adapter that the recipe describes, if any."""
    config: Any = get_peft_config(model_args)
    if config is not None and init != "default":
        config.init_lora_weights = init
    targets = model_args.lora_target_modules
    if config is not None and isinstance(targets, str) and targets.isidentifier():
        config.target_modules = {targets}  # TRL makes a list of one name a pattern, which no full name would match
    return config


def single_model(name: str, args: Any, model_args: ModelConfig, run_args: RunArguments) -> dict[str, Any]:
    """Return the model of a method without a reference, as keywords of its trainer."""
    return {
        "model": name,
        "quantization_config": get_quantization_config(model_args),
        "peft_config": adapter_config(model_args, init=run_args.lora_init),
    }


def pair_models(name: str, args: Any, model_args: ModelConfig, run_args: RunArguments) -> dict[str, Any]:
    """Return policy and reference of a pair method, as keywords of its trainer; an adapter is loaded here."""
    models = {**single_model(name, args, model_args, run_args), "ref_model": load_reference(run_args, args)}
    if is_adapter(name):
        models["model"] = load_model(name, args, models["quantization_config"])
        args.model_init_kwargs = models["quantization_config"] = models["peft_config"] = None
        print_on_main(f"{name} is an adapter: it is trained on, and its present weights are the reference.")
    return models


def check_saving(name: str, model_config: Any, args: Any, model_args: ModelConfig, tokenizer: Any) -> None:
    """Try to save what is saved with the weights, without loading them; nothing is left on the disk.

    Raises:
        ValueError: it cannot be saved, or the output folder cannot be written.
    """
    generation = None
    if not is_adapter(name) and adapter_config(model_args) is None:  # adapters are saved without one
        with suppress(OSError):  # there is none
            generation = GenerationConfig.from_pretrained(name, revision=model_args.model_revision)
            for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
                # as Trainer sets them; transformers is strict about a config that was changed only
                if getattr(tokenizer, token) is not None:
                    setattr(generation, token, getattr(tokenizer, token))

    def save(folder: Path) -> None:
        for part in (model_config, generation, tokenizer):
            if part is not None:
                part.save_pretrained(folder)

    folder = user_path(args.output_dir).absolute()
    try_saving(next(path for path in (folder, *folder.parents) if path.is_dir()), save)


def load_reference(run_args: RunArguments, args: Any) -> Any:
    """Load the reference model that the recipe names; return `None` for the policy before training."""
    name = run_args.ref_model_name_or_path
    if name is None:
        return None
    reference_args = copy(args)
    reference_args.model_init_kwargs = {**args.model_init_kwargs, "revision": run_args.ref_model_revision or "main"}
    return load_model(name, reference_args)


@contextmanager
def _readable_errors(key: str, name: str) -> Iterator[None]:
    """Turn what transformers raises about a missing or unreadable model into one sentence."""
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        where = "cannot be read" if Path(name).exists() else "is no folder here, and the hub does not give it"
        raise ValueError(f"{key} {name!r} {where}: {reason}") from error
