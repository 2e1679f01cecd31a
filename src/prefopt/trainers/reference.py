"""The reference of a pair trainer: a frozen module, the policy without its adapter, or scores cached on disk."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel

from prefopt._trl import prepare_deepspeed
from prefopt.data.rows import REFERENCE_COLUMNS
from prefopt.references.cache import default_folder
from prefopt.references.columns import cached_reference_scores, token_scorer
from prefopt.references.filling import group_scorer
from prefopt.references.fingerprints import module_fingerprint
from prefopt.scoring.layouts import Layout
from prefopt.scoring.logprobs import install_scoring, score_completions
from prefopt.trainers.config import PreferenceConfig
from prefopt.trainers.pair_losses import REFERENCE_FREE_LOSSES
from prefopt.trainers.policy import REFERENCE_ADAPTER, base_model_of, frozen_copy, load_model
from prefopt.trainers.sharding import is_fsdp, shard

LARGEST_LOGP = 0.01  # 0, and room for rounding in bfloat16
CPU_ROW_TOKENS, GPU_ROW_TOKENS = 1024, 16384
"""Tokens of one forward of the reference pass: no gradient is kept, so it can exceed a training row."""


class Reference:
    """Scores micro-batches under the reference.

    Args:
        module: a frozen model with its scoring path, not yet sharded; None: the policy with its adapter off, or with
            the frozen copy of an adapter that it was given with.
        policy: the policy, not yet wrapped.
        accelerator: shards or moves `module` as it does the policy.
    """

    def __init__(
        self, module: PreTrainedModel | PeftModel | None, policy: PreTrainedModel | PeftModel, accelerator: Accelerator
    ) -> None:
        self.policy = policy
        self._config = base_model_of(module or policy).config
        self._adapter = None if module is None else _scoring_adapter(module, is_policy=False)
        self.module = None if module is None else shard(module, accelerator)

    def fingerprint(self) -> str:
        """Hash the module's config and weights; all ranks call it."""
        assert self.module is not None
        return module_fingerprint(self.module, self._config, adapter=self._adapter)

    def logps(self, batch: dict[str, Any], wrapped_policy: nn.Module) -> torch.Tensor:
        """Return the summed log-probs (C,) float32 of the batch's completions."""
        with torch.no_grad(), self._scoring_model(wrapped_policy) as model:
            return score_completions(model, batch).logps

    @contextlib.contextmanager
    def _scoring_model(self, wrapped_policy: nn.Module) -> Iterator[nn.Module]:
        if self.module is not None:
            yield self.module
            return
        training = self.policy.training
        self.policy.eval()  # neither dropout nor checkpointing
        try:
            with adapter_of_reference(self.policy):
                yield wrapped_policy
        finally:
            self.policy.train(training)


def reference_module(
    model: str | nn.Module,
    loaded: PreTrainedModel | PeftModel,
    ref_model: PreTrainedModel | PeftModel | None,
    args: PreferenceConfig,
    quantization_config: Any,
    peft_config: PeftConfig | None,
) -> PreTrainedModel | PeftModel | None:
    """Return the reference as a separate module, or None where the policy holds it, it is cached, or no loss reads it.

    Args:
        model: the policy as the user gave it, a name or a module.
        loaded: the same, loaded.
        ref_model: the user's reference, or None.
        args: the trainer's config.
        quantization_config: for loading the policy by name.
        peft_config: the adapter that the policy will get.

    Raises:
        ValueError: `ref_model` was given and no loss reads it.
    """
    no_reference = set(args.loss_type) <= set(REFERENCE_FREE_LOSSES)
    reference: PreTrainedModel | PeftModel
    if ref_model is not None:
        if no_reference:
            raise ValueError(
                f"`ref_model` would not be used: {', '.join(args.loss_type)} has no reference. Leave it out."
            )
        reference = ref_model
    elif args.precompute_ref_log_probs or no_reference or peft_config is not None or isinstance(loaded, PeftModel):
        return None
    elif isinstance(model, str) and args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3:
        reference = load_model(model, args, quantization_config)  # the policy's weights are sharded already
    else:
        return frozen_copy(loaded)
    install_scoring(base_model_of(reference))
    return reference.requires_grad_(False).eval()


