"""How good the policy is on some pairs right now: what Thompson sampling sees of a step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from datasets import Dataset

from prefopt.scoring.logprobs import CompletionScores, score_completions
from prefopt.scoring.plan import BatchPlan
from prefopt.trainers.collators import PlannedBatches

if TYPE_CHECKING:
    from prefopt.trainers.multi_reference import MultiReferenceDPOTrainer


def measure_policy(trainer: MultiReferenceDPOTrainer, dataset: Dataset, *, metric: str) -> float:
    """The mean metric over `dataset`, the same on every rank; all ranks call it and share the work.

    Args:
        trainer: training; its step's model is scored, in evaluation mode and without gradient.
        dataset: tokenised pairs with the references' scores.
        metric: "accuracy": whether log pi per token of the chosen completion is higher; "loss": minus the DPO loss against all
            references alike. More is better.
    """
    lengths = trainer.collate.lengths(dataset, share_prompt=trainer.args.share_prompt)
    size = trainer.args.per_device_eval_batch_size
    plan = BatchPlan(
        lengths,
        groups_per_micro_batch=size,
        world_size=trainer.args.world_size,
        rank=trainer.args.process_index,
        max_tokens_per_row=trainer._row_capacity(lengths, size),
        shuffle=False,
    )
    batches, model = PlannedBatches(dataset, trainer.collate, trainer.layout), trainer.step_model
    total = torch.zeros((), dtype=torch.float64, device=trainer.args.device)
    training = model.training
    model.eval()
    for (micro_batch,) in plan:
        batch = trainer._prepare_inputs(batches[micro_batch])
        with torch.no_grad(), trainer.compute_loss_context_manager():
            scores = score_completions(
                model, batch, attn_implementation=trainer.attn_implementation, dtype=trainer.model.dtype
            )
            merit = _accuracy(scores) if metric == "accuracy" else _minus_loss(trainer, scores, batch)
        total += torch.where(batch["real"], merit, 0.0).sum()
    model.train(training)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.item() / len(dataset)


def _accuracy(scores: CompletionScores) -> torch.Tensor:
    means = scores.logps / scores.counts
    return (means[0::2] > means[1::2]).float()


def _minus_loss(trainer: MultiReferenceDPOTrainer, scores: CompletionScores, batch: dict[str, Any]) -> torch.Tensor:
    reference = trainer.reference_scores(batch)
    pair = trainer.pair_scores(scores, reference, batch)
    margins = pair.chosen_logps - pair.rejected_logps
    margins = margins - (reference.chosen_logps - reference.rejected_logps).mean(dim=0)
    return torch.nn.functional.logsigmoid(trainer.args.beta * margins)
