"""Memory of one GPU during training, estimated from a model's shape, and the recomputation that fits into it.

With N parameters of which T train, p bytes per weight, W processes, and s = W where a part is sharded, else 1:

    weights          p N / s        (4-bit: 0.56 bytes for each weight of a linear layer, p for the rest; not sharded)
    bf16 copies      2 T            where float32 weights compute in bf16 without DeepSpeed (autocast keeps them)
    gradients        p T / s        none on the GPU where the optimizer is offloaded
    whole gradients  4 T            FSDP2 with accumulation: micro-batches before the last keep theirs unsharded
    buckets          p T            DDP's copies of the gradients; DeepSpeed: p x min(T, 5e8)
    optimizer        states x 4 T / s (1-byte states for 8-bit optimizers), plus a float32 master copy, 4 T / s, under
                                    DeepSpeed with bf16 and for 16-bit weights without sharding; there
                                    `master_weights: stochastic` has no copy, and `none` 16-bit states as well
    reference        p N / s        where a reference model is kept
    gathered         FSDP2: two layers and the embeddings in 16 bits, and the largest unit's gradient, 6 bytes; ZeRO-3:
                                    p x min(N, 1e9), what DeepSpeed keeps gathered; the reference's weights once more
    activations      see `Recomputation` and `kept_of_a_layer`
    log-probs        hidden states and their gradient, 8 bytes x scored tokens x width, and one tile of logits
    head gradient    4 bytes (6 with 16-bit weights) x vocabulary x width: the kernel adds it up in float32
    optimizer step   what float32 gradients need beyond the last three, which are gone by then

ZeRO-2 shards gradients and optimizer; ZeRO-3 and FSDP2 shard weights and the reference as well, hybrid sharding over
part of the processes only; hpZ keeps a second copy of 16-bit weights, split over a node; offloaded parts count as
nothing. "Tokens" are those of one micro-batch. Weights, gradients, optimizer and reference are exact for unsharded
training in one dtype; kernels, fragmentation and the CUDA context come on top (`USABLE`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from prefopt.files import read_object, read_yaml
from prefopt.hardware import GIB

USABLE = 0.9
"""Share of a card's memory that an estimate may fill; kernels, fragmentation and the CUDA context take the rest."""
ASSUMED_CARD = 80 * 10**9
"""Bytes of the card that `prefopt check` reckons with where there is none."""
LOGPROB_COLUMNS, LOGPROB_ROWS = 32768, 4096  # of one tile of TRL's kernel
FOUR_BIT = 0.56  # half a byte and the share of the quantisation constants
ZERO3_LIVE = 10**9  # DeepSpeed's `stage3_max_live_parameters`, and the parameters of a sub-group of its optimizer
ZERO_BUCKET = 5 * 10**8  # DeepSpeed's `reduce_bucket_size`
# moments that an optimizer keeps of each parameter
OPTIMIZER_STATES = {"sgd": 0, "rmsprop": 1, "adagrad": 1, "lion": 1, "adafactor": 0}
FEWEST_TOKENS, MOST_TOKENS = 4096, 16384
"""Tokens of a micro-batch chosen from memory: fewer leave an 8B's matrix products slow, more gain nothing."""


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a model that the estimate needs."""

    parameters: int
    trained: int  # all of them, or the adapter's
    linear_parameters: int  # those that 4-bit loading quantises
    largest_layer: int
    embedding_parameters: int
    head_parameters: int  # of the LM head
    layers: int
    width: int
    heads: int
    query_width: int  # heads x their width
    key_width: int
    feed_forward: int  # of all experts that one token meets
    vocabulary: int

    @classmethod
    def of(
        cls, config: PretrainedConfig, adapter: PeftConfig | None = None, *, trust_remote_code: bool = False
    ) -> ModelShape:
        """Count the causal LM that `config` describes, built without memory (meta device), and its adapter."""
        with torch.device("meta"), contextlib.redirect_stderr(None):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
            return cls.count(model if adapter is None else get_peft_model(model, adapter))

    @classmethod
    def count(cls, model: Any) -> ModelShape:
        """Count a model in memory, sharded or not, quantised or not, with or without an adapter."""
        adapted = isinstance(model, PeftModel)
        base = model.get_base_model() if adapted else model
        text = base.config.get_text_config()
        blocks = decoder_layers(base)
        # of a model with an adapter, whatever trains was added to it
        weights = [weight for weight in model.parameters() if not (adapted and weight.requires_grad)]
        given = set(map(id, weights))
        linear = [m for m in blocks.modules() if isinstance(m, nn.Linear) and id(m.weight) in given]
        packed = _size(m.weight for m in linear)  # 4-bit weights lie two to a byte
        unpacked = sum(m.in_features * m.out_features for m in linear)
        head = base.get_output_embeddings()
        ends = [part.weight for part in (base.get_input_embeddings(), head) if part is not None]
        heads = getattr(text, "num_attention_heads", 1)
        head_width = getattr(text, "head_dim", None) or text.hidden_size // heads
        settings = text.to_dict()
        feed_forward = settings.get("moe_intermediate_size") or settings.get("intermediate_size")
        return cls(
            parameters=_size(weights) - packed + unpacked,
            trained=_size(weight for weight in model.parameters() if weight.requires_grad),
            linear_parameters=unpacked,
            largest_layer=max(_size(w for w in block.parameters() if id(w) in given) for block in blocks),
            embedding_parameters=_size({id(weight): weight for weight in ends}.values()),  # tied ones once
            head_parameters=0 if head is None else _numel(head.weight),
            layers=len(blocks),
            width=text.hidden_size,
            heads=heads,
            query_width=heads * head_width,
            key_width=(getattr(text, "num_key_value_heads", None) or heads) * head_width,
            feed_forward=(feed_forward or 4 * text.hidden_size) * (settings.get("num_experts_per_tok") or 1),
            vocabulary=text.vocab_size,
        )


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """Return a model's decoder layers: its longest list of modules."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len) if lists else nn.ModuleList([model])


