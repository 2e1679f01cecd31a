"""One training step of prefopt or of TRL's DPOTrainer, timed: the same weights, pairs, order and optimizer for both.

`step_throughput.py` (CPU, side by side) and `gpu.py` (a card) run `measure`, each setting in a process of its own.
Nothing is downloaded: weights and tokens are random, lengths are drawn log-normally with the means of a known data
set, or read from a file with one `[prompt, chosen, rejected]` a line.

Warm-up lasts until two steps in a row have compiled nothing (graphs of torch.compile and Triton kernels are counted),
so that no compilation stands in a median.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

SHAPES = {  # a Llama of each size
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
    "small": {
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 8192,
    },
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}
MEAN_LENGTHS = {  # prompt, chosen, rejected, in tokens
    "ultrafeedback": (190, 327, 302),
    "hh": (158, 67, 71),
}
METHODS = ("dpo", "wpo", "sppo", "multi_reference")
MOST_WARMUP = 8  # steps, after which timing begins although something was still compiled


@dataclass(frozen=True)
class Setting:
    """What is measured: one library, model, precision and batch.

    Attributes:
        library: "prefopt" or "trl".
        method: one of `METHODS`.
        layout: prefopt's `batch_layout`.
        micro_batch, pairs: pairs of a micro-batch and of an optimizer step.
        lengths: a key of `MEAN_LENGTHS`, or a file of triples.
        size, layers: a key of `SHAPES`, and another number of layers for it.
        device: "cpu" or "cuda".
        dtype: of the weights.
        precision: "plain" (the optimizer updates the weights as they are) or "recipes" (updates of 16-bit weights are
            kept as prefopt does by default: float32 master copies where they fit, else stochastic rounding; TRL's
            optimizer gets the same).
        reference: "live" or "cached"; references: cached references of multi_reference.
        checkpointing: prefopt's modes; TRL knows "none" and "all".
        fused_layers: liger-kernel's.
        steps, warmup: timed steps, and the fewest before them.
        source: another checkout's `src` folder to import prefopt from.
    """

    library: str = "prefopt"
    method: str = "wpo"
    layout: str = "packed"
    micro_batch: int = 8
    pairs: int = 8
    lengths: str = "ultrafeedback"
    size: str = "small"
    layers: int | None = None
    device: str = "cpu"
    dtype: str = "float32"
    precision: str = "plain"
    max_length: int = 512
    reference: str = "live"
    references: int | None = None
    checkpointing: str = "none"
    fused_layers: bool = False
    steps: int = 8
    warmup: int = 2
    seed: int = 0
    source: str | None = None

    @property
    def shape(self) -> dict[str, int]:
        """Return the Llama's settings."""
        return SHAPES[self.size] | ({} if self.layers is None else {"num_hidden_layers": self.layers})


# ---- the data


def draw_lengths(name: str, count: int, *, max_length: int, seed: int) -> list[tuple[int, int, int]]:
    """Lengths of `count` pairs: log-normal around the means of `name`, or read from a file; cut to `max_length`."""
    if name not in MEAN_LENGTHS:
        triples = [tuple(json.loads(line)) for line in Path(name).read_text().splitlines() if line.strip()]
        drawn = [triples[i % len(triples)] for i in range(count)]
    else:
        rng = random.Random(seed)
        drawn = [tuple(_log_normal(rng, mean) for mean in MEAN_LENGTHS[name]) for _ in range(count)]
    cut = []
    for prompt, chosen, rejected in drawn:
        prompt = min(prompt, max_length // 2)
        cut.append((prompt, min(chosen, max_length - prompt), min(rejected, max_length - prompt)))
    return cut


def _log_normal(rng: random.Random, mean: float, sigma: float = 0.8) -> int:
    return max(1, round(rng.lognormvariate(math.log(mean) - sigma**2 / 2, sigma)))


def make_dataset(lengths: list[tuple[int, int, int]], *, vocab_size: int, references: int | None, seed: int):
    """Tokenised pairs of random ids, with SPPO's columns and those of K cached references (0: a number each, as TRL
    reads; None: not cached)."""
    from datasets import Dataset

    rng = random.Random(seed)
    rows = []
    for number, (prompt, chosen, rejected) in enumerate(lengths):
        ids = {
            f"{part}_ids": [rng.randrange(3, vocab_size) for _ in range(n)]
            for part, n in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected))
        }
        row = {"row_id": str(number), **ids, "chosen_bytes": chosen, "rejected_bytes": rejected}
        row |= {"chosen_win_prob": 0.8, "rejected_win_prob": 0.3}
        if references is not None:
            for side, length in (("chosen", chosen), ("rejected", rejected)):
                logp = -math.log(vocab_size) * length
                row[f"ref_{side}_logps"] = [logp * (1 + 0.01 * k) for k in range(references)] or logp
                if references:
                    row[f"ref_{side}_counts"] = [length] * references
        rows.append(row)
    return Dataset.from_list(rows)


