"""Make the policy that trains from a user's `model`: loading, adapters, the scoring path."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import TrainableTokensWrapper
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.utils import is_liger_kernel_available

from prefopt._transformers import apply_liger_kernel
from prefopt._trl import create_model_from_path, disable_dropout_in_model, get_config_model_id
from prefopt.files import user_path
from prefopt.memory import decoder_layers
from prefopt.models.heads import adapter_read_whole, load_whole
from prefopt.references.fingerprints import module_fingerprint
from prefopt.scoring.logprobs import install_scoring
from prefopt.trainers.checkpointing import make_reentrant
from prefopt.trainers.sharding import (
    keep_second_partition,
    model_without_weights,
    reads_once_a_node,
    reads_weights,
    share_dtypes,
)

REFERENCE_ADAPTER = "ref"
_RESERVED_NAMES = {
    REFERENCE_ADAPTER: "the name of the frozen copy that is its reference",
    "weight": "which PEFT cannot tell from the names of weights when it saves",
    "bias": "which PEFT cannot tell from the names of weights when it saves",
}


def load_model(
    model: str | os.PathLike[str] | PreTrainedModel | PeftModel,
    args: Any,
    quantization_config: Any = None,
    loader: Callable[..., Any] = create_model_from_path,
) -> PreTrainedModel | PeftModel:
    """Load the model where `model` is a name or folder; return one in memory unchanged.

    Args:
        model: hub name, local folder, or a model in memory (a `PeftModel` too).
        args: trainer config; `model_init_kwargs` and `trust_remote_code` are read.
        quantization_config: passed to the loader.
        loader: loads a name or folder, given the settings as keywords; the default one also takes a local folder that
            holds an adapter, which is loaded onto its base and trained on.

    Raises:
        ValueError: `model` is none, its folder lacks weights, or settings for loading were given together with a model
            in memory.
    """
    if args.use_liger_kernel and not is_liger_kernel_available():
        raise ValueError("`use_liger_kernel` needs the package liger-kernel: pip install 'prefopt[fast]'.")
    if isinstance(model, os.PathLike):
        model = os.fspath(model)
    if not isinstance(model, (str, nn.Module)):
        raise ValueError(
            f"`model` is {'None' if model is None else f'of type {type(model).__name__}'}: give the name of a model, "
            "its folder, or a model in memory."
        )
    init = dict(args.model_init_kwargs or {})
    if not isinstance(model, str):
        for name, value in (("model_init_kwargs", init), ("quantization_config", quantization_config)):
            if value:
                raise ValueError(
                    f"`{name}` says how to load a model, but a loaded `model` was given. Drop one of them."
                )
        return model
    if quantization_config is not None:
        init["quantization_config"] = quantization_config
    if args.distributed_state is not None and args.distributed_state.num_processes > 1:
        init["device_map"] = None
    init.setdefault("trust_remote_code", args.trust_remote_code)
    if is_deepspeed_zero3_enabled():
        keep_second_partition()
    if loader is not create_model_from_path:
        return loader(model, **init)
    if is_adapter(model):
        return _load_adapter(model, **init)
    once_a_node = quantization_config is None and reads_once_a_node()
    read: Any = partial(load_whole, loader) if not once_a_node or reads_weights() else model_without_weights
    loaded: PreTrainedModel = read(model, **init)
    if once_a_node:
        share_dtypes(loaded)
    return loaded


def is_adapter(name: str) -> bool:
    """Return whether a local folder holds an adapter and no whole model."""
    path = user_path(name)
    return (path / "adapter_config.json").is_file() and not (path / "config.json").is_file()


def _load_adapter(path: str, *, dtype: Any = "float32", **init: Any) -> PeftModel:
    # peft takes no names of types, unlike transformers
    dtype = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
    folder = str(user_path(path))
    with adapter_read_whole(folder):
        return AutoPeftModelForCausalLM.from_pretrained(folder, is_trainable=True, dtype=dtype, **init)


def load_tokenizer(model: PreTrainedModel | PeftModel, args: Any) -> PreTrainedTokenizerBase:
    """Load the tokenizer that was saved with the model."""
    name = get_config_model_id(model.config)
    if not name:
        raise ValueError("The model was not loaded from a name or folder: give its tokenizer as `processing_class`.")
    revision = (args.model_init_kwargs or {}).get("revision") or "main"
    return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=args.trust_remote_code)


def base_model_of(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """Return the transformers model under an adapter, or the model itself."""
    if not isinstance(model, PeftModel):
        return model
    base: Any = model.get_base_model()
    return base


def weights_fingerprint(model: PreTrainedModel | PeftModel) -> str:
    """Hash the weights that a model has now, an adapter's that was given with it included; all ranks call it."""
    given = isinstance(model, PeftModel) and REFERENCE_ADAPTER in model.peft_config
    adapter = str(model.active_adapter) if given else None
    return module_fingerprint(model, base_model_of(model).config, adapter=adapter)


def frozen_copy(model: PreTrainedModel | PeftModel) -> PreTrainedModel | PeftModel:
    """Copy the model with its present weights, frozen and with the scoring path.

    Raises:
        ValueError: the weights are sharded already, so that no rank could copy them.
    """
    if is_deepspeed_zero3_enabled() and any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ValueError(
            "The model's weights are already sharded by ZeRO-3 and cannot be copied. Give `model` as a name or "
            "folder, or pass `ref_model`."
        )
    reference = copy.deepcopy(model)
    install_scoring(base_model_of(reference))
    return reference.requires_grad_(False).eval()