def _numel(weight: torch.Tensor) -> int:
    return getattr(weight, "ds_numel", weight.numel())  # ZeRO-3 leaves an empty tensor on every rank


def _size(weights: Iterable[torch.Tensor]) -> int:
    return sum(_numel(weight) for weight in weights)


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

    @classmethod
    def of(cls, accelerator: Any) -> Launch:
        """Read what an accelerator was set up with."""
        state = accelerator.state
        deepspeed, fsdp = state.deepspeed_plugin, getattr(state, "fsdp_plugin", None)
        zero = {} if deepspeed is None else deepspeed.deepspeed_config.get("zero_optimization", {})
        parallel = accelerator.parallelism_config
        return cls(
            processes=state.num_processes,
            mixed_precision=state.mixed_precision,
            zero_stage=zero.get("stage", 0),
            fsdp=fsdp is not None,
            offload_optimizer=_offloads(zero, "offload_optimizer"),
            offload_weights=_offloads(zero, "offload_param") or bool(fsdp and fsdp.cpu_offload),
            use_cpu=state.device.type == "cpu",
            shards=None if parallel is None or not parallel.dp_shard_enabled else parallel.dp_shard_size,
            second_copy_over=zero.get("zero_hpz_partition_size"),
        )


def _offloads(zero: dict[str, Any], part: str) -> bool:
    return (zero.get(part) or {}).get("device", "none") != "none"


# ---- activations


@dataclass(frozen=True)
class Recomputation:
    """Which activations are not kept for the backward pass, but computed again.

    Attributes:
        mode: "none"; "every_n" (those of layers 0, n, 2n, ...); "selective" (of every layer all but the results of
            matrix products and attention); "all" (of every layer all but its input).
        every: the n of "every_n".
    """

    mode: str
    every: int = 1

    @property
    def repeated(self) -> float:
        """Share of the forward pass that runs twice; of "selective" an estimate, not a measurement."""
        return {"none": 0.0, "every_n": 1 / self.every, "selective": 1 / 6, "all": 1.0}[self.mode]

    def __str__(self) -> str:
        return f"{self.mode} (n = {self.every})" if self.mode == "every_n" else self.mode


