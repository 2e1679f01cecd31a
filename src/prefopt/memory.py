"""Memory of one GPU during training, estimated from the model's config alone.

With N parameters of which T train, p bytes per weight, W processes, and s = W where a part is sharded, else 1:

    weights      p N / s            (4-bit: 0.56 bytes for each weight of a linear layer, p for the rest; not sharded)
    bf16 copies  2 T                where float32 weights compute in bf16 without DeepSpeed (autocast keeps them)
    gradients    p T / s
    optimizer    states x 4 T / s   (1-byte states for 8-bit optimizers), plus a float32 master copy, 4 T / s, under
                                    DeepSpeed with bf16
    reference    p N / s            where a reference model is kept
    one layer    4 bytes of the largest layer and of the embeddings, where weights are sharded (gathered while in use)
    activations  checkpointed: 2 bytes x tokens x width x layers, and one layer's
                 one layer: tokens x (16 width + 6 feed-forward width) x 2 bytes; without checkpointing, for all layers
    log-probs    8 bytes x scored tokens x min(vocabulary, 32768)

ZeRO-2 shards gradients and optimizer; ZeRO-3 and FSDP2 shard weights and the reference as well, hybrid sharding over
part of the processes only; hpZ keeps a second copy of 16-bit weights, split over a node; offloaded parts count as
nothing. "Tokens" are those of one micro-batch. Weights, gradients, optimizer and reference are exact for unsharded
training in one dtype; activations and log-probs are upper estimates: kernels, fragmentation and the CUDA context come
on top.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from transformers import AutoModelForCausalLM, PretrainedConfig

from prefopt.files import read_object, read_yaml

GIB = 2**30
LOGPROB_COLUMNS = 32768
FOUR_BIT = 0.56  # half a byte and the share of the quantisation constants
# moments that an optimizer keeps of each parameter
OPTIMIZER_STATES = {"sgd": 0, "rmsprop": 1, "adagrad": 1, "lion": 1, "adafactor": 0}


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a model that the estimate needs."""

    parameters: int
    trained: int  # all of them, or the adapter's
    linear_parameters: int  # those that 4-bit loading quantises
    largest_layer: int
    embedding_parameters: int
    layers: int
    width: int
    feed_forward: int
    vocabulary: int

    @classmethod
    def of(
        cls, config: PretrainedConfig, adapter: PeftConfig | None = None, *, trust_remote_code: bool = False
    ) -> ModelShape:
        """Count the causal LM that `config` describes, built without memory (meta device), and its adapter."""
        text = config.get_text_config()
        with torch.device("meta"), contextlib.redirect_stderr(None):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
            layers = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
            blocks = max(layers, key=len) if layers else torch.nn.ModuleList([model])
            linear = [module for module in blocks.modules() if isinstance(module, torch.nn.Linear)]
            ends = [part for part in (model.get_input_embeddings(), model.get_output_embeddings()) if part]
            counts = {
                "parameters": _size(model.parameters()),
                "linear_parameters": _size(module.weight for module in linear),
                "largest_layer": max(_size(block.parameters()) for block in blocks),
                "embedding_parameters": _size({part.weight for part in ends}),  # tied ones once
            }
            # adds its weights to the modules counted above
            trained = get_peft_model(model, adapter) if adapter is not None else model
        return cls(
            **counts,
            trained=_size(parameter for parameter in trained.parameters() if parameter.requires_grad),
            layers=len(blocks),
            width=text.hidden_size,
            feed_forward=text.to_dict().get("intermediate_size") or 4 * text.hidden_size,
            vocabulary=text.vocab_size,
        )


def _size(weights: Iterable[torch.Tensor]) -> int:
    return sum(weight.numel() for weight in weights)


@dataclass(frozen=True)
class Launch:
    """The parts of an accelerate config that memory depends on."""

    processes: int = 1
    machines: int = 1
    mixed_precision: str = "no"
    zero_stage: int = 0  # DeepSpeed; 0 without
    fsdp: bool = False
    offload_optimizer: bool = False
    offload_weights: bool = False
    use_cpu: bool = False
    shards: int | None = None  # processes that one copy of the model is split over, where these are not all
    second_copy_over: int | None = None  # hpZ: processes that the second copy of the weights is split over
    reads_once_a_node: bool = False  # FSDP2: the first rank of a node reads weights
    batch_keys: tuple[str, ...] = ()

    @classmethod
    def read(cls, path: Path, processes: int | None = None, machines: int | None = None) -> Launch:
        """Read an accelerate config file; `processes` and `machines` override its numbers.

        Raises:
            ValueError: it is no YAML mapping.
        """
        values, _ = read_yaml(path)
        if not isinstance(values, dict):
            raise ValueError(f"{path} must hold `key: value` lines, as `accelerate config` writes them.")
        deepspeed, fsdp = values.get("deepspeed_config") or {}, values.get("fsdp_config") or {}
        is_deepspeed = values.get("distributed_type") == "DEEPSPEED"
        own = _deepspeed_file(path, deepspeed.get("deepspeed_config_file"))
        zero = own.get("zero_optimization", {})
        precision = next((name for name in ("bf16", "fp16") if own.get(name, {}).get("enabled")), "no")
        return cls(
            processes=processes or int(values.get("num_processes", 1)),
            machines=machines or int(values.get("num_machines", 1)),
            mixed_precision=str(values.get("mixed_precision", precision)),
            zero_stage=int(deepspeed.get("zero_stage", zero.get("stage", 0))) if is_deepspeed else 0,
            fsdp=values.get("distributed_type") == "FSDP",
            offload_optimizer=deepspeed.get("offload_optimizer_device", "none") != "none",
            offload_weights=deepspeed.get("offload_param_device", "none") != "none"
            or bool(fsdp.get("fsdp_offload_params")),
            use_cpu=bool(values.get("use_cpu")),
            shards=(values.get("parallelism_config") or {}).get("parallelism_config_dp_shard_size"),
            second_copy_over=zero.get("zero_hpz_partition_size"),
            reads_once_a_node=fsdp.get("fsdp_version") == 2 and bool(fsdp.get("fsdp_cpu_ram_efficient_loading")),
            batch_keys=tuple(key for key in deepspeed if "batch" in key or "accumulation" in key),
        )


