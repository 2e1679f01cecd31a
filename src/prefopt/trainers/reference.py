"""The reference of a pair trainer: a frozen module, the policy without its adapter, or scores that were kept on disk."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel

from prefopt._transformers import attention_of
from prefopt._trl import prepare_deepspeed, prepare_fsdp
from prefopt.data.rows import REFERENCE_COLUMNS
from prefopt.references.cache import default_folder
from prefopt.references.columns import cached_reference_scores, token_scorer
from prefopt.references.filling import group_scorer
from prefopt.scoring.logprobs import install_scoring, score_completions
from prefopt.trainers.base import CPU_ROW_TOKENS
from prefopt.trainers.config import PreferenceConfig
from prefopt.trainers.pair_losses import REFERENCE_FREE_LOSSES
from prefopt.trainers.policy import REFERENCE_ADAPTER, base_model_of, frozen_copy, load_model

if TYPE_CHECKING:
    from prefopt.trainers.preference import PreferenceTrainer

LARGEST_LOGP = 0.01  # 0, and room for rounding in bfloat16
GPU_ROW_TOKENS = 16384
"""Tokens of one forward of the reference pass on a GPU: no gradient is kept, so it can be larger than a training row."""


class Reference:
    """Scores micro-batches under the reference.

    Args:
        trainer: whose policy holds the reference where there is no module.
        module: a frozen model with its scoring path, not yet sharded; None: the policy with its adapter off, or with
            the frozen copy of
            an adapter that it was given with.
    """

    def __init__(self, trainer: PreferenceTrainer, module: nn.Module | None) -> None:
        self.trainer = trainer
        self.config = None if module is None else base_model_of(module).config
        self.module = None if module is None else self._shard(module)

    def _shard(self, module: nn.Module) -> nn.Module:
        accelerator = self.trainer.accelerator
        if self.trainer.is_deepspeed_enabled:
            return prepare_deepspeed(module, accelerator)
        if self.trainer.is_fsdp_enabled:
            return prepare_fsdp(module, accelerator)
        return accelerator.prepare_model(module, evaluation_mode=True)

    def logps(self, batch: dict[str, Any]) -> torch.Tensor:
        """(C,) float32 summed log-probs of the batch's completions."""
        trainer = self.trainer
        with torch.no_grad(), self.in_place(trainer.model_wrapped) as (model, config):
            return score_completions(
                model, batch, attn_implementation=attention_of(config), dtype=trainer.model.dtype
            ).logps

    @contextlib.contextmanager
    def in_place(self, wrapped_policy: nn.Module) -> Iterator[tuple[nn.Module, Any]]:
        """The model to score with, and its config, while the context is open."""
        if self.module is not None:
            yield self.module, self.config
            return
        policy = self.trainer.accelerator.unwrap_model(self.trainer.model)
        training = policy.training
        policy.eval()  # neither dropout nor checkpointing
        try:
            with adapter_of_reference(policy):
                yield wrapped_policy, policy.config
        finally:
            policy.train(training)


def reference_module(
    model: str | nn.Module,
    loaded: PreTrainedModel | PeftModel,
    ref_model: PreTrainedModel | None,
    args: PreferenceConfig,
    quantization_config: Any,
    peft_config: PeftConfig | None,
) -> PreTrainedModel | None:
    """The reference as a module of its own, or None where the policy holds it, its scores are cached, or no loss reads it.

    Args:
        model: what the user gave as the policy, a name or a module.
        loaded: the same, loaded.
        ref_model, args, quantization_config, peft_config: the trainer's arguments.

    Raises:
        ValueError: a reference that no loss would read.
    """
    free = set(args.loss_type) <= set(REFERENCE_FREE_LOSSES)
    if ref_model is not None:
        if free:
            raise ValueError(
                f"`ref_model` would not be used: {', '.join(args.loss_type)} has no reference. Leave it out."
            )
        install_scoring(base_model_of(ref_model))
        return ref_model.requires_grad_(False).eval()
    if args.precompute_ref_log_probs or free or peft_config is not None or isinstance(loaded, PeftModel):
        return None
    if isinstance(model, str) and args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3:
        reference = load_model(model, args, quantization_config)  # the policy's weights are sharded already
        install_scoring(reference)
        return reference.requires_grad_(False).eval()
    return frozen_copy(loaded)