def recomputations(layers: int, *, selective: bool = True) -> list[Recomputation]:
    """List the ways to recompute a model of so many layers, the cheapest first."""
    ways = [Recomputation("none"), Recomputation("all")]
    ways += [Recomputation("every_n", n) for n in (2, 3, 4, 6, 8) if n < layers]
    ways += [Recomputation("selective")] if selective else []
    return sorted(ways, key=lambda way: way.repeated)


@dataclass(frozen=True)
class Widths:
    """Bytes of a number during the forward pass.

    Attributes:
        computed: of what matrix products take and return.
        residual: of the hidden states between layers.
        casts: matrix products cast their inputs themselves, each its own copy (autocast).
        fused: liger's layers, which keep neither a norm's intermediate results nor the activation function's.
    """

    computed: int
    residual: int
    casts: bool = False
    fused: bool = False


def kept_of_a_layer(shape: ModelShape, widths: Widths) -> dict[str, float]:
    """Return the bytes a token that one gated layer (Llama's kind) keeps for its backward pass, by `mode`.

    With h = width, q and k = width of queries and of keys, f = feed-forward width, c and r = `computed`, `residual`:

        all          r h                                the layer's input
        selective    r h + c (3 q + 2 k + 2 h + 2 f) + 2 lse: results of seven matrix products and two attentions
        none         norms: 2 (4 + r) h; inputs of the products behind them: 2 c h; attention: c (2 q + 2 k) + lse;
                     feed-forward: c 4 f (gate, its activation, up, their product)
    """
    h, q, k, f = shape.width, shape.query_width, shape.key_width, shape.feed_forward
    c, r, sums = widths.computed, widths.residual, 4 * shape.heads
    norms = 2 * r * h if widths.fused else 2 * (4 + r) * h
    inputs = (3 + 2 if widths.casts else 1 + 1) * c * h
    gates = 3 if widths.fused else 4
    return {
        "all": r * h,
        "selective": r * h + c * (3 * q + 2 * k + 2 * h + 2 * f) + 2 * sums,
        "none": norms + inputs + c * (2 * q + 2 * k + gates * f) + sums,
    }


