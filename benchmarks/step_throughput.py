"""One training step, timed: prefopt against TRL's DPOTrainer on the same weights, pairs and order.

    python benchmarks/step_throughput.py                                    # CPU, small shape, both length
    distributions
    python benchmarks/step_throughput.py --device cuda --size 8b --checkpointing

Every contender runs in a process of its own, in turns, and trains with `Trainer.train()`; a step's time is from one
step's begin to its end.
TRL is given each micro-batch size that divides the batch, and its best one counts. Both take the same pairs in every
optimizer step, so
their losses must agree. Nothing is downloaded: weights are random, tokens are random, lengths are drawn log-normally
with the means of a
known data set, or read from a file with one `[prompt, chosen, rejected]` a line.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

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


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", choices=tuple(SHAPES), default="small")
    parser.add_argument(
        "--lengths", nargs="+", default=["ultrafeedback", "hh"], help="ultrafeedback, hh, or a file of length triples"
    )
    parser.add_argument("--method", choices=METHODS, default="wpo")
    parser.add_argument("--reference", choices=("live", "cached"), default="live")
    parser.add_argument(
        "--references",
        nargs="+",
        type=int,
        default=[1, 7],
        help="multi_reference: numbers of cached references to compare",
    )
    parser.add_argument("--pairs", type=int, default=8, help="pairs of one optimizer step")
    parser.add_argument(
        "--max_length", type=int, default=None, help="tokens of prompt + completion (512 on a CPU, else 2048)"
    )
    parser.add_argument("--steps", type=int, default=8, help="timed steps of each run")
    parser.add_argument("--warmup", type=int, default=2, help="steps before the timed ones")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each contender, in turns")
    parser.add_argument("--layouts", nargs="+", default=["packed"], choices=("packed", "padded"))
    parser.add_argument(
        "--trl_batch_sizes", nargs="+", type=int, default=None, help="default: every divisor of --pairs"
    )
    parser.add_argument("--prefopt_batch_sizes", nargs="+", type=int, default=None, help="default: --pairs")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing, for both")
    parser.add_argument("--fused_layers", action="store_true", help="liger-kernel's fused layers, for prefopt only")
    parser.add_argument("--json", type=Path, default=None, help="write the figures here")
    parser.add_argument("--plot", type=Path, default=None, help="draw pairs/s here")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--contender", default=None, help=argparse.SUPPRESS
    )  # set in the processes that this script starts
    args = parser.parse_args(argv)
    args.max_length = args.max_length or (512 if args.device == "cpu" else 2048)
    return args


# ---- the data
# ---------------------------------------------------------------------------------------------------------------------


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


# ---- one contender, in its own process
# ---------------------------------------------------------------------------------------------


def run_contender(args: argparse.Namespace) -> dict:
    """Train a few steps and say how long each took, what the losses were, and how much memory was needed at most."""
    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback

    transformers.utils.logging.set_verbosity_error()
    contender = json.loads(args.contender)
    (lengths_name,) = args.lengths
    shape = SHAPES[args.size]
    total = args.pairs * (args.warmup + args.steps)
    lengths = draw_lengths(lengths_name, total, max_length=args.max_length, seed=args.seed)
    references = contender.get("references", 0 if args.reference == "cached" else None)
    dataset = make_dataset(lengths, vocab_size=shape["vocab_size"], references=references, seed=args.seed)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    config = AutoConfig.for_model(
        "llama",
        **shape,
        max_position_embeddings=2 * args.max_length,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(args.seed)
    with torch.device(args.device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")

    class Clock(TrainerCallback):
        times: list[float] = []  # noqa: RUF012
        losses: list[float] = []  # noqa: RUF012

        def on_step_begin(self, *_, **__):
            self.start = self.now()

        def on_step_end(self, *_, **__):
            self.times.append(self.now() - self.start)

        def on_log(self, _, __, ___, logs=None, **____):
            if "loss" in logs:
                self.losses.append(logs["loss"])

        @staticmethod
        def now() -> float:
            if args.device == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter()

    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(contender, args, model, dataset, clock, folder)
        started = time.perf_counter()
        if args.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
    peak = (
        torch.cuda.max_memory_allocated()
        if args.device == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    timed = clock.times[args.warmup :]
    return {
        "step_seconds": timed,
        "warmup_seconds": sum(clock.times[: args.warmup]),
        "compile_seconds": max(0.0, sum(clock.times[: args.warmup]) - args.warmup * statistics.median(timed)),
        "wall_seconds": time.perf_counter() - started,
        "losses": clock.losses,
        "peak_bytes": peak,
        "parameters": sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel(),
        "unique_tokens": sum(sum(triple) for triple in lengths[args.warmup * args.pairs :]) / args.steps,
    }


def build_trainer(contender: dict, args: argparse.Namespace, model, dataset, clock, folder: str):
    """The trainer of one contender; both get the same optimizer, schedule, batch and order."""
    import copy

    import trl
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    import prefopt

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2}, unk_token="<pad>")),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
    )
    size = contender["micro_batch"]
    common = {
        "output_dir": folder,
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": args.pairs // size,
        "num_train_epochs": 1,
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "beta": 0.01,
        "max_length": args.max_length,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": args.device == "cpu",
        "bf16": args.device == "cuda",
        "seed": args.seed,
        "gradient_checkpointing": args.checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if args.checkpointing else None,
        "precompute_ref_log_probs": args.reference == "cached",
        "optim": "adamw_torch_fused",
    }
    order = step_order(len(dataset), args)
    if contender["library"] == "prefopt":
        trainers = {
            "dpo": (prefopt.DPOTrainer, prefopt.DPOConfig, {}),
            "wpo": (prefopt.WPOTrainer, prefopt.WPOConfig, {"max_weight": None}),
            "sppo": (
                getattr(prefopt, "SPPOTrainer", None),
                getattr(prefopt, "SPPOConfig", None),
                {"loss_type": ["sppo_hard"]},
            ),
        }
        if args.method == "multi_reference":
            del common["precompute_ref_log_probs"]
            trainers["multi_reference"] = (
                prefopt.MultiReferenceDPOTrainer,
                prefopt.MultiReferenceDPOConfig,
                {"accept_outliers": True},
            )
        trainer_class, config_class, extra = trainers[args.method]
        config = config_class(**common, **extra, batch_layout=contender["layout"], use_liger_kernel=args.fused_layers)
        return trainer_class(model, args=config, train_dataset=dataset, processing_class=tokenizer, callbacks=[clock])

    class Trainer(trl.DPOTrainer):
        """TRL's trainer on the ready token ids, in the order that prefopt's plan draws."""

        def _prepare_dataset(self, dataset, *_, **__):
            return dataset

        def _precompute_ref_logps(self, dataset, *_, **__):
            return dataset  # the columns are there

        def _get_train_sampler(self, *_, **__):
            return order

    extra = {"dpo": {}, "wpo": {"use_weighting": True}, "sppo": {"loss_type": ["sppo_hard"]}}[args.method]
    reference = copy.deepcopy(model) if args.reference == "live" else None
    return Trainer(
        model,
        ref_model=reference,
        args=trl.DPOConfig(**common, **extra),
        train_dataset=dataset,
        processing_class=tokenizer,
        callbacks=[clock],
    )


def step_order(count: int, args: argparse.Namespace) -> list[int]:
    """The order of pairs in prefopt's first epoch, step by step."""
    from prefopt.scoring.plan import BatchPlan, GroupLengths

    plan = BatchPlan([GroupLengths(1, 1, 2, 1)] * count, groups_per_micro_batch=args.pairs, seed=args.seed)
    return [index for step in range(plan.num_steps) for batch in plan.step(0, step)[0] for index in batch.indices]