def _deepspeed_file(path: Path, name: str | None) -> dict[str, Any]:
    """Read DeepSpeed's own config, which an accelerate config at `path` may name."""
    if name is None:
        return {}
    file = Path(name) if Path(name).exists() else path.parent / Path(name).name
    return read_object(file, remedy="name DeepSpeed's config by its path")


@dataclass
class Memory:
    """Bytes of one GPU, by what they hold."""

    parts: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """Sum all parts."""
        return sum(self.parts.values())

    def table(self) -> str:
        """Write the parts as lines of text, in GiB."""
        lines = [f"  {name:<12}{size / GIB:>9.2f} GiB" for name, size in self.parts.items() if size]
        return "\n".join([*lines, f"  {'sum':<12}{self.total / GIB:>9.2f} GiB"])


def optimizer_bytes(name: str) -> float:
    """Return the bytes of optimizer state per trained parameter: `adamw_torch` 8, `rmsprop` 4, `adamw_8bit` 2."""
    states = next((count for key, count in OPTIMIZER_STATES.items() if key in name), 2)
    return states * (1 if "8bit" in name else 4)


def estimate(
    shape: ModelShape,
    launch: Launch,
    *,
    dtype: str | None,
    bf16: bool,
    optimizer: str,
    four_bit: bool = False,
    keeps_reference: bool = True,
    checkpointing: bool = True,
    tokens: int,
    scored_tokens: int,
) -> Memory:
    """Estimate the memory of one GPU by the formula in the module's docstring.

    Args:
        shape: the model.
        launch: processes and sharding.
        dtype: of the loaded weights; "auto" and `None` count as two bytes.
        bf16: whether the run computes in bfloat16.
        optimizer: transformers' name of it.
        four_bit: whether the base is loaded in 4 bits.
        keeps_reference: whether a reference model stays in memory.
        checkpointing: whether activations are recomputed.
        tokens: of one micro-batch.
        scored_tokens: those of them that are scored.
    """
    deepspeed, trained = launch.zero_stage > 0, shape.trained
    size = 2 if deepspeed and bf16 else 4 if dtype == "float32" else 2
    sharded = (launch.zero_stage == 3 or launch.fsdp) and not four_bit
    shards = min(launch.shards or launch.processes, launch.processes)
    weights_over = shards if sharded else 1
    states_over = shards if sharded or launch.zero_stage == 2 else 1
    quantised = shape.linear_parameters if four_bit else 0
    weights = FOUR_BIT * quantised + size * (shape.parameters - quantised)
    if trained != shape.parameters:
        weights += size * trained  # the adapter
    copied = size == 4 and bf16 and not deepspeed and not launch.fsdp
    # DeepSpeed's float32 master copies; ours of 16-bit weights, with their gradients during the optimizer's step
    copies = 4 if deepspeed and bf16 else 8 if size == 2 and not launch.fsdp else 0
    states = optimizer_bytes(optimizer) + copies
    models = 2 if keeps_reference else 1
    second = 2 * models * shape.parameters / launch.second_copy_over if launch.second_copy_over else 0
    on_gpu = 0 if launch.offload_weights else 1
    one_layer = tokens * (16 * shape.width + 6 * shape.feed_forward) * 2
    recomputed = 2 * tokens * shape.width * shape.layers + one_layer
    return Memory(
        {
            "weights": on_gpu * weights / weights_over,
            "bf16 copies": 2 * trained if copied else 0,
            "gradients": size * trained / states_over,
            "optimizer": 0 if launch.offload_optimizer else states * trained / states_over,
            "reference": on_gpu * size * shape.parameters / weights_over if keeps_reference else 0,
            "hpZ's copies": second,
            "one layer": 4 * (shape.largest_layer + shape.embedding_parameters) if sharded else 0,
            "activations": recomputed if checkpointing else one_layer * shape.layers,
            "log-probs": 8 * scored_tokens * min(shape.vocabulary, LOGPROB_COLUMNS),
        }
    )