@contextlib.contextmanager
def adapter_of_reference(policy: nn.Module) -> Iterator[None]:
    """While open, a policy scores as its reference does; a policy without an adapter is its own reference until it trains."""
    if not isinstance(policy, PeftModel):
        yield
        return
    if REFERENCE_ADAPTER not in policy.peft_config:
        with policy.disable_adapter():
            yield
        return
    active = policy.active_adapter
    policy.set_adapter(REFERENCE_ADAPTER, inference_mode=True)
    try:
        yield
    finally:
        policy.set_adapter(active)


def check_given_scores(dataset: Dataset, name: str) -> None:
    """Refuse reference scores that came with the data and cannot be those of its completions.

    Args:
        dataset: tokenised pairs.
        name: what messages call it.

    Raises:
        ValueError: a score is missing, is no log-prob, is one of several references', or was taken of another number
            of tokens.
    """
    for side in ("chosen", "rejected"):
        column, counts = f"ref_{side}_logps", f"ref_{side}_counts"
        if column not in dataset.column_names:
            continue
        tokens = dataset[counts] if counts in dataset.column_names else [None] * len(dataset)
        for row, (score, count, ids) in enumerate(zip(dataset[column], tokens, dataset[f"{side}_ids"])):
            if isinstance(score, list) and len(score) > 1:
                raise ValueError(
                    f"The {name} data has the scores of several references in {column}: keep those of the one that "
                    "this run starts "
                    "from, or use `multi-reference-dpo`, which takes several."
                )
            score, count = (value[0] if isinstance(value, list) and value else value for value in (score, count))
            wrong = ""
            if not isinstance(score, (int, float)):
                wrong = f"has no {column}, though others have"
            elif not -math.inf < score <= LARGEST_LOGP:
                wrong = f"has {column} {score:g}, which is no sum of log-probs"
            elif count is not None and count != len(ids):
                wrong = (
                    f"has {column} of {count:g} tokens and {len(ids)} tokens to score: these are scores of other "
                    "data, or of other lengths"
                )
            if wrong:
                raise ValueError(
                    f"Row {row} of the {name} data {wrong}. Give every row its scores, or leave the columns out and "
                    "they are computed."
                )


def with_reference_scores(
    trainer: PreferenceTrainer, datasets: dict[str, Dataset], module: nn.Module | None
) -> dict[str, Dataset]:
    """The data sets with the columns of cached reference scores; what the cache lacks is scored now, by all ranks.

    Args:
        trainer: built, not yet training.
        datasets: tokenised pairs by name; one that has the columns is left as it is.
        module: the reference, or None: the policy's present weights are.

    Returns:
        The data sets under the same names.
    """
    missing = {
        name: dataset
        for name, dataset in datasets.items()
        if not set(REFERENCE_COLUMNS[:2]) <= set(dataset.column_names)
    }
    if not missing:
        return datasets
    args, accelerator = trainer.args, trainer.accelerator
    model = module if module is not None else trainer.model
    base = base_model_of(model)
    dtype = str(base.dtype).removeprefix("torch.")
    if accelerator.mixed_precision != "no":
        dtype = f"{dtype}/{accelerator.mixed_precision}"
    adapter = None
    if isinstance(model, PeftModel):
        own = REFERENCE_ADAPTER if REFERENCE_ADAPTER in model.peft_config else None
        adapter = own if module is None else model.active_adapter
    scorer = token_scorer(
        model, base.config, name=base.config.name_or_path or "in memory", dtype=dtype, adapter=adapter
    )
    longest = max(group.packed for dataset in missing.values() for group in trainer.lengths(dataset))
    tokens = max(longest, CPU_ROW_TOKENS if args.device.type == "cpu" else GPU_ROW_TOKENS)
    folder = Path(args.ref_logps_dir) if args.ref_logps_dir else default_folder()
    engine = prepare_deepspeed(model, accelerator) if trainer.is_deepspeed_enabled else model.to(args.device)
    score = group_scorer(
        engine,
        base.config,
        trainer.layout,
        device=args.device,
        dtype=base.dtype,
        row_length=-(-tokens // 128) * 128 if args.device.type == "cuda" else None,
        autocast=accelerator.autocast,
    )
    done = dict(datasets)
    with adapter_of_reference(model) if module is None else contextlib.nullcontext():
        for name, dataset in missing.items():
            done[name], scored = cached_reference_scores(
                dataset, score, scorer, folder, max_tokens=tokens, padded=trainer.layout.name == "padded"
            )
            if trainer.is_world_process_zero():
                read = 2 * len(dataset) - scored
                print(f"Reference scores of the {name} data: {read} read from {folder}, {scored} scored now.")
    if engine is not model:
        engine.destroy()
    return done
