"""Keys of older recipes (alignment handbook, WPO, SimPO, SPPO, TRL before 1.0), read as what they are called now.

One rule per key: it says what the old key means today, and one notice about it is printed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from prefopt.recipes.convert import convert
from prefopt.recipes.source import Setting

RENAMED = {
    "preprocessing_num_workers": "dataset_num_proc",
    "evaluation_strategy": "eval_strategy",
    "hub_model_revision": "hub_revision",
    "push_to_hub_model_id": "hub_model_id",
    "push_to_hub_token": "hub_token",
    "no_cuda": "use_cpu",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "use_liger": "use_liger_kernel",
    "attn_impl": "attn_implementation",
    "lm_attn_implementation": "attn_implementation",
}

# keys whose old meaning is what happens anyway when they have this value (`...`: any); every other value raises
ALWAYS_SO: dict[str, tuple[Any, str]] = {
    "save_safetensors": (True, "weights are always saved as safetensors"),
    "auto_insert_empty_system_msg": (False, "no system message is ever inserted"),
    "generate_during_eval": (False, "training generates no text; use `prefopt evaluate`"),
    "is_encoder_decoder": (False, "only decoder models are trained"),
    "reference_free": (False, "a reference is always used; for SimPO set loss_type: simpo"),
    "force_use_ref_model": (False, "with an adapter, the model without it is the reference"),
    "do_train": (True, "training is what this command does"),
    "truncation_side": ("left", "a prompt that is too long keeps its end"),
    "use_mps_device": (False, "the device is found by itself"),
    "padding_value": (..., "padding is masked, whatever its token"),
    "label_pad_token_id": (-100, "padding is masked, whatever its token"),
    "ignore_bias_buffers": (False, "the layers that needed it are gone"),
    "dataset_streaming": (False, "data is read whole"),
    "streaming": (False, "data is read whole"),
    "rpo_alpha": (None, "for its SFT term write loss_type: [sigmoid, sft] and loss_weights: [1, ALPHA]"),
    "sft_weight": (0.0, "for its SFT term write loss_type: [simpo, sft] and loss_weights: [1, SFT_WEIGHT]"),
    "max_target_length": (None, "only decoder models are trained"),
    "max_completion_length": (
        None,
        "completions keep the room that max_length leaves beside the prompt; set max_length and max_prompt_length",
    ),
    "group_by_length": (False, "rows are packed by length already"),
}


def _warmup_ratio(value: Any) -> tuple[str, Any, str]:
    ratio = convert(value, float)
    if not 0 <= ratio < 1:
        raise ValueError(f"expected a share of the steps below 1, found {ratio:g}")
    return "warmup_steps", ratio, " (a value below 1 is a share of all steps)"


def _dtype(value: Any) -> tuple[str, Any, str]:
    # `null` loaded weights in float32, whatever the checkpoint's own type, when these recipes were written
    return "dtype", "float32" if value is None else str(value).removeprefix("torch."), ""


def _flash_attention(value: Any) -> tuple[str, Any, str] | None:
    return ("attn_implementation", "flash_attention_2", "") if convert(value, bool) else None


# key -> today's key, its value and a remark, made from the old value; None where that changes nothing
REWRITTEN: dict[str, Callable[[Any], tuple[str, Any, str] | None]] = {
    "warmup_ratio": _warmup_ratio,
    "torch_dtype": _dtype,
    "use_flash_attention_2": _flash_attention,
}

LEGACY_KEYS = frozenset(RENAMED) | frozenset(ALWAYS_SO) | frozenset(REWRITTEN)


def translate(settings: list[Setting], known: set[str], notices: list[str], problems: list[str]) -> list[Setting]:
    """Translate settings to today's keys.

    Args:
        settings: as the user wrote them.
        known: keys that a dataclass of the command has; they are never changed.
        notices: gets one sentence per old key.
        problems: gets one sentence per old key whose value has no meaning today.
    """
    result: list[Setting] = []
    for setting in settings:
        if setting.key in known or setting.key not in LEGACY_KEYS:
            result.append(setting)
            continue
        try:
            translated, notice = _translate(setting)
        except ValueError as error:
            problems.append(f"{setting.place}: {setting.key}: {error}.")
            continue
        result.extend(translated)
        notices.append(f"{setting.place}: {setting.key} is an older key; {notice}.")
    return _add_simpo(result, notices, known)


def _translate(setting: Setting) -> tuple[list[Setting], str]:
    if setting.key in REWRITTEN:
        rewritten = REWRITTEN[setting.key](setting.value)
        if rewritten is None:
            return [], "it changes nothing here"
        key, value, remark = rewritten
        return [dataclasses.replace(setting, key=key, value=value)], f"read as {key}: {value}{remark}"
    if setting.key in RENAMED:
        key = RENAMED[setting.key]
        return [dataclasses.replace(setting, key=key)], f"read as {key}"
    expected, reason = ALWAYS_SO[setting.key]
    if not _means(setting.value, expected):
        raise ValueError(f"only {expected} is possible: {reason}")
    return [], reason


def _means(value: Any, expected: Any) -> bool:
    with suppress(ValueError):
        return expected in (..., value) or convert(value, type(expected)) == expected
    return False


def _add_simpo(settings: list[Setting], notices: list[str], known: set[str]) -> list[Setting]:
    """Add SimPO's loss to recipes with `gamma_beta_ratio` and no loss: SimPO's own script had one loss only."""
    margins = [setting for setting in settings if setting.key == "gamma_beta_ratio"]
    if not margins or "gamma_beta_ratio" not in known or any(setting.key == "loss_type" for setting in settings):
        return settings
    notices.append(f"{margins[-1].place}: gamma_beta_ratio belongs to the SimPO loss; loss_type: simpo is assumed.")
    return [*settings, dataclasses.replace(margins[-1], key="loss_type", value="simpo")]
