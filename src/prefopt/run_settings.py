"""What a training run needs to know from its recipe before anything is loaded: devices, folder, batch sizes, configs."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from trl import ModelConfig

from prefopt.launch import is_launched, tell, world_size
from prefopt.recipes.recipe import Recipe, build, plain, resolved_yaml
from prefopt.run_folder import find_start

LM_HEADS = ("lm_head", "embed_out", "output")
_QUANTIZATION = ("bitsandbytes", "pip install 'prefopt[quantization]'")
# settings that need a package which is not among our own dependencies: (key, value begins with, module (or another), what to install)
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
            f"{count} GPUs are visible, but there is one process: add --num_processes {count}, start with `accelerate launch`, or "
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
            f"bf16: false, but the accelerate config says mixed_precision: {launched}, which would win. Make them equal: leave bf16 out, "
            "or use a config with mixed_precision: 'no'."
        )


def may_evaluate(recipe: Recipe) -> bool:
    """Whether evaluation data is read: always where the recipe names some, unless it says `do_eval: false`."""
    return recipe.values.get("do_eval") is not False or recipe.values.get("eval_strategy", "no") != "no"


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
            f"{recipe.places['lora_target_modules']}: an adapter on {heads[0]} would be ignored, since log-probs are computed from its "
            "weight; remove it, or name it in lora_modules_to_save to train it whole."
        )