def activation_bytes(shape: ModelShape, widths: Widths, way: Recomputation, *, tokens: int) -> float:
    """Return the bytes of activations at the end of the forward pass, and one layer's while it runs backward."""
    kept, layers = kept_of_a_layer(shape, widths), shape.layers
    again = -(-layers // way.every) if way.mode == "every_n" else 0
    mode = "none" if way.mode == "every_n" else way.mode
    return tokens * ((layers - again) * kept[mode] + again * kept["all"] + kept["none"])


# ---- all parts


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
        lines = [f"  {name:<16}{size / GIB:>9.2f} GiB" for name, size in self.parts.items() if size]
        return "\n".join([*lines, f"  {'sum':<16}{self.total / GIB:>9.2f} GiB"])


def optimizer_bytes(name: str) -> float:
    """Return the bytes of optimizer state per trained parameter: `adamw_torch` 8, `rmsprop` 4, `adamw_8bit` 2."""
    states = next((count for key, count in OPTIMIZER_STATES.items() if key in name), 2)
    return states * (1 if "8bit" in name else 4)


@dataclass(frozen=True)
class Run:
    """What memory depends on beside the size of a micro-batch and the recomputation.

    Attributes:
        shape: the model.
        launch: processes and sharding.
        dtype: of the loaded weights; "auto" and `None` count as two bytes.
        bf16: whether the run computes in bfloat16.
        optimizer: transformers' name of it.
        four_bit: whether the base is loaded in 4 bits.
        keeps_reference: whether a reference model stays in memory.
        fused: whether liger's layers are used.
        accumulates: whether a step has several micro-batches.
        scores_tokens: whether tokens are scored by an LM head; False for rewards.
        master_weights: how updates of 16-bit weights are kept outside DeepSpeed and FSDP: "float32", "stochastic" or
            "none".
    """

    shape: ModelShape
    launch: Launch
    dtype: str | None
    bf16: bool
    optimizer: str
    four_bit: bool = False
    keeps_reference: bool = True
    fused: bool = False
    accumulates: bool = False
    scores_tokens: bool = True
    master_weights: str = "float32"

    @property
    def keeps_updates_itself(self) -> bool:
        """Whether `master_weights` applies: 16-bit weights that neither DeepSpeed nor FSDP keeps copies of."""
        return self.weight_bytes == 2 and not self.launch.zero_stage and not self.launch.fsdp

    @property
    def loaded_bytes(self) -> int:
        """Bytes of a weight as it is loaded."""
        return 4 if self.dtype == "float32" else 2

    @property
    def weight_bytes(self) -> int:
        """Bytes of a weight: accelerate keeps those that FSDP trains in float32."""
        if self.launch.zero_stage and self.bf16:
            return 2
        return 4 if self.launch.fsdp and self.bf16 else self.loaded_bytes

    @property
    def widths(self) -> Widths:
        """Bytes of activations; float32 weights compute in bf16 by autocast, or under FSDP by its own cast."""
        if self.weight_bytes == 2 or (self.bf16 and self.launch.fsdp):
            return Widths(2, 2, fused=self.fused)
        return Widths(2, 4, casts=True, fused=self.fused) if self.bf16 else Widths(4, 4, fused=self.fused)


def estimate(run: Run, way: Recomputation, *, tokens: int, scored_tokens: int) -> Memory:
    """Estimate the memory of one GPU by the formula in the module's docstring.

    Args:
        run: model, launch and precision.
        way: what is recomputed.
        tokens: of one micro-batch.
        scored_tokens: those of them that are scored.
    """
    states = _states(run)
    shape, size = run.shape, run.weight_bytes
    columns, rows = min(shape.vocabulary, LOGPROB_COLUMNS), min(scored_tokens, LOGPROB_ROWS)
    scores, trains_head = run.scores_tokens, shape.trained == shape.parameters
    passing = {
        "activations": activation_bytes(shape, run.widths, way, tokens=tokens),
        "log-probs": (8 * scored_tokens * shape.width + run.widths.computed * rows * columns) if scores else 0,
        "head gradient": (6 if size == 2 else 4) * shape.head_parameters if scores and trains_head else 0,
    }
    step = max(0, _step_bytes(run) - sum(passing.values()))
    return Memory({**states, **passing, "optimizer step": step})


def _states(run: Run) -> dict[str, float]:
    """Return the parts that do not depend on the micro-batch."""
    shape, launch, size = run.shape, run.launch, run.weight_bytes
    trained, deepspeed = shape.trained, launch.zero_stage > 0
    sharded = (launch.zero_stage == 3 or launch.fsdp) and not run.four_bit
    shards = min(launch.shards or launch.processes, launch.processes)
    weights_over = shards if sharded else 1
    states_over = shards if sharded or launch.zero_stage == 2 else 1
    quantised = shape.linear_parameters if run.four_bit else 0
    weights = FOUR_BIT * quantised + size * (shape.parameters - quantised)
    if trained != shape.parameters:
        weights += size * trained  # the adapter
    copied = size == 4 and run.bf16 and not deepspeed and not launch.fsdp
    copies = 4 if (deepspeed and run.bf16) or (size == 2 and not launch.fsdp) else 0
    moments = optimizer_bytes(run.optimizer)
    if run.keeps_updates_itself:
        copies = 4 if run.master_weights == "float32" else 0
        moments = moments / 2 if run.master_weights == "none" and "8bit" not in run.optimizer else moments
    on_gpu = 0 if launch.offload_weights else 1
    states_on_gpu = 0 if launch.offload_optimizer or (launch.fsdp and launch.offload_weights) else 1
    return {
        "weights": on_gpu * weights / weights_over,
        "bf16 copies": 2 * trained if copied else 0,
        "gradients": states_on_gpu * size * trained / states_over,
        "whole gradients": 4 * trained if launch.fsdp and run.accumulates and launch.processes > 1 else 0,
        "buckets": _bucket_bytes(run),
        "optimizer": states_on_gpu * (moments + copies) * trained / states_over,
        "reference": on_gpu * size * shape.parameters / weights_over if run.keeps_reference else 0,
        "hpZ's copies": _second_copies(run),
        "gathered": _gathered_bytes(run) if sharded else 0,
    }


def _second_copies(run: Run) -> float:
    """Return the bytes of the 16-bit weights that hpZ splits over a node once more."""
    over = run.launch.second_copy_over
    return 2 * run.shape.parameters * (2 if run.keeps_reference else 1) / over if over else 0


def _bucket_bytes(run: Run) -> float:
    """Return the bytes of gradients on their way: DDP copies all of them into buckets, DeepSpeed some."""
    launch, trained = run.launch, run.shape.trained
    if launch.fsdp or launch.processes == 1:
        return 0
    return run.weight_bytes * (min(trained, ZERO_BUCKET) if launch.zero_stage else trained)


def _gathered_bytes(run: Run) -> float:
    shape, references = run.shape, 1 if run.keeps_reference else 0
    if run.launch.zero_stage == 3:
        live = max(min(shape.parameters, ZERO3_LIVE), shape.largest_layer, shape.head_parameters)
        return run.weight_bytes * live * (1 + references)
    gathered = 2 * (2 * shape.largest_layer + shape.embedding_parameters)  # one layer in use and the next one
    return gathered * (1 + references) + 6 * max(shape.largest_layer, shape.embedding_parameters)


def _step_bytes(run: Run) -> float:
    """Return the bytes of the float32 gradients that an optimizer of 16-bit weights makes during its step."""
    launch, trained = run.launch, run.shape.trained
    if run.weight_bytes != 2 or launch.offload_optimizer:
        return 0
    if run.keeps_updates_itself and run.master_weights != "float32":  # one weight after the other, or none
        return 8 * run.shape.head_parameters if run.master_weights == "stochastic" else 0
    if launch.zero_stage == 3:  # sub-group by sub-group
        return 4 * min(trained / launch.processes, ZERO3_LIVE)
    return 4 * trained / (launch.processes if launch.zero_stage == 2 else 1)


# ---- what fits


def with_master_weights(run: Run, wanted: str, *, available: float | None) -> Run:
    """Return a run with its `master_weights` decided: of "auto" float32 copies where they fit, as a trainer decides.

    Args:
        run: model, launch and precision.
        wanted: the setting.
        available: bytes of the card; None where that is unknown, and copies are reckoned with.
    """
    if wanted != "auto":
        return replace(run, master_weights=wanted)
    copied = replace(run, master_weights="float32")
    needed = sum(_states(copied).values()) + _step_bytes(copied)
    fits = available is None or needed <= USABLE * available
    return copied if fits else replace(run, master_weights="stochastic")


def choose_recomputation(
    run: Run, ways: Sequence[Recomputation], *, tokens: int, scored_tokens: int, available: float
) -> Recomputation:
    """Choose the first recomputation that fits, or the last one where none does.

    Args:
        run: model, launch and precision.
        ways: what may be recomputed, the cheapest first (`recomputations`).
        tokens: of a large micro-batch.
        scored_tokens: those of them that are scored.
        available: bytes of the card; `USABLE` of them may be filled.
    """

    def fits(way: Recomputation) -> bool:
        return estimate(run, way, tokens=tokens, scored_tokens=scored_tokens).total <= USABLE * available

    return next((way for way in ways if fits(way)), ways[-1])


def choose_tokens(run: Run, ways: Iterable[Recomputation], *, available: float) -> int:
    """Choose the tokens of a micro-batch: as many as fit, up to `MOST_TOKENS`, under the cheapest recomputation.

    A recomputation under which fewer than `FEWEST_TOKENS` fit gives way to the next one; the last one takes what fits.

    Args:
        run: model, launch and precision.
        ways: what may be recomputed, the cheapest first.
        available: bytes of the card; `USABLE` of them may be filled.
    """

    def room(way: Recomputation) -> int:
        sizes = range(MOST_TOKENS, 512, -512)
        needed = ((size, estimate(run, way, tokens=size, scored_tokens=size).total) for size in sizes)
        return next((size for size, bytes_ in needed if bytes_ <= USABLE * available), 512)

    rooms = [room(way) for way in ways]
    return next((tokens for tokens in rooms if tokens >= FEWEST_TOKENS), max(rooms))