@contextlib.contextmanager
def adapter_of_reference(policy: nn.Module) -> Iterator[None]:
    """Have a PEFT policy score as its reference (adapter off, or the frozen copy). No-op without an adapter."""
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
    """Check reference scores that came with the data.

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
        skipped = dataset[f"{side}_skipped"] if f"{side}_skipped" in dataset.column_names else [()] * len(dataset)
        columns = zip(dataset[column], tokens, dataset[f"{side}_ids"], skipped)
        for row, (score, count, ids, ranges) in enumerate(columns):
            scored = len(ids) - sum(end - begin for begin, end in ranges)
            if isinstance(score, list) and len(score) > 1:
                raise ValueError(
                    f"The {name} data has the scores of several references in {column}: keep those of the one that "
                    "this run starts from, or use `multi-reference-dpo`, which takes several."
                )
            score, count = (value[0] if isinstance(value, list) and value else value for value in (score, count))
            wrong = ""
            if score is None:
                wrong = f"has no {column}, though others have"
            elif not is_number(score):
                wrong = f"has {column} {score!r}, which is no number"
            elif not -math.inf < score <= LARGEST_LOGP:
                wrong = f"has {column} {score:g}, which is no sum of log-probs"
            elif count is not None and count != scored:
                wrong = (
                    f"has {column} of {count:g} tokens and {scored} tokens to score: these are scores of other "
                    "data, or of other lengths"
                )
            if wrong:
                raise ValueError(
                    f"Row {row} of the {name} data {wrong}. Give every row its scores, or leave the columns out and "
                    "they are computed."
                )


def is_number(value: object) -> bool:
    """Check whether a value is an int or a float; NaN and infinity are, True is not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def has_scores(dataset: Dataset) -> bool:
    """Check whether a dataset has both columns of reference scores."""
    return set(REFERENCE_COLUMNS[:2]) <= set(dataset.column_names)


def attach_scores(
    datasets: Mapping[str, Dataset],
    *,
    module: PreTrainedModel | PeftModel | None,
    policy: PreTrainedModel | PeftModel,
    args: PreferenceConfig,
    accelerator: Accelerator,
    layout: Layout,
    longest: int,
) -> tuple[dict[str, Dataset], str | None]:
    """Add the columns of cached reference scores to tokenised pairs; all ranks score what the cache lacks.

    Args:
        datasets: tokenised pairs by name; one that has the columns is returned unchanged.
        module: the reference, or None: the policy's present weights are.
        policy: the policy, not yet trained.
        args: the trainer's config.
        accelerator: the trainer's.
        layout: the trainer's.
        longest: tokens of the longest pair.

    Returns:
        The datasets under the same names, and the fingerprint of the weights that score; None where no scores were
        missing.
    """
    done = dict(datasets)
    missing = [name for name, dataset in datasets.items() if not has_scores(dataset)]
    if not missing:
        return done, None
    model = policy if module is None else module
    if is_fsdp(accelerator):  # before it shards a model, a rank may hold no weights
        sharded: Any = shard(frozen_copy(policy) if module is None else module, accelerator)
        model = sharded
    base = base_model_of(model)
    scorer = token_scorer(
        model,
        base.config,
        name=base.config.name_or_path or "in memory",
        dtype=_precision(base.dtype, accelerator),
        adapter=_scoring_adapter(model, is_policy=module is None),
    )
    tokens = max(longest, CPU_ROW_TOKENS if args.device.type == "cpu" else GPU_ROW_TOKENS)
    folder = Path(args.ref_logps_dir) if args.ref_logps_dir else default_folder()
    deepspeed = accelerator.state.deepspeed_plugin is not None
    engine: Any = prepare_deepspeed(model, accelerator) if deepspeed else model
    if not deepspeed and not is_fsdp(accelerator):
        engine = engine.to(args.device)
    score = group_scorer(
        engine,
        layout,
        device=args.device,
        autocast=accelerator.autocast,
    )
    with adapter_of_reference(model) if module is None else contextlib.nullcontext():
        for name in missing:
            done[name], scored = cached_reference_scores(
                datasets[name],
                score,
                scorer,
                folder,
                max_tokens=tokens,
                padded=layout.name == "padded",
                show_progress=not args.disable_tqdm,
            )
            if accelerator.is_main_process:
                read = 2 * len(datasets[name]) - scored
                print(f"Reference scores of the {name} data: {read} read from {folder}, {scored} scored now.")
    if deepspeed:
        engine.destroy()
    return done, scorer.weights


def _precision(dtype: torch.dtype, accelerator: Accelerator) -> str:
    """Return weights' dtype and autocast's, as the cache's keys hold them."""
    weights = str(dtype).removeprefix("torch.")
    return weights if accelerator.mixed_precision == "no" else f"{weights}/{accelerator.mixed_precision}"


def _scoring_adapter(model: nn.Module, *, is_policy: bool) -> str | None:
    """Return the name of the adapter that is on while `model` scores as the reference, or None."""
    if not isinstance(model, PeftModel):
        return None
    if is_policy:
        return REFERENCE_ADAPTER if REFERENCE_ADAPTER in model.peft_config else None
    return model.active_adapter
