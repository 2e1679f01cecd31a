"""Rounds of self-play on a preference model's tables, as two experiments play them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.study.lab import Lab, pair_row
from benchmarks.study.results import Row
from prefopt import (
    DPOConfig,
    DPOTrainer,
    GeneralPreferenceConfig,
    GeneralPreferenceTrainer,
    SPPOConfig,
    SPPOTrainer,
    WPOConfig,
    WPOTrainer,
)
from prefopt.candidates.pairs import select_pairs
from prefopt.models.general_preference import preference_table

ITERATIONS = 3
SAMPLES = 5
# method -> trainer, its config, how pairs are picked
ALIGNERS: dict[str, tuple[type, type, str]] = {
    "sppo": (SPPOTrainer, SPPOConfig, "sppo"),
    "gpo": (SPPOTrainer, SPPOConfig, "gpo"),
    "dpo": (DPOTrainer, DPOConfig, "best_worst"),
    "wpo": (WPOTrainer, WPOConfig, "best_worst"),
}
READ_COLUMNS = {
    "sppo": ("chosen_win_prob", "rejected_win_prob"),
    "gpo": ("chosen_score", "rejected_score"),
}
# d, and the papers' tau of each
HEAD = {"general_preference": {"dim": 4, "temperature": 0.1}, "bradley_terry": {"temperature": 1.0}}


def train_ranker(
    lab: Lab,
    start: Any,
    rows: Sequence[Row],
    seed: int,
    *,
    loss_type: str,
    rate: float = 1.0,
    pooling: str = "eos",
) -> Any:
    """Train a preference model on the start policy's backbone."""
    return lab.train(
        GeneralPreferenceTrainer,
        GeneralPreferenceConfig,
        start,
        rows,
        num_train_epochs=4,
        seed=seed,
        learning_rate=rate * lab.scale.learning_rate,
        loss_type=loss_type,
        pooling=pooling,
        **HEAD[loss_type],
    ).model


def tables(lab: Lab, ranker: Any, prompts: Sequence[str], answers: Sequence[Sequence[str]]) -> list[torch.Tensor]:
    """Compute the table of logits of each prompt's answers."""
    pairs = [(prompt, text) for prompt, texts in zip(prompts, answers) for text in texts]
    values = lab.read(ranker, pairs).split([len(texts) for texts in answers])
    if hasattr(ranker, "embeddings"):
        return [preference_table(each, temperature=ranker.temperature) for each in values]
    return [each - each.T for each in values]


def train_round(
    lab: Lab, trainer: type, config: type, policy: Any, rows: Sequence[Row], *, beta: float, seed: int, **loss: Any
) -> Any:
    """Train a round on pairs of the policy's own samples, in smaller batches than from all pairs at once."""
    settings = {"beta": beta, "per_device_train_batch_size": 16, "seed": seed, "vocab_metrics": False, **loss}
    return lab.train(trainer, config, policy, rows, **settings).model


def play(
    lab: Lab,
    start: Any,
    ranker: Any,
    seed: int,
    *,
    method: str,
    beta: float,
    measure: Callable[[Any], Row],
    keep: Callable[[Sequence[str]], Sequence[str]] = list,
) -> list[Row]:
    """Train for some iterations, each on pairs of the policy's own samples; return what `measure` finds after each.

    The reference of an iteration is the policy that it starts from. `keep` filters the prompts.
    """
    trainer, config, picking = ALIGNERS[method]
    loss = {"loss_type": method} if method in READ_COLUMNS else {}
    policy, found = start, []
    for iteration in range(ITERATIONS):
        prompts = keep(lab.prompts(seed, lab.scale.prompts, skip=iteration * lab.scale.prompts))
        answers = lab.sample(policy, prompts, SAMPLES, seed=100 * seed + iteration)
        rows = []
        for prompt, texts, logits in zip(prompts, answers, tables(lab, ranker, prompts, answers)):
            for pair in select_pairs(texts, logits.double().numpy(), policy=picking):
                columns = {name: getattr(pair, name) for name in READ_COLUMNS.get(method, ())}
                rows.append(pair_row(prompt, texts[pair.chosen], texts[pair.rejected], **columns))
        policy = train_round(lab, trainer, config, policy, rows, beta=beta, seed=seed, **loss)
        found.append(measure(policy))
    return found
