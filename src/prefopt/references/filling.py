"""Score what the cache does not hold yet, on all processes, and read all of it back.

Every rank runs the same number of forwards, as ZeRO-3 and FSDP need; a rank with nothing left to score repeats a batch
and throws the result away. Letters: C completions, N pairs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, broadcast_object_list, gather_object
from datasets import Dataset
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from prefopt._trl import prepare_deepspeed
from prefopt.models.heads import load_whole
from prefopt.progress import Progress
from prefopt.references.cache import SIDES, ScoreCache, Scores, ids_digest
from prefopt.scoring.attention import restore_attention
from prefopt.scoring.layouts import Group, Layout
from prefopt.scoring.logprobs import install_scoring, score_completions
from prefopt.waiting import announced_wait

ScoreGroups = Callable[[Sequence[Group]], torch.Tensor]
"""Groups to the summed log-probs (C,) of their completions, in group order."""

SHARED_FOLDER_WAIT = 60.0  # seconds until files of other nodes must be visible


@dataclass(frozen=True)
class UnscoredGroup:
    """A prompt and its completions without a score: of each its key, the bytes of its text and a digest of its ids."""

    group: Group
    keys: tuple[bytes, ...]
    num_bytes: tuple[int, ...]
    ids: tuple[int, ...]

    @property
    def lengths(self) -> list[int]:
        """Tokens of prompt and completion together, for each completion."""
        return [len(self.group.prompt) + len(completion) for completion in self.group.completions]


def unscored_groups(
    pairs: Dataset, keys: Sequence[Sequence[bytes]], unscored: Sequence[np.ndarray]
) -> list[UnscoredGroup]:
    """Collect the completions to score, one group a pair.

    Args:
        pairs: N tokenised pairs.
        keys: for chosen and for rejected, the N keys of their records.
        unscored: for chosen and for rejected, (N,) bool.
    """
    read = ["prompt_ids", *(f"{side}_{part}" for side in SIDES for part in ("ids", "bytes", "skipped"))]
    pairs = pairs.select_columns([name for name in read if name in pairs.column_names])
    groups = []
    for row in np.flatnonzero(unscored[0] | unscored[1]).tolist():
        pair, sides = pairs[row], [side for side in (0, 1) if unscored[side][row]]
        group = Group.of_pair(pair, [SIDES[side] for side in sides])
        groups.append(
            UnscoredGroup(
                group,
                keys=tuple(keys[side][row] for side in sides),
                num_bytes=tuple(int(pair[f"{SIDES[side]}_bytes"]) for side in sides),
                ids=tuple(ids_digest(group.prompt, ids) for ids in group.completions),
            )
        )
    return groups


def pair_lengths(pairs: Dataset) -> np.ndarray:
    """Count the tokens of tokenised pairs: (3, N) of prompt, prompt + chosen and prompt + rejected."""
    prompt, *sides = (np.array([len(ids) for ids in pairs[f"{part}_ids"]]) for part in ("prompt", *SIDES))
    return np.stack([prompt, *(prompt + side for side in sides)])


def group_scorer(
    model: nn.Module,
    layout: Layout,
    *,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> ScoreGroups:
    """Return a function that scores groups with one forward of `model`, without gradient.

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
    """Return the indices of each batch's groups, longest first, at most `max_tokens` (or one group) a batch."""
    batches: list[list[int]] = []
    tokens = math.inf
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        if tokens + sizes[index] > max_tokens:
            batches.append([])
            tokens = 0
        batches[-1].append(index)
        tokens += sizes[index]
    return batches


