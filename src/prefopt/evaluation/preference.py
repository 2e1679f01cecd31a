"""Preference accuracy of a model by itself, without a reference: chosen answers likelier than rejected ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset

from prefopt.data import tokenize_pairs
from prefopt.data.encoding import load_tokenizer
from prefopt.models.heads import head_kind
from prefopt.references.filling import ReferenceModel, group_scorer, plan_batches, prepare_model
from prefopt.scoring.layouts import Group
from prefopt.scoring.packing import choose_layout, nearest_to_probe, probe_group

GPU_TOKENS, CPU_TOKENS = 16384, 1024  # of one forward


@dataclass(frozen=True)
class PreferenceResult:
    """Accuracy and margin of a model on pairs, by log pi(y|x) alone.

    Attributes:
        accuracy: share of pairs with log pi(chosen) > log pi(rejected), summed over tokens.
        margin: mean of log pi(chosen) - log pi(rejected), nats.
        accuracy_per_token: the same of means over each answer's tokens, which length does not favour.
        margin_per_token: likewise.
        pairs: how many could be used.
    """

    accuracy: float
    margin: float
    accuracy_per_token: float
    margin_per_token: float
    pairs: int


def preference_accuracy(
    model: str | ReferenceModel,
    pairs: Dataset,
    *,
    max_length: int | None = None,
    dtype: str = "bfloat16",
    max_tokens: int | None = None,
) -> PreferenceResult:
    """Score the pairs under the model on all processes, each with a share and a copy of the model.

    Args:
        model: hub name, folder, or a model in memory.
        pairs: preference rows in any form that `prefopt.data` reads.
        max_length: tokens of prompt and answer; longer rows are cut.
        dtype: of the weights of a model that is loaded by name: bfloat16, float16 or float32.
        max_tokens: of one forward; default: 16384 on a GPU, 1024 on a CPU.

    Raises:
        ValueError: no row can be used.
    """
    if isinstance(model, str) and (kind := head_kind(model)) is not None:
        raise ValueError(
            f"{model} is a {kind} model, which gives no log-probs: compare answers with it as a `ranker`."
        )
    tokenizer = model.tokenizer if isinstance(model, ReferenceModel) else load_tokenizer(model)
    rows, _ = tokenize_pairs(pairs, tokenizer, max_length=max_length, name="evaluation")
    groups = [Group.of_pair(row) for row in rows]
    chosen, rejected = _logps(model, groups, tokenizer.pad_token_id, dtype=dtype, max_tokens=max_tokens)
    counts = np.array([[len(scored) for scored in group.scored] for group in groups], dtype=np.float64)
    margins, per_token = chosen - rejected, chosen / counts[:, 0] - rejected / counts[:, 1]
    return PreferenceResult(
        accuracy=float((margins > 0).mean()),
        margin=float(margins.mean()),
        accuracy_per_token=float((per_token > 0).mean()),
        margin_per_token=float(per_token.mean()),
        pairs=len(groups),
    )


def _logps(
    model: str | ReferenceModel, groups: Sequence[Group], pad_token_id: int, *, dtype: str, max_tokens: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Compute (N,) summed log-probs of chosen and of rejected, the same on every process."""
    state = PartialState()
    module, config = prepare_model(model, dtype=dtype, accelerator=None)
    longest = max(len(group.prompt) + len(completion) for group in groups for completion in group.completions)
    tried = groups[nearest_to_probe([group.shared_length for group in groups])]
    layout, _ = choose_layout(
        "auto",
        config,
        pad_token_id=pad_token_id,
        longest_sequence=longest,
        probe=lambda packed: probe_group(module, tried, packed, device=state.device),
    )
    score = group_scorer(module, layout, device=state.device)
    sizes = [group.shared_length if layout.name == "packed" else 2 * longest for group in groups]
    batches = plan_batches(sizes, max_tokens or (CPU_TOKENS if state.device.type == "cpu" else GPU_TOKENS))
    mine = []
    for round_ in range(0, len(batches), state.num_processes):  # every process runs as many forwards
        place = min(round_ + state.process_index, len(batches) - 1)
        logps = score([groups[index] for index in batches[place]])
        if round_ + state.process_index < len(batches):
            mine += list(zip(batches[place], logps[0::2].tolist(), logps[1::2].tolist()))
    found = sorted(gather_object(mine) if state.num_processes > 1 else mine)
    assert [index for index, _, _ in found] == list(range(len(groups)))
    return np.array([c for _, c, _ in found]), np.array([r for _, _, r in found])
