"""Models over several processes: frozen ones are sharded as the policy is; under FSDP2 one rank a node reads weights.

With `fsdp_cpu_ram_efficient_loading` accelerate sends the first rank's weights to all others when it shards a model.
transformers reads the files on every rank all the same, so the ranks that would throw the weights away build the model
without any (meta device) here. Nothing of this is needed under DeepSpeed ZeRO-3, where transformers reads the files on
the first rank of all and shards each weight at once.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, fsdp2_prepare_model
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.integrations import is_fsdp_enabled
from transformers.utils import logging

from prefopt._trl import create_model_from_path, prepare_deepspeed, prepare_fsdp
from prefopt.waiting import announced_wait


def reads_once_a_node() -> bool:
    """Return whether the launcher's config has FSDP2 load weights on one rank and send them to the others."""
    return is_fsdp_enabled() and os.environ.get("FSDP_VERSION") == "2"


def reads_weights() -> bool:
    """Return whether this rank reads weights from files: the first one of its node does in any case."""
    return not reads_once_a_node() or os.environ.get("LOCAL_RANK", "0") == "0"


def model_without_weights(name: str, *, revision: str = "main", **options: Any) -> PreTrainedModel:
    """Build the model that `create_model_from_path` would load, its weights on the meta device, its buffers computed.

    Args:
        name: hub name or folder.
        revision: of the hub repository.
        options: as for `from_pretrained`.
    """
    trusted = options.get("trust_remote_code", False)
    config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trusted)
    model_class: Any = getattr(transformers, config.architectures[0], None)
    if model_class is None:  # code that comes with the weights: read them, and they are thrown away later
        model: PreTrainedModel = create_model_from_path(name, revision=revision, **options)
        return model
    shown = logging.get_verbosity()
    logging.set_verbosity_error()  # every weight is missing
    try:
        # instead of a name's: nothing is read
        dtypes = {"dtype": options.get("dtype") if options.get("dtype") != "auto" else config.dtype}
        model = model_class.from_pretrained(None, config=config, state_dict={}, **(options | dtypes))
    finally:
        logging.set_verbosity(shown)
    model.config.name_or_path = name
    return model


def share_dtypes(model: nn.Module) -> None:
    """Give weights that this rank has not read the dtypes that the first rank has; all ranks call it.

    A file, or a model's class, may keep some of them in another dtype than the rest.
    """
    found = [{name: parameter.dtype for name, parameter in model.named_parameters()}]
    with announced_wait("the first rank to read the weights"):
        broadcast_object_list(found)
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            parameter.data = parameter.data.to(found[0][name])


def give_addresses(model: nn.Module, *, upcast: bool) -> None:
    """Replace weights on the meta device by uninitialised ones in memory, which takes none until it is written.

    accelerate finds the optimizer's parameters after sharding by their former addresses, and all of the meta device
    have the same.

    Args:
        model: the policy, before its optimizer is made.
        upcast: make trainable ones float32, as accelerate's mixed precision would, so that nothing is written.
    """
    made: dict[int, nn.Parameter] = {}  # by the former one: tied weights stay tied
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                dtype = torch.float32 if upcast and parameter.requires_grad else parameter.dtype
                if id(parameter) not in made:
                    empty = torch.empty(parameter.shape, dtype=dtype)
                    made[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                setattr(module, name, made[id(parameter)])


def keep_second_partition() -> None:
    """Have a second model under ZeRO-3 use the groups that hpZ has made for the first; DeepSpeed would stop."""
    from deepspeed.utils import groups

    create = groups._create_zero_param_parallel_group

    def create_once(size: int) -> None:
        if groups._get_zero_param_intra_parallel_group() is None:
            create(size)

    groups._create_zero_param_parallel_group = create_once


def is_fsdp(accelerator: Accelerator) -> bool:
    """Return whether models are sharded by FSDP."""
    return getattr(accelerator.state, "fsdp_plugin", None) is not None


def shard(module: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Wrap a frozen model for the processes of the run, as the policy is; a sharded one is returned as it is."""
    if accelerator.state.deepspeed_plugin is not None:
        return prepare_deepspeed(module, accelerator)
    if not is_fsdp(accelerator):
        return accelerator.prepare_model(module, evaluation_mode=True)
    plugin: Any = accelerator.state.fsdp_plugin
    if plugin.fsdp_version == 1:
        sharded: Any = prepare_fsdp(module, accelerator)
        return sharded
    # of the first model that is sharded, and the policy's layers may be of another class
    chosen = plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap
    try:
        return fsdp2_prepare_model(accelerator, module).eval()
    finally:
        plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap = chosen


def keep_float32_under_fsdp2(accelerator: Accelerator) -> None:
    """Have FSDP2 return outputs as they are and reduce gradients in float32, before anything is sharded.

    Under `mixed_precision: bf16` accelerate sets both to bf16: the root module would round log-probs of hundreds of
    nats to 8 bits, and heads' rewards as well.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version == 2 and plugin.mixed_precision_policy is not None:
        policy = plugin.mixed_precision_policy
        plugin.mixed_precision_policy = replace(policy, reduce_dtype=torch.float32, output_dtype=None)


def describe_wrapping(model: Any) -> str:
    """Name the type that a model is wrapped into, with DeepSpeed's ZeRO stage."""
    name = type(model).__name__
    return f"{name} (ZeRO-{model.zero_optimization_stage()})" if name == "DeepSpeedEngine" else name