def step_order(count: int, setting: Setting) -> list[int]:
    """The order of pairs in prefopt's first epoch, step by step."""
    from prefopt.scoring.plan import BatchPlan, GroupLengths

    plan = BatchPlan([GroupLengths(1, 1, 2, 1)] * count, groups_per_micro_batch=setting.pairs, seed=setting.seed)
    return [index for step in range(plan.num_steps) for batch in plan.step(0, step)[0] for index in batch.indices]


# ---- the trainers


def make_model(setting: Setting):
    """A Llama with random weights, the same for every setting with this seed and shape."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "llama",
        **setting.shape,
        max_position_embeddings=2 * setting.max_length,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(setting.seed)
    with torch.device(setting.device):
        return AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, setting.dtype), attn_implementation="sdpa"
        )


def make_tokenizer():
    """A tokenizer of three special tokens; the pairs are ids already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2}, unk_token="<pad>")
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words), pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def _arguments(setting: Setting, folder: str) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "per_device_train_batch_size": setting.micro_batch,
        "gradient_accumulation_steps": setting.pairs // setting.micro_batch,
        "num_train_epochs": 1,
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "beta": 0.01,
        "max_length": setting.max_length,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": setting.device == "cpu",
        "bf16": setting.dtype == "bfloat16",
        "seed": setting.seed,
        "precompute_ref_log_probs": setting.reference == "cached",
        "optim": "adamw_torch_fused",
        "use_liger_kernel": setting.fused_layers,
    }


def _checkpointing(mode: str, known: set[str]) -> dict[str, Any]:
    """The arguments of a checkpointing mode, for a config with the fields `known`."""
    if "checkpointing" in known:
        return {"checkpointing": mode}
    if mode not in ("none", "all"):
        raise ValueError(f"This trainer has no checkpointing mode {mode!r}.")
    return {
        "gradient_checkpointing": mode == "all",
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if mode == "all" else None,
    }


def build_trainer(setting: Setting, model, dataset, callbacks, folder: str):
    """The trainer of one setting; both libraries get the same optimizer, schedule, batch and order."""
    build = _build_prefopt if setting.library == "prefopt" else _build_trl
    return build(setting, model, dataset, callbacks, _arguments(setting, folder))


def _build_prefopt(setting: Setting, model, dataset, callbacks, common: dict[str, Any]):
    import prefopt

    name, extra = {
        "dpo": ("DPO", {}),
        "wpo": ("WPO", {"max_weight": None}),
        "sppo": ("SPPO", {"loss_type": ["sppo_hard"]}),
        "multi_reference": ("MultiReferenceDPO", {"accept_outliers": True}),
    }[setting.method]
    if setting.method == "multi_reference":
        del common["precompute_ref_log_probs"]
    trainer_class, config_class = getattr(prefopt, f"{name}Trainer"), getattr(prefopt, f"{name}Config")
    known = {field.name for field in fields(config_class)}
    extra |= _checkpointing(setting.checkpointing, known)
    if setting.dtype != "float32":
        extra["master_weights"] = "none" if setting.precision == "plain" else "auto"
    config = config_class(**common, **extra, batch_layout=setting.layout)
    return trainer_class(
        model, args=config, train_dataset=dataset, processing_class=make_tokenizer(), callbacks=callbacks
    )