def fill(
    cache: ScoreCache,
    groups: Sequence[UnscoredGroup],
    score: ScoreGroups,
    *,
    max_tokens: int,
    padded: bool,
    show_progress: bool = True,
) -> None:
    """Score the groups and write their records; all ranks call it with the same groups.

    Args:
        cache: where the records go, each rank's into its own files.
        groups: what to score.
        score: one forward.
        max_tokens: tokens of one forward, prompt counted once (packed) or once per completion (padded).
        padded: how tokens count.
        show_progress: on the main process, with rate and time left.

    Raises:
        ValueError: a score is not finite (on every rank, after the finite ones are written).
    """
    state = PartialState()
    sizes = [len(each.keys) * max(each.lengths) if padded else each.group.shared_length for each in groups]
    batches = plan_batches(sizes, max_tokens)
    bad: list[str] = []
    progress = Progress(
        sum(len(each.keys) for each in groups),
        f"Scoring under {cache.scorer.name}",
        unit="completions",
        shown=show_progress and state.is_main_process,
    )
    try:
        with progress:
            for first in range(0, len(batches), state.num_processes):
                place = first + state.process_index
                members = [groups[i] for i in batches[min(place, len(batches) - 1)]]
                logps = score([each.group for each in members])
                if place < len(batches):
                    bad += _record(cache, members, logps)
                of_all_ranks = batches[first : first + state.num_processes]
                progress.advance(sum(len(groups[i].keys) for batch in of_all_ranks for i in batch))
    finally:
        cache.flush()
    if state.num_processes > 1:
        bad = gather_object(bad)
    if bad:
        raise ValueError(
            f"{cache.scorer.name} gives {len(bad)} completions a log-prob that is not finite (the first: {bad[0]}): "
            "its weights are damaged, or the dtype is too narrow."
        )


def on_all_ranks(check: Callable[[], None]) -> None:
    """Run a check on every rank and raise its ValueError on all of them, so that none waits for the others."""
    faults = []
    try:
        check()
    except ValueError as error:
        faults.append(str(error))
    if PartialState().num_processes > 1:
        faults = gather_object(faults)
    if faults:
        raise ValueError(faults[0])


def _record(cache: ScoreCache, members: Sequence[UnscoredGroup], logps: torch.Tensor) -> list[str]:
    """Add the finite scores to the cache; return a description of each other one."""
    values, bad = iter(logps.tolist()), []
    for each in members:
        columns = zip(each.keys, each.group.scored, each.lengths, each.num_bytes, each.ids)
        for key, scored, length, size, ids in columns:
            value = next(values)
            if math.isfinite(value):
                cache.add(key, logps=value, tokens=len(scored), num_bytes=size, length=length, ids=ids)
            else:
                bad.append(f"{value} for {len(scored)} tokens after a prompt of {len(each.group.prompt)}")
    return bad


def shared_lookup(cache: ScoreCache, keys: Sequence[bytes], *, just_written: bool = False) -> Scores:
    """Look keys up on the main process and return the same records on every rank, even while other runs write.

    Args:
        cache: of one scorer.
        keys: of the records.
        just_written: all of them were written by `fill`; wait for those that other ranks wrote.

    Raises:
        ValueError: a file is damaged, or just written records do not appear in the main process's folder; raised on
            every rank.
    """
    state = PartialState()
    with announced_wait("the other ranks to score their share"):
        state.wait_for_everyone()
    answer: list[Scores | str] = [""]
    if state.is_main_process:
        try:
            patience = SHARED_FOLDER_WAIT if just_written and state.num_processes > 1 else 0.0
            answer = [_look_up(cache, keys, complete=just_written, patience=patience)]
        except ValueError as error:  # the other ranks wait for an answer
            answer = [str(error)]
    if state.num_processes > 1:
        broadcast_object_list(answer)
    if isinstance(answer[0], str):
        raise ValueError(answer[0])
    return answer[0]


def _look_up(cache: ScoreCache, keys: Sequence[bytes], *, complete: bool, patience: float) -> Scores:
    """Look keys up on disk; a network file system may show other nodes' files late."""
    deadline = time.monotonic() + patience
    while True:
        cache.refresh()
        scores = cache.lookup(keys)
        missing = int((~scores.found).sum())
        if not complete or not missing:
            return scores
        if time.monotonic() >= deadline:
            raise ValueError(
                f"{missing} of {len(keys)} scores that were just written are not in {cache.folder}: with several "
                "nodes the folder must be on a disk that all of them share."
            )
        time.sleep(1)


@dataclass(frozen=True)
class ReferenceModel:
    """A reference that is in memory; names and folders are given as strings instead."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def prepare_model(
    reference: str | ReferenceModel, *, dtype: str, accelerator: Accelerator | None
) -> tuple[nn.Module, PretrainedConfig]:
    """Return the model with its scoring path, frozen, on the device; and its config as loaded.

    Args:
        reference: a name, a folder, or a model in memory.
        dtype: to load a named one in.
        accelerator: under DeepSpeed, the one that shards the model.
    """
    device = PartialState().device
    if isinstance(reference, ReferenceModel):
        model = reference.model
    else:
        model = load_whole(AutoModelForCausalLM.from_pretrained, reference, dtype=getattr(torch, dtype))
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