# ---- the comparison
# ----------------------------------------------------------------------------------------------------------------


def matrix_rate(device: str) -> float:
    """FLOP/s of a large matrix product in the training dtype."""
    import torch

    size, dtype = (8192, torch.bfloat16) if device == "cuda" else (2048, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(6):
        start = time.perf_counter()
        (a @ b)[0, 0].item()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def compare(args: argparse.Namespace, lengths: str) -> list[dict]:
    """All contenders on one length distribution, in turns; one row of figures each."""
    sizes = args.trl_batch_sizes or [size for size in range(1, args.pairs + 1) if args.pairs % size == 0]
    contenders = [
        {"library": "prefopt", "layout": layout, "micro_batch": size}
        for layout in args.layouts
        for size in args.prefopt_batch_sizes or [args.pairs]
    ]
    if args.method == "multi_reference":  # which TRL does not have
        contenders, sizes = [{**contenders[0], "references": count} for count in args.references], []
    contenders += [{"library": "trl", "layout": "padded", "micro_batch": size} for size in sizes]
    runs: list[list[dict]] = [[] for _ in contenders]
    for _ in range(args.rounds):
        for contender, results in zip(contenders, runs):
            if results and "error" in results[-1]:
                continue
            results.append(in_own_process(contender, args, lengths))
    rate = matrix_rate(args.device)
    rows = [summarise(contender, results, args, lengths, rate) for contender, results in zip(contenders, runs)]
    best = min((row["step_ms"] for row in rows if row["library"] == "trl" and "step_ms" in row), default=None)
    losses = next(
        (r[0]["losses"] for c, r in zip(contenders, runs) if c["library"] == "trl" and "losses" in r[0]), None
    )
    for row, results in zip(rows, runs):
        if "references" in row and "step_ms" in row:
            row["relative_step_time"] = row["step_ms"] / rows[0]["step_ms"]
        if "step_ms" in row and best is not None:
            row["speedup_over_best_trl"] = best / row["step_ms"]
            row["largest_loss_difference"] = max(
                abs(a - b) / max(1.0, abs(b)) for a, b in zip(results[0]["losses"], losses)
            )
    return rows


def in_own_process(contender: dict, args: argparse.Namespace, lengths: str) -> dict:
    """Run one contender as this script does under `--contender`; an error becomes a figure (out of memory is one)."""
    command = [sys.executable, __file__, "--contender", json.dumps(contender), "--lengths", lengths]
    for name in ("device", "size", "method", "reference", "pairs", "max_length", "steps", "warmup", "seed"):
        command += [f"--{name}", str(getattr(args, name))]
    command += ["--checkpointing"] if args.checkpointing else []
    command += ["--fused_layers"] if args.fused_layers and contender["library"] == "prefopt" else []
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    )
    if done.returncode:
        return {
            "error": done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit status {done.returncode}"
        }
    return json.loads(done.stdout.strip().splitlines()[-1])