def _build_trl(setting: Setting, model, dataset, callbacks, common: dict[str, Any]):
    import copy

    import trl

    from prefopt.trainers.precision import keep_updates

    order = step_order(len(dataset), setting)

    class Trainer(trl.DPOTrainer):
        """TRL's trainer on the ready token ids, in the order that prefopt's plan draws."""

        _masters = None

        def _prepare_dataset(self, dataset, *_, **__):
            return dataset

        def _precompute_ref_logps(self, dataset, *_, **__):
            return dataset  # the columns are there

        def _get_train_sampler(self, *_, **__):
            return order

        def create_optimizer(self, *args, **kwargs):
            first = self.optimizer is None
            optimizer = super().create_optimizer(*args, **kwargs)
            if first and setting.precision == "recipes" and setting.dtype != "float32":
                self.args.master_weights = "auto"
                self._masters = keep_updates(optimizer, self.args)
            return optimizer

    extra = {"dpo": {}, "wpo": {"use_weighting": True}, "sppo": {"loss_type": ["sppo_hard"]}}[setting.method]
    extra |= _checkpointing(setting.checkpointing, set())
    return Trainer(
        model,
        ref_model=copy.deepcopy(model) if setting.reference == "live" else None,
        args=trl.DPOConfig(**common, **extra),
        train_dataset=dataset,
        processing_class=make_tokenizer(),
        callbacks=callbacks,
    )


# ---- the clock


def count_compilations() -> Callable[[], int]:
    """Return a function that counts what was compiled in this process since now: graphs, and Triton kernels."""
    kernels: list[None] = []
    if importlib.util.find_spec("triton"):
        from triton import knobs

        knobs.compilation.listener = lambda **_: kernels.append(None)
    from torch._dynamo.utils import counters

    return lambda: counters["stats"]["unique_graphs"] + len(kernels)


def make_clock(setting: Setting, now: Callable[[], float], profiled: Callable[[], Any] | None = None):
    """A callback that times the steps after warm-up, then ends the run.

    Args:
        setting: whose steps are timed.
        now: seconds, once the device has done its work.
        profiled: makes a profiler, which records one more step after the timed ones.
    """
    from transformers import TrainerCallback

    compiled = count_compilations()

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.times: list[float] = []
            self.processor_times: list[float] = []
            self.losses: list[float] = []
            self.counts = [compiled()]
            self.warm: int | None = None  # steps of warm-up
            self.first_step: float | None = None  # time of day
            self.profile: Any = None

        def on_step_begin(self, args, state, control, **_):
            if profiled is not None and self.timed >= setting.steps:
                self.profile = profiled()
                self.profile.__enter__()
            self.start, self.processor_start = now(), time.process_time()

        def on_step_end(self, args, state, control, **_):
            self.times.append(now() - self.start)
            self.processor_times.append(time.process_time() - self.processor_start)
            self.first_step = self.first_step or time.time()
            if self.profile is not None:
                self.profile.__exit__(None, None, None)
            self.counts.append(compiled())
            quiet = len(self.counts) > 2 and self.counts[-1] == self.counts[-3]
            if self.warm is None and (
                (len(self.times) >= setting.warmup and quiet) or len(self.times) >= setting.warmup + MOST_WARMUP
            ):
                self.warm = len(self.times)
            elif self.timed >= setting.steps and (profiled is None or self.profile is not None):
                control.should_training_stop = True

        @property
        def timed(self) -> int:
            """Count the steps after warm-up."""
            return 0 if self.warm is None else len(self.times) - self.warm

        def on_log(self, args, state, control, logs=None, **_):
            if "loss" in logs:
                self.losses.append(logs["loss"])

    return Clock()


# ---- one setting, measured