def with_adapter(
    model: PreTrainedModel | PeftModel, args: Any, peft_config: PeftConfig | None
) -> PreTrainedModel | PeftModel:
    """Put the scoring path into the base model, then the adapter around it.

    Returns:
        The policy: `model` itself, or a `PeftModel`. One that was given with a trained adapter gets a frozen copy of
            it as adapter "ref".

    Raises:
        ValueError: the adapter is on a model that has one, on the LM head, or of a kind that adds virtual tokens; or
            no parameter is trainable.
    """
    install_scoring(base_model_of(model))
    if peft_config is not None:
        model = add_adapter(model, args, peft_config)
    elif isinstance(model, PeftModel):
        _copy_adapter(model)
    if isinstance(model, PeftModel):
        _choose_checkpointing(args)
    check_trainable(model)
    if args.disable_dropout:
        disable_dropout_in_model(model)
    return model


def check_trainable(model: PreTrainedModel | PeftModel) -> None:
    """Check that something trains, and nothing that the scoring path would ignore.

    Raises:
        ValueError: no parameter is trainable, or an adapter wraps the LM head.
    """
    head = base_model_of(model).get_output_embeddings()
    if isinstance(head, BaseTunerLayer):
        raise ValueError(
            "An adapter on `lm_head` would be ignored: log-probs are computed from `lm_head.weight`. Remove "
            "`lm_head` from `target_modules`, or name it in `modules_to_save`."
        )
    if isinstance(head, TrainableTokensWrapper):
        raise ValueError(
            "`trainable_token_indices` wraps the LM head of a model with tied embeddings, and log-probs are computed "
            "from `lm_head.weight` without it. Leave the setting out, or train both whole with "
            "`modules_to_save: [embed_tokens, lm_head]`."
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "No parameter of the model is trainable (`requires_grad`). Load a trained adapter with "
            "`is_trainable=True`."
        )


def add_adapter(model: PreTrainedModel | PeftModel, args: Any, peft_config: PeftConfig) -> PeftModel:
    """Wrap `model` into a new adapter.

    Raises:
        ValueError: the model has one already, or the adapter is of a kind that adds virtual tokens.
    """
    if isinstance(model, PeftModel):
        raise ValueError(
            "The model already has an adapter and `peft_config` asks for another: merge the first, or drop "
            "`peft_config`."
        )
    if peft_config.is_prompt_learning:
        kind = getattr(peft_config.peft_type, "value", peft_config.peft_type)
        raise ValueError(f"{kind} adds virtual tokens, which these trainers do not score. Use LoRA.")
    if getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False):
        model = prepare_model_for_kbit_training(
            model,
            use_gradient_checkpointing=args.gradient_checkpointing,
            gradient_checkpointing_kwargs=args.gradient_checkpointing_kwargs,
        )
        return get_peft_model(model, peft_config)
    # adapters in the base model's dtype: ZeRO-3 cannot mix dtypes
    return get_peft_model(model, peft_config, autocast_adapter_dtype=False)


def _copy_adapter(model: PeftModel) -> None:
    """Copy the active adapter's present weights into a second, frozen adapter."""
    trained = model.active_adapter
    if why := _RESERVED_NAMES.get(trained):
        raise ValueError(f"The model's adapter is called {trained!r}, {why}: load it under another `adapter_name`.")
    if REFERENCE_ADAPTER in model.peft_config:  # of an earlier trainer on this model
        model.delete_adapter(REFERENCE_ADAPTER)
    model.add_adapter(REFERENCE_ADAPTER, model.peft_config[trained])
    # by the containers that hold one entry an adapter, as adapters may be called like any module of the model
    for container in model.modules():
        if isinstance(container, (nn.ModuleDict, nn.ParameterDict)) and {trained, REFERENCE_ADAPTER} <= {*container}:
            entries: list[Any] = [container[REFERENCE_ADAPTER], container[trained]]
            weights = [[each] if isinstance(each, nn.Parameter) else each.parameters() for each in entries]
            for copied, parameter in zip(*weights):
                with torch.no_grad():
                    copied.copy_(parameter)
                copied.requires_grad_(False)


def _choose_checkpointing(args: Any) -> None:
    """Make gradient checkpointing re-entrant where ZeRO-3 and an adapter need it, and print that."""
    if args.checkpointing != "none" and is_deepspeed_zero3_enabled():
        if not (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            print("ZeRO-3 with an adapter: gradient checkpointing is re-entrant.")
        make_reentrant(args)


def use_liger(model: PreTrainedModel | PeftModel, args: Any) -> None:
    """Give a model liger's layers where the config asks for them; Trainer does it for the policy."""
    if args.use_liger_kernel:
        apply_liger_kernel(model, args.liger_kernel_config)


def compile_blocks(model: nn.Module, *, backend: str = "inductor") -> None:
    """Compile every decoder layer by itself, in place: names and parameters stay, and one graph serves all layers."""
    for layer in decoder_layers(model):
        layer.compile(backend=backend)


def compiled_so_far() -> dict[str, float]:
    """Return `perf/compiled_graphs` and `perf/compile_seconds` of this process; empty where nothing was compiled.

    A count that still grows after the first steps means that shapes keep changing.
    """
    utils = sys.modules.get("torch._dynamo.utils")  # imported by the first compilation
    if utils is None or not (graphs := utils.counters["stats"]["unique_graphs"]):
        return {}
    seconds = sum((metrics.duration_us or 0) for metrics in utils.get_compilation_metrics()) / 1e6
    return {"perf/compiled_graphs": float(graphs), "perf/compile_seconds": seconds}
