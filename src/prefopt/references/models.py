"""Reference models: given by name or in memory, loaded one at a time, made ready to score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from prefopt._trl import prepare_deepspeed
from prefopt.data.encoding import prepare_tokenizer
from prefopt.scoring.attention import load_with_flex_attention
from prefopt.scoring.logprobs import install_scoring


@dataclass(frozen=True)
class ReferenceModel:
    """A reference that is in memory; names and folders are given as strings instead."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a reference that is given by name."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name)
    return prepare_tokenizer(tokenizer)


def prepare_model(
    reference: str | ReferenceModel, *, dtype: str, padded: bool, accelerator: Accelerator | None
) -> tuple[nn.Module, PretrainedConfig]:
    """The model with its scoring path, frozen, on the device; and its config as loaded.

    Args:
        reference: a name, a folder, or a model in memory.
        dtype: to load a named one in.
        padded: whether its batches will be padded for sure; otherwise a GPU gets an attention that can be packed.
        accelerator: under DeepSpeed, the one that shards the model.
    """
    device = PartialState().device
    if isinstance(reference, ReferenceModel):
        model = reference.model
    else:
        options: dict[str, Any] = {"dtype": getattr(torch, dtype)}
        load: Any = AutoModelForCausalLM.from_pretrained
        packs = device.type == "cuda" and not padded
        model = load_with_flex_attention(load, reference, **options) if packs else load(reference, **options)
        model.requires_grad_(False)
    install_scoring(model)
    if accelerator is not None and accelerator.distributed_type == DistributedType.DEEPSPEED:
        # nothing is trained, and DeepSpeed insists on batch sizes
        accelerator.state.deepspeed_plugin.deepspeed_config.update(
            train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=1, train_batch_size=accelerator.num_processes
        )
        return prepare_deepspeed(model, accelerator), model.config
    model.to(device)
    return model, model.config
