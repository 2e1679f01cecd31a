"""What a training run needs to know from its recipe before anything is loaded: devices, folder, batch sizes, configs."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import AutoPeftModelForCausalLM, PeftConfig
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase
from transformers.trainer import TRAINER_STATE_NAME
from trl import ModelConfig, get_peft_config, get_quantization_config

from prefopt.data.encoding import with_pad_token
from prefopt.files import write_json, write_text
from prefopt.launch import is_launched, tell, world_size
from prefopt.recipes.arguments import RunArguments
from prefopt.recipes.recipe import Recipe, build, plain, resolved_yaml
from prefopt.trainers.checkpoints import is_whole, last_checkpoint
from prefopt.trainers.pair_losses import REFERENCE_FREE_LOSSES
from prefopt.trainers.policy import load_model

RECIPE_FILE = "recipe.yaml"
# beside weights and checkpoints; a leftover would describe another model (an adapter's config) or another run (its
# figures)
LEFT_BY_RUNS = (
    TRAINER_STATE_NAME,
    "config.json",
    "adapter_config.json",
    "model.safetensors.index.json",
    "train_results.json",
    "eval_results.json",
    "all_results.json",
)
VERSIONS_FILE = "package_versions.json"
PACKAGES = (
    "prefopt",
    "torch",
    "transformers",
    "trl",
    "accelerate",
    "datasets",
    "peft",
    "deepspeed",
    "tokenizers",
    "numpy",
)
OPTIONAL_PACKAGES = ("bitsandbytes", "flash-attn", "liger-kernel", "vllm", "kernels")

# settings that may differ between a run and its continuation: where it writes, what it reports, how long it goes on
FREE_TO_CHANGE = frozenset(
    {
        "output_dir", "resume_from_checkpoint", "overwrite_output_dir", "method", "env",
        "num_train_epochs", "max_steps", "push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo", "hub_revision",
        "report_to", "run_name", "project", "disable_tqdm", "log_level", "log_level_replica", "log_on_each_node",
        "logging_strategy", "logging_steps", "logging_first_step", "eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "do_eval",
        "per_device_eval_batch_size", "save_strategy", "save_steps", "save_total_limit", "dataset_num_proc", "ddp_timeout",
        "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor",
    }
)  # fmt: skip


def find_start(output_dir: Path, resume: bool | str | None, overwrite: bool, resolved: str) -> str | None:
    """Where a run may start: the checkpoint to continue from, or `None` for the beginning.

    Args:
        output_dir: the run's folder; it need not exist.
        resume: the path of a checkpoint, or true for the last one in `output_dir` (from the beginning if there is none
            yet).
        overwrite: whether another run in `output_dir` may be replaced.
        resolved: this run's resolved recipe (YAML).

    Raises:
        ValueError: the folder cannot be one, or holds another run, or the run to continue had other settings.
    """
    there = next(path for path in (output_dir, *output_dir.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"output_dir {output_dir}: {there} is a file; name a folder.")
    if not os.access(there, os.W_OK):
        raise ValueError(f"output_dir {output_dir} cannot be made or written: {there} is not yours to write to.")
    if resume and overwrite:
        raise ValueError(
            "resume_from_checkpoint continues a run and overwrite_output_dir replaces it: give one of them."
        )
    last = last_checkpoint(output_dir)
    if isinstance(resume, str) and resume.lower() not in ("true", "false"):
        if not is_whole(Path(resume)):
            raise ValueError(
                f"resume_from_checkpoint: {resume} holds no whole checkpoint (no readable trainer_state.json)."
            )
        _check_same_run(Path(resume).parent, resolved)
        return resume
    has_model, same, resumes = _has_model(output_dir), _same_run(output_dir, resolved), str(resume).lower() == "true"
    if resumes:
        if last is not None:
            _check_same_run(output_dir, resolved)
            return last
        if same or not has_model:
            return None
    elif overwrite or not holds_run(output_dir) or (same and last is None and not has_model):
        return None
    what = f"a run that reached step {_step(last)}" if last else "a trained model" if has_model else "another run"
    advice = "continue it with --resume_from_checkpoint true, " if last else ""
    if resumes:
        what += " of other settings, without a checkpoint to continue from"
    raise ValueError(
        f"output_dir {output_dir} already holds {what}: {advice}replace it with --overwrite_output_dir true, or "
        "choose another "
        "output_dir."
    )


def holds_run(output_dir: Path) -> bool:
    """Whether a training run has left anything in `output_dir`."""
    return (
        (output_dir / RECIPE_FILE).exists()
        or (output_dir / TRAINER_STATE_NAME).exists()
        or any(output_dir.glob("checkpoint-*"))
        or _has_model(output_dir)
    )


def open_folder(output_dir: Path, resolved: str, *, overwrite: bool) -> None:
    """Make the folder this run's: with `overwrite`, remove what an earlier run left; write the recipe and the versions."""
    if overwrite:
        for checkpoint in output_dir.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        for name in LEFT_BY_RUNS:
            (output_dir / name).unlink(missing_ok=True)
        for weights in output_dir.glob("*.safetensors"):
            weights.unlink()
    write_text(output_dir / RECIPE_FILE, resolved)
    write_json(output_dir / VERSIONS_FILE, package_versions())


