"""What the pair trainers log of a micro-batch, under TRL's names where TRL has them."""

from __future__ import annotations

import torch

from prefopt.scoring.logprobs import CompletionScores
from prefopt.trainers.metrics import MetricSums
from prefopt.trainers.pair_losses import PairScores

SIDES = ("chosen", "rejected")


def record_pairs(
    sums: MetricSums, pair: PairScores, scores: CompletionScores, real: torch.Tensor, *, beta: float
) -> None:
    """Rewards, log-probs, lengths, and the vocabulary statistics where the scores have them.

    Args:
        sums: where the metrics are added.
        pair: (B,) scores of the pairs.
        scores: (2B,) scores of their completions, chosen and rejected in turn.
        real: (B,) False for a pair that only fills a micro-batch.
        beta: what turns log-ratios into rewards.
    """
    rewards = dict(zip(SIDES, (beta * pair.chosen_logratios, beta * pair.rejected_logratios)))
    logps = dict(zip(SIDES, (pair.chosen_logps, pair.rejected_logps)))
    counts = dict(zip(SIDES, (pair.chosen_counts, pair.rejected_counts)))
    sums.add_mean("rewards/margins", rewards["chosen"] - rewards["rejected"], real)
    sums.add_mean("rewards/accuracies", (rewards["chosen"] > rewards["rejected"]).float(), real)
    for offset, side in enumerate(SIDES):
        sums.add_mean(f"rewards/{side}", rewards[side], real)
        sums.add_mean(f"logps/{side}", logps[side], real)
        sums.add_mean(f"lengths/{side}", counts[side], real)
        if scores.entropy is not None:
            tokens = counts[side] * real
            sums.add_mean(f"logits/{side}", scores.mean_logits[offset::2] / counts[side], tokens)
            sums.add_mean("entropy", scores.entropy[offset::2] / counts[side], tokens)
    if scores.top1 is not None:
        sums.add_mean("mean_token_accuracy", scores.top1[0::2] / counts["chosen"], counts["chosen"] * real)


def record_weights(
    sums: MetricSums, weights: torch.Tensor, pair: PairScores, real: torch.Tensor, *, max_weight: float | None
) -> None:
    """Statistics of WPO's weights (B,); `effective_pairs` follows from the sums once they are reduced over ranks."""
    sums.add_mean("wpo/weight_mean", weights, real)
    sums.add_min("wpo/weight_min", weights, real)
    sums.add_max("wpo/weight_max", weights, real)
    kept = torch.where(real, weights, 0.0)
    sums.add_total("wpo/_sum", kept)
    sums.add_total("wpo/_sum_of_squares", kept.square())
    unclamped = (pair.chosen_mean_aligned_logps + pair.rejected_mean_aligned_logps).exp()
    clamped = unclamped > max_weight if max_weight is not None else torch.zeros_like(unclamped)
    sums.add_mean("wpo/clamped_fraction", clamped.float(), real)


def effective_pairs(values: dict[str, torch.Tensor]) -> None:
    """Replace the sums of weights by (sum of weights)^2 / sum of squared weights of the whole step."""
    if "wpo/_sum" in values:
        values["wpo/effective_pairs"] = values.pop("wpo/_sum").square() / values.pop("wpo/_sum_of_squares")
