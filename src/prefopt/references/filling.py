"""Score what the cache does not hold yet, on all processes, and read all of it back.

Every rank runs the same number of forwards, as ZeRO-3 and FSDP need; a rank with nothing left to score repeats a batch
and throws the result away. Letters: C completions.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, broadcast_object_list, gather_object
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
from prefopt.references.cache import ScoreCache, Scores
from prefopt.scoring.attention import restore_attention
from prefopt.scoring.layouts import Group, Layout
from prefopt.scoring.logprobs import install_scoring, score_completions

logger = logging.getLogger(__name__)

ScoreGroups = Callable[[Sequence[Group]], torch.Tensor]
"""Groups to the summed log-probs (C,) of their completions, in group order."""

SHARED_FOLDER_WAIT = 60.0  # seconds until files of other nodes must be visible


@dataclass(frozen=True)
class Job:
    """One group to be scored: for each completion its key, the bytes of its text and a digest of its ids."""

    group: Group
    keys: tuple[bytes, ...]
    num_bytes: tuple[int, ...]
    ids: tuple[int, ...]

    def lengths(self) -> list[int]:
        """Tokens of prompt and completion together, for each completion."""
        return [len(self.group.prompt) + len(completion) for completion in self.group.completions]


def group_scorer(
    model: nn.Module,
    layout: Layout,
    *,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> ScoreGroups:
    """A function that scores groups with one forward of `model`, without gradient.

    Args:
        model: prepared by `install_scoring`, wrapped or not; its mode (dropout) is set to eval for the forward.
        layout: how groups become rows; a packed batch is one row.
        device: where the model takes its inputs.
        autocast: context of the forward.
    """

    def score(groups: Sequence[Group]) -> torch.Tensor:
        batch = {name: value.to(device) for name, value in layout.collate([list(groups)]).items()}
        training = model.training
        model.eval()
        with torch.no_grad(), autocast():
            scores = score_completions(model, batch)
        model.train(training)
        restore_attention(model)
        return scores.logps.float().cpu()

    return score


def plan_batches(sizes: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices of the groups of each batch, longest first, at most `max_tokens` (or one group) a batch."""
    batches: list[list[int]] = []
    tokens = math.inf
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        if tokens + sizes[index] > max_tokens:
            batches.append([])
            tokens = 0
        batches[-1].append(index)
        tokens += sizes[index]
    return batches


def fill(cache: ScoreCache, jobs: Sequence[Job], score: ScoreGroups, *, max_tokens: int, padded: bool) -> int:
    """Score the jobs and write their records; all ranks call it with the same jobs.

    Args:
        cache: where the records go, each rank's into files of its own.
        jobs: what to score.
        score: one forward.
        max_tokens: tokens of one forward, prompt counted once (packed) or once per completion (padded).
        padded: how tokens count.

    Returns:
        The number of forwards that each rank ran.

    Raises:
        ValueError: a score is not finite (on every rank, after the finite ones are written).
    """
    state = PartialState()
    sizes = [len(job.keys) * max(job.lengths()) if padded else job.group.shared_length for job in jobs]
    batches = plan_batches(sizes, max_tokens)
    rounds = math.ceil(len(batches) / state.num_processes)
    started = told = time.monotonic()
    bad: list[str] = []
    try:
        for number in range(rounds):
            place = number * state.num_processes + state.process_index
            members = [jobs[i] for i in batches[min(place, len(batches) - 1)]]
            logps = score([job.group for job in members])
            if place < len(batches):
                bad += _record(cache, members, logps)
            if state.is_main_process and time.monotonic() - told > 30:
                told = time.monotonic()
                logger.info(
                    "%s: %d of %d batches scored in %.0f s", cache.scorer.name, number + 1, rounds, told - started
                )
    finally:
        cache.flush()
    if state.num_processes > 1:
        bad = gather_object(bad)
    if bad:
        raise ValueError(
            f"{cache.scorer.name} gives {len(bad)} completions a log-prob that is not finite (the first: {bad[0]}): "
            "its "
            "weights are damaged, or the dtype is too narrow."
        )
    return rounds


def _record(cache: ScoreCache, members: Sequence[Job], logps: torch.Tensor) -> list[str]:
    """Give the cache the finite scores; returns a description of each other one."""
    values, bad = iter(logps.tolist()), []
    for job in members:
        for key, completion, length, size, ids in zip(
            job.keys, job.group.completions, job.lengths(), job.num_bytes, job.ids
        ):
            value = next(values)
            if math.isfinite(value):
                cache.add(key, logps=value, tokens=len(completion), num_bytes=size, length=length, ids=ids)
            else:
                bad.append(f"{value} for {len(completion)} tokens after a prompt of {len(job.group.prompt)}")
    return bad


def shared_lookup(cache: ScoreCache, keys: Sequence[bytes]) -> Scores:
    """What the main process finds of `keys`, the same on every rank even while other runs write.

    Raises:
        ValueError: a file of the cache is damaged.
    """
    return _from_main(lambda: _look(cache, keys))


def read_all(cache: ScoreCache, keys: Sequence[bytes]) -> Scores:
    """The records of `keys` after `fill`, as the main process reads them, the same arrays on every rank.

    Raises:
        ValueError: a file is damaged, or records that other ranks wrote do not appear in the main process's folder.
    """
    patience = SHARED_FOLDER_WAIT if PartialState().num_processes > 1 else 0.0
    return _from_main(lambda: _wait_for(cache, keys, patience=patience))


def _from_main(read: Callable[[], Scores]) -> Scores:
    """What `read` gives on the main process, once all ranks are here; an error of it is raised on all of them."""
    state = PartialState()
    state.wait_for_everyone()
    answer: list[Scores | str] = [""]
    if state.is_main_process:
        try:
            answer = [read()]
        except ValueError as error:  # the other ranks wait for an answer
            answer = [str(error)]
    if state.num_processes > 1:
        broadcast_object_list(answer)
    if isinstance(answer[0], str):
        raise ValueError(answer[0])
    return answer[0]


def _look(cache: ScoreCache, keys: Sequence[bytes]) -> Scores:
    cache.refresh()
    return cache.lookup(keys)


def _wait_for(cache: ScoreCache, keys: Sequence[bytes], *, patience: float) -> Scores:
    """All records of `keys`; a network file system may show other nodes' files late."""
    deadline = time.monotonic() + patience
    while True:
        scores = _look(cache, keys)
        missing = int((~scores.found).sum())
        if not missing:
            return scores
        if time.monotonic() >= deadline:
            raise ValueError(
                f"{missing} of {len(keys)} scores that were just written are not in {cache.folder}: with several "
                "nodes "
                "the folder must be on a disk that all of them share."
            )
        time.sleep(1)


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
    reference: str | ReferenceModel, *, dtype: str, accelerator: Accelerator | None
) -> tuple[nn.Module, PretrainedConfig]:
    """The model with its scoring path, frozen, on the device; and its config as loaded.

    Args:
        reference: a name, a folder, or a model in memory.
        dtype: to load a named one in.
        accelerator: under DeepSpeed, the one that shards the model.
    """
    device = PartialState().device
    if isinstance(reference, ReferenceModel):
        model = reference.model
    else:
        options: dict[str, Any] = {"dtype": getattr(torch, dtype)}
        model = AutoModelForCausalLM.from_pretrained(reference, **options)
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