def package_versions() -> dict[str, str]:
    """The versions of Python and of every package that decides what a run computes."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES + OPTIONAL_PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            assert name in OPTIONAL_PACKAGES, f"{name} is not installed"
    return versions


def _step(checkpoint: str) -> int:
    """The number at the end of a checkpoint's name; -1 for a folder that only looks like one."""
    number = checkpoint.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def _has_model(folder: Path) -> bool:
    return any(folder.glob("*.safetensors")) or (folder / "adapter_config.json").exists()


def _differences(folder: Path, resolved: str) -> list[str] | None:
    """What differs between the recipe in `folder` and `resolved`; `None` when the folder has no recipe."""
    written = folder / RECIPE_FILE
    if not written.is_file():
        return None
    before: dict[str, Any] = yaml.safe_load(written.read_text(encoding="utf-8")) or {}
    now: dict[str, Any] = yaml.safe_load(resolved) or {}
    keys = [
        key for key in dict.fromkeys([*before, *now]) if key not in FREE_TO_CHANGE and before.get(key) != now.get(key)
    ]
    return [f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in keys]


def _same_run(folder: Path, resolved: str) -> bool:
    return _differences(folder, resolved) == []


def _check_same_run(folder: Path, resolved: str) -> None:
    differences = _differences(folder, resolved)
    if differences:
        shown = "; ".join(differences[:3]) + (f"; and {len(differences) - 3} more" if len(differences) > 3 else "")
        raise ValueError(f"{folder} holds a run with other settings, which cannot be continued: {shown}.")


LM_HEADS = ("lm_head", "embed_out", "output")
_QUANTIZATION = ("bitsandbytes", "pip install 'prefopt[quantization]'")
# settings that need a package which is not among our own dependencies: (key, value begins with, module (or another),
# what to install)
OPTIONAL = (
    ("attn_implementation", "flash_attention_2", "flash_attn|kernels", "pip install flash-attn --no-build-isolation"),
    ("load_in_4bit", "True", *_QUANTIZATION),
    ("load_in_8bit", "True", *_QUANTIZATION),
    ("optim", "paged_", *_QUANTIZATION),
    ("optim", "adamw_bnb", *_QUANTIZATION),
    ("optim", "adamw_8bit", *_QUANTIZATION),
    ("use_liger_kernel", "True", "liger_kernel", "pip install 'prefopt[fast]'"),
    ("report_to", "wandb", "wandb", "pip install wandb"),
    ("report_to", "tensorboard", "tensorboard", "pip install tensorboard"),
)


def resolved_recipe(recipe: Recipe, classes: Sequence[type]) -> str:
    """The recipe with all defaults as YAML, without values that follow from others for this number of processes."""
    derived = {"gradient_accumulation_steps"} if "global_batch_size" in recipe.values else set()
    return resolved_yaml(recipe, classes, without_defaults=frozenset(derived | {"local_rank"}))


def check_devices(recipe: Recipe) -> None:
    """Refuse several visible GPUs without a launcher: one process would spread each batch over them.

    Raises:
        ValueError: says how to start on all of them, or on one.
    """
    count = torch.cuda.device_count()
    if count > 1 and world_size() == 1 and not is_launched() and not recipe.values.get("use_cpu"):
        raise ValueError(
            f"{count} GPUs are visible, but there is one process: add --num_processes {count}, start with `accelerate "
            "launch`, or "
            "show it one GPU with CUDA_VISIBLE_DEVICES=0."
        )