def measure(
    setting: Setting,
    *,
    started: float | None = None,
    profiled: Callable[[], Any] | None = None,
    inspect: Callable[[Any], dict] | None = None,
) -> dict:
    """Train a few steps and return how long each took, what the losses were, and how much memory was needed at most.

    Args:
        setting: what to run.
        started: time of day at which this process began; gives `start_to_first_step`.
        profiled: makes a profiler for one more step; see `make_clock`.
        inspect: returns further figures from the trainer, once it has trained.
    """
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    on_card = setting.device == "cuda"

    def now() -> float:
        if on_card:
            torch.cuda.synchronize()
        return time.perf_counter()

    steps = setting.warmup + MOST_WARMUP + setting.steps + 2
    lengths = draw_lengths(setting.lengths, setting.pairs * steps, max_length=setting.max_length, seed=setting.seed)
    references = setting.references if setting.method == "multi_reference" else None
    if setting.method != "multi_reference" and setting.reference == "cached":
        references = 0
    dataset = make_dataset(lengths, vocab_size=setting.shape["vocab_size"], references=references, seed=setting.seed)
    if on_card:
        torch.cuda.reset_peak_memory_stats()
    model = make_model(setting)
    clock = make_clock(setting, now, profiled)
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(setting, model, dataset, [clock], folder)
        trainer.train()
    order = step_order(len(lengths), setting)
    tokens = [
        sum(sum(lengths[index]) for index in order[step * setting.pairs : (step + 1) * setting.pairs])
        for step in range(clock.warm, clock.warm + setting.steps)
    ]
    peak = torch.cuda.max_memory_allocated() if on_card else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    timed = clock.times[clock.warm : clock.warm + setting.steps]
    masters = getattr(trainer, "_masters", None)
    live = setting.reference == "live" and setting.method != "multi_reference"
    return {
        "setting": dataclasses.asdict(setting),
        "step_seconds": timed,
        "step_processor_seconds": clock.processor_times[clock.warm : clock.warm + setting.steps],
        "step_tokens": tokens,
        "warmup_steps": clock.warm,
        "compile_seconds": max(0.0, sum(clock.times[: clock.warm]) - clock.warm * statistics.median(timed)),
        "compiled_while_timed": clock.counts[clock.warm + setting.steps] - clock.counts[clock.warm],
        "losses": clock.losses,
        "peak_bytes": peak,
        # 6N a token for the policy, 2N for a live reference; N without the input embedding, which is looked up
        "flops_per_token": (8 if live else 6)
        * (sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel()),
        "layout": trainer.layout.name if setting.library == "prefopt" else "padded",
        "update_remedy": "none" if masters is None else "float32" if masters.keep else "stochastic",
        "start_to_first_step": None if started is None else clock.first_step - started,
        **({} if inspect is None else inspect(trainer)),
    }


def matrix_rate(device: str, dtype: str = "float32", size: int = 2048) -> float:
    """FLOP/s of a large matrix product."""
    import torch

    a, b = (torch.randn(size, size, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    times = []
    for _ in range(6):
        start = time.perf_counter()
        (a @ b)[0, 0].item()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def figures(runs: list[dict], *, rate: float | None = None) -> dict:
    """The figures of one setting from its runs; medians over all their timed steps, in every column of time."""
    seconds = [second for run in runs for second in run["step_seconds"]]
    rates = [tokens / second for run in runs for tokens, second in zip(run["step_tokens"], run["step_seconds"])]
    flops = runs[0]["flops_per_token"] * statistics.median(rates)
    return {
        "step_ms": 1000 * statistics.median(seconds),
        "processor_ms": 1000 * statistics.median(s for run in runs for s in run["step_processor_seconds"]),
        "pairs_per_second": runs[0]["setting"]["pairs"] / statistics.median(seconds),
        "unique_tokens_per_second": statistics.median(rates),
        "useful_tflops": flops / 1e12,
        **({} if rate is None else {"fraction_of_matrix_rate": flops / rate}),
        "peak_gib": max(run["peak_bytes"] for run in runs) / 2**30,
        "compile_seconds": max(run["compile_seconds"] for run in runs),
    }


def environment(setting: Setting) -> dict[str, str]:
    """The environment of a process that runs one setting."""
    paths = [setting.source] if setting.source else []
    found = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    found["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])
    return found
