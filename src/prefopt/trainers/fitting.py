"""What fits on the card: the tokens of a micro-batch and what is recomputed, settled before training and printed.

The sizes come from `prefopt.memory`'s estimate for the policy at hand and from the plan of the data at hand. All ranks
come to the same result, since recomputed layers gather sharded weights again, which no rank can do alone.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import gather_object

from prefopt.hardware import GIB
from prefopt.memory import (
    USABLE,
    Launch,
    ModelShape,
    Recomputation,
    Run,
    choose_recomputation,
    choose_tokens,
    estimate,
    recomputations,
    with_master_weights,
)
from prefopt.pages import counted
from prefopt.scoring.logprobs import has_scoring_path
from prefopt.scoring.plan import fewest_micro_batches
from prefopt.trainers.checkpointing import recomputation_of, settle_mode
from prefopt.trainers.policy import base_model_of

NOTHING_ON_CPU = "Checkpointing: none (auto: nothing is recomputed on a CPU)."


def settle(trainer: Any) -> None:
    """Settle `tokens_per_micro_batch` and `checkpointing` of a trainer that knows its layout; all ranks call it."""
    args = trainer.args
    if trainer.train_dataset is None:
        if args.checkpointing == "auto":
            settle_mode(args, Recomputation("none"))
        return
    if args.checkpointing == "selective" and trainer.is_deepspeed_enabled:
        ways_of(args, run_of(trainer))
    decides = args.checkpointing == "auto" or args.tokens_per_micro_batch == "auto"
    card = card_bytes(args.device) if decides else None
    lines = [] if args.tokens_per_micro_batch is None else _settle_tokens(trainer, card)
    if args.checkpointing == "auto":
        lines.append(_settle_checkpointing(trainer, card))
    if trainer.is_world_process_zero():
        for line in lines:
            print(line, flush=True)


def card_bytes(device: torch.device) -> int | None:
    """Return the memory of the smallest card among the ranks; None on a CPU."""
    if device.type != "cuda":
        return None
    return min(gather_object([torch.cuda.get_device_properties(device).total_memory]))


def run_of(trainer: Any) -> Run:
    """Describe a trainer's run as the estimate needs it."""
    args = trainer.args
    base = base_model_of(trainer.model)
    run = Run(
        ModelShape.count(trainer.model),
        Launch.of(trainer.accelerator),
        dtype="float32" if base.dtype == torch.float32 else "bfloat16",
        bf16=args.bf16 or args.fp16,
        optimizer=args.optim,
        four_bit=bool(getattr(base, "is_loaded_in_4bit", False)),
        keeps_reference=trainer.keeps_reference,
        fused=args.use_liger_kernel,
        accumulates=args.gradient_accumulation_steps > 1 or args.tokens_per_micro_batch is not None,
        scores_tokens=has_scoring_path(base),
    )
    return with_master_weights(run, args.master_weights, available=card_bytes(args.device))


def _settle_tokens(trainer: Any, card: int | None) -> list[str]:
    """Divide the optimizer step into micro-batches of tokens; return lines to print."""
    args = trainer.args
    tokens = args.tokens_per_micro_batch
    if tokens == "auto":
        if card is None:
            args.tokens_per_micro_batch = None
            return ["Micro-batches keep `per_device_train_batch_size` (`tokens_per_micro_batch: auto` on a CPU)."]
        run = run_of(trainer)
        args.tokens_per_micro_batch = tokens = choose_tokens(run, ways_of(args, run), available=card)
    epochs = 1 if args.max_steps > 0 else max(1, round(args.num_train_epochs))
    count, heaviest = fewest_micro_batches(trainer.training_plan, tokens, epochs=epochs)
    trainer.divide_step(count)
    lines = [
        f"Each optimizer step of {trainer.groups_per_step} examples runs as "
        f"{counted(count, 'micro-batch', 'micro-batches')} on each of "
        f"{counted(args.world_size, 'process', 'processes')}, of up to {heaviest:,} tokens "
        f"(`tokens_per_micro_batch: {tokens}`)."
    ]
    if heaviest > tokens:
        lines.append(f"A single example has more tokens than that: the largest micro-batch holds {heaviest:,}.")
    return lines


def _settle_checkpointing(trainer: Any, card: int | None) -> str:
    """Choose what is recomputed; return a line that says what and why."""
    args = trainer.args
    if card is None:
        settle_mode(args, Recomputation("none"))
        return NOTHING_ON_CPU
    run = run_of(trainer)
    tokens = trainer.training_plan().heaviest()
    way = choose_recomputation(run, ways_of(args, run), tokens=tokens, scored_tokens=tokens, available=card)
    settle_mode(args, way)
    return explain(run, way, tokens=tokens, card=card)


def explain(run: Run, way: Recomputation, *, tokens: int, card: float, scored_tokens: int | None = None) -> str:
    """Say in one line what "auto" has chosen, and why."""
    sizes = {
        each: estimate(run, each, tokens=tokens, scored_tokens=scored_tokens or tokens).total / GIB
        for each in (way, Recomputation("none"))
    }
    room = f"{USABLE * card / GIB:.0f} GiB of the card's {card / GIB:.0f} may be filled"
    line = f"Checkpointing: {way} (auto: about {sizes[way]:.1f} GiB with micro-batches of {tokens:,} tokens; {room}"
    if way.mode != "none":
        line += f"; without recomputation {sizes[Recomputation('none')]:.1f} GiB"
    return line + ")."


def ways_of(args: Any, run: Run) -> list[Recomputation]:
    """List what a config lets "auto" choose, the cheapest first: its own mode alone, or all that its options allow.

    Raises:
        ValueError: `checkpointing: selective` under ZeRO-3.
    """
    if args.checkpointing == "selective" and run.launch.zero_stage == 3:
        raise ValueError(
            "`checkpointing: selective` does not work under ZeRO-3, which gathers weights within a layer: use auto, "
            "every_n or all."
        )
    if args.checkpointing != "auto":
        return [recomputation_of(args)]
    # selective recomputation takes none of the options that a recipe may set
    options = {name: value for name, value in (args.gradient_checkpointing_kwargs or {}).items() if value}
    return recomputations(run.shape.layers, selective=not options and run.launch.zero_stage != 3)