def missing_packages(recipe: Recipe) -> list[str]:
    """A sentence for each setting that needs a package which is not installed."""
    sentences = []
    for key, value, module, install in OPTIONAL:
        given = plain(recipe.values.get(key))
        wanted = any(str(item).startswith(value) for item in (given if isinstance(given, list) else [given]))
        modules = module.split("|")
        if wanted and all(importlib.util.find_spec(name) is None for name in modules):
            sentences.append(f"{recipe.places[key]}: {key}: {given} needs the package {modules[0]}: {install}.")
    return sentences


def check_output(recipe: Recipe, resolved: str) -> tuple[Path, str | None]:
    """The output folder, and the checkpoint to start from, if any.

    Raises:
        ValueError: no output_dir, or one that holds another run or the model to start from.
    """
    if not recipe.values.get("output_dir"):
        raise ValueError("output_dir is missing: set it in the recipe or with --output_dir.")
    output_dir = Path(recipe.values["output_dir"]).expanduser()
    resume, overwrite = recipe.values.get("resume_from_checkpoint"), bool(recipe.values.get("overwrite_output_dir"))
    for key in ("model_name_or_path", "ref_model_name_or_path") if overwrite else ():
        model = Path(recipe.values.get(key) or "").expanduser().resolve()
        if recipe.values.get(key) and output_dir.resolve() in (model, *model.parents):
            raise ValueError(
                f"overwrite_output_dir would remove {key}, which lies in {output_dir}: choose another output_dir."
            )
    start = find_start(output_dir, resume, overwrite, resolved)
    if resume and start is None:
        tell(f"{output_dir} holds no checkpoint yet: training starts at the beginning.")
    return output_dir, start


def build_configs(recipe: Recipe, classes: Sequence[type], processes: int) -> tuple[Any, ...]:
    """The method's config, the data keys, the model's and the run's, with batch sizes for this number of processes.

    Raises:
        ValueError: values that a config refuses, batch sizes that do not divide, or attention that does not run here.
    """
    values = config_values(recipe)
    values.update(batch_sizes(values, classes[0], processes))
    adjusted = Recipe(recipe.name, values, recipe.places, recipe.notices)
    if adjusted.values.get("model_name_or_path") is None:
        raise ValueError("model_name_or_path is missing: set it in the recipe or with --model_name_or_path.")
    check_adapter_keys(recipe)
    check_precision(values)
    configs = build(adjusted, classes)
    configs[1].evaluates = may_evaluate(recipe)
    attention = values.get("attn_implementation") or ""
    if attention.startswith("flash_attention") and configs[0].device.type == "cpu":
        raise ValueError(f"attn_implementation {attention} needs a GPU: use sdpa here.")
    return configs


def config_values(recipe: Recipe) -> dict[str, Any]:
    """A recipe's values without those that a run sees to itself: `train` finds the checkpoint, `finish` pushes once everything is on disk."""
    return {key: value for key, value in recipe.values.items() if key not in ("resume_from_checkpoint", "push_to_hub")}


def check_precision(values: dict[str, Any]) -> None:
    """Refuse full precision in the recipe where the launcher's config says another, which would win without a word.

    Raises:
        ValueError: says how to make them equal.
    """
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if values.get("bf16") is False and not values.get("fp16") and launched not in ("no", ""):
        raise ValueError(
            f"bf16: false, but the accelerate config says mixed_precision: {launched}, which would win. Make them "
            "equal: leave bf16 out, "
            "or use a config with mixed_precision: 'no'."
        )


def may_evaluate(recipe: Recipe) -> bool:
    """Whether evaluation data is read: always where the recipe names some, unless it says `do_eval: false`."""
    return recipe.values.get("do_eval") is not False or recipe.values.get("eval_strategy", "no") != "no"