def summarise(contender: dict, results: list[dict], args: argparse.Namespace, lengths: str, rate: float) -> dict:
    """The figures of one contender: medians over all timed steps of all its runs."""
    row = {
        **contender,
        "lengths": Path(lengths).name,
        "size": args.size,
        "method": args.method,
        "reference": args.reference,
    }
    if "error" in results[-1]:
        return row | {"error": results[-1]["error"]}
    step = statistics.median(seconds for result in results for seconds in result["step_seconds"])
    mean = statistics.mean(seconds for result in results for seconds in result["step_seconds"])
    tokens = results[0]["unique_tokens"]
    live = args.reference == "live" and args.method != "multi_reference"
    # 6N a token for the policy, 2N for a live reference; N without the input embedding, which is looked up
    flops = (8 if live else 6) * results[0]["parameters"] * tokens
    return row | {
        "step_ms": 1000 * step,
        "pairs_per_second": args.pairs / step,
        "unique_tokens_per_second": tokens / mean,
        "useful_tflops": flops / mean / 1e12,
        "fraction_of_matrix_rate": flops / mean / rate,
        "peak_gib": max(result["peak_bytes"] for result in results) / 2**30,
        "compile_seconds": max(result["compile_seconds"] for result in results),
    }


COLUMNS = (  # field, heading, format
    ("lengths", "lengths", "{}"),
    ("library", "library", "{}"),
    ("layout", "layout", "{}"),
    ("micro_batch", "micro-batch", "{}"),
    ("references", "references", "{}"),
    ("step_ms", "ms/step", "{:.0f}"),
    ("pairs_per_second", "pairs/s", "{:.2f}"),
    ("unique_tokens_per_second", "unique tokens/s", "{:.0f}"),
    ("useful_tflops", "TFLOP/s", "{:.3f}"),
    ("fraction_of_matrix_rate", "of matrix rate", "{:.2f}"),
    ("peak_gib", "peak GiB", "{:.2f}"),
    ("compile_seconds", "compile s", "{:.1f}"),
    ("speedup_over_best_trl", "x TRL's best", "{:.2f}"),
    ("relative_step_time", "time / first", "{:.3f}"),
    ("largest_loss_difference", "relative loss difference", "{:.1e}"),
)


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table."""
    columns = [column for column in COLUMNS if any(column[0] in row for row in rows)]
    lines = ["| " + " | ".join(heading for _, heading, _ in columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = [form.format(row[name]) if name in row else "" for name, _, form in columns]
        lines.append("| " + " | ".join(cells) + " |" + (f" {row['error']}" if "error" in row else ""))
    return "\n".join(lines)


def draw(rows: list[dict], path: Path) -> None:
    """Pairs per second of every contender, one group of bars for each length distribution."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if "pairs_per_second" in row]
    names = list(dict.fromkeys(row["lengths"] for row in rows))
    figure, axes = plt.subplots(1, len(names), figsize=(4.5 * len(names), 3.2), squeeze=False)
    for axis, name in zip(axes[0], names):
        own = [row for row in rows if row["lengths"] == name]
        labels = [
            f"prefopt {row['layout']}, {row['micro_batch']} a batch"
            if row["library"] == "prefopt"
            else f"TRL, {row['micro_batch']} a batch"
            for row in own
        ]
        colours = ["tab:blue" if row["library"] == "prefopt" else "tab:grey" for row in own]
        bars = axis.barh(labels[::-1], [row["pairs_per_second"] for row in own][::-1], color=colours[::-1])
        axis.bar_label(bars, fmt="%.2f", padding=2)
        axis.set(title=f"{name} lengths", xlabel="pairs per second")
        axis.margins(x=0.15)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> list[dict]:
    """Compare on every length distribution, print the table, write the JSON."""
    args = parse(argv)
    if args.contender:
        print(json.dumps(run_contender(args)))
        return []
    rows = [row for lengths in args.lengths for row in compare(args, lengths)]
    print(
        f"{args.method.upper()}, {args.size} on {args.device}, {args.pairs} pairs a step, reference {args.reference}, "
        f"medians of {args.rounds} x {args.steps} steps\n"
    )
    print(table(rows))
    if args.plot:
        draw(rows, args.plot)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(rows, indent=2) + "\n")
    return rows


if __name__ == "__main__":
    main()