def batch_sizes(values: dict[str, Any], config: type, processes: int) -> dict[str, int]:
    """Per-device batch and accumulation that make `global_batch_size` with this number of processes.

    global_batch_size = per_device_train_batch_size x gradient_accumulation_steps x processes; the per-device batch is
    lowered where it is
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
    defaults = {field.name: field.default for field in dataclasses.fields(ModelConfig)}
    of_adapters = [key for key in defaults if key.startswith(("lora_", "use_rslora", "use_dora", "load_in_"))]
    needs_peft = [key for key in of_adapters if values.get(key, defaults[key]) != defaults[key]]
    if not values.get("use_peft") and needs_peft:
        raise ValueError(
            f"{recipe.places[needs_peft[0]]}: {needs_peft[0]} needs use_peft: true; without it, remove it."
        )
    targets = values.get("lora_target_modules") or []
    heads = [name for name in ([targets] if isinstance(targets, str) else targets) if name in LM_HEADS]
    if heads:
        raise ValueError(
            f"{recipe.places['lora_target_modules']}: an adapter on {heads[0]} would be ignored, since log-probs are "
            "computed from its "
            "weight; remove it, or name it in lora_modules_to_save to train it whole."
        )


def check_model(name: str, model_args: ModelConfig, args: Any) -> None:
    """Make sure that there is a model under `name`, without loading its weights.

    Raises:
        ValueError: there is none.
    """
    path = Path(name).expanduser()
    if path.is_dir() and not (path / "config.json").exists() and not is_adapter(name):
        raise ValueError(f"model_name_or_path: the folder {name} holds no model (no config.json).")
    read_config(name, model_args, args)


def check_reference(run_args: RunArguments, args: Any, rows: str) -> None:
    """Make sure that the reference model that a recipe names exists and is used, without loading its weights.

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
    with readable_errors("ref_model_name_or_path", name):
        AutoConfig.from_pretrained(
            name, revision=run_args.ref_model_revision or "main", trust_remote_code=args.trust_remote_code
        )


def read_config(name: str, model_args: ModelConfig, args: Any) -> Any:
    """The config of the model, or of the one that a local adapter belongs to.

    Raises:
        ValueError: there is no such model.
    """
    revision = model_args.model_revision
    with readable_errors("model_name_or_path", name):
        if is_adapter(name):
            name, revision = str(adapter_of(name).base_model_name_or_path), "main"
    with readable_errors("model_name_or_path", name):
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=args.trust_remote_code)


def adapter_of(name: str) -> PeftConfig:
    """The config of an adapter in a local folder."""
    return PeftConfig.from_pretrained(str(Path(name).expanduser()))


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


def single_model(name: str, args: Any, model_args: ModelConfig, run_args: RunArguments) -> dict[str, Any]:
    """The model of a method without a reference, as its trainer takes it."""
    return {
        "model": name,
        "quantization_config": get_quantization_config(model_args),
        "peft_config": adapter_config(model_args),
    }


def adapter_config(model_args: ModelConfig) -> PeftConfig | None:
    """The adapter that the recipe describes, if any."""
    config = get_peft_config(model_args)
    targets = model_args.lora_target_modules
    if config is not None and isinstance(targets, str) and targets.isidentifier():
        config.target_modules = {targets}  # TRL makes a list of one name a pattern, which no full name would match
    return config


def pair_models(name: str, args: Any, model_args: ModelConfig, run_args: RunArguments) -> dict[str, Any]:
    """Policy and reference of a pair method, as its trainer takes them."""
    models = {**single_model(name, args, model_args, RunArguments()), "ref_model": load_reference(run_args, args)}
    if is_adapter(name):
        options = {**args.model_init_kwargs, "dtype": torch_dtype(model_args)}
        models["model"] = AutoPeftModelForCausalLM.from_pretrained(
            name, is_trainable=True, quantization_config=models["quantization_config"], **options
        )
        args.model_init_kwargs = models["quantization_config"] = models["peft_config"] = None
        tell(f"{name} is an adapter: it is trained on, and its present weights are the reference.")
    return models


def torch_dtype(model_args: ModelConfig) -> Any:
    """The recipe's dtype as `from_pretrained` takes it."""
    return getattr(torch, model_args.dtype) if model_args.dtype not in (None, "auto") else model_args.dtype


def load_reference(run_args: RunArguments, args: Any) -> Any:
    """The reference model that the recipe names, or `None`: the policy before training."""
    name = run_args.ref_model_name_or_path
    if name is None:
        return None
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
            where = "cannot be read" if Path(self.name).exists() else "is no folder here, and the hub does not give it"
            raise ValueError(f"{self.key} {self.name!r} {where}: {reason}") from error
