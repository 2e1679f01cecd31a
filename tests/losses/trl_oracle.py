"""TRL's own loss code, run on given token log-probabilities: the trainers are real, the models are stubs."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import torch
from trl import DPOTrainer, RewardTrainer
from trl.experimental.cpo import CPOTrainer

PROMPT_LENGTH = 3
_ACCELERATOR = SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x)


def _rows(token_values: list[torch.Tensor], length: int) -> torch.Tensor:
    """Values of completion tokens at the places where they are predicted, zero elsewhere: (rows, length - 1)."""
    rows = torch.zeros(len(token_values), length - 1, dtype=token_values[0].dtype)
    for row, values in zip(rows, token_values, strict=True):
        row[PROMPT_LENGTH - 1 : PROMPT_LENGTH - 1 + len(values)] = values
    return rows


def trl_dpo_loss(
    loss_type: str,
    chosen_token_logps: list[torch.Tensor],
    rejected_token_logps: list[torch.Tensor],
    ref_chosen_logps: torch.Tensor,
    ref_rejected_logps: torch.Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    tau: float = 0.05,
    log_sum_sq_probs: list[torch.Tensor] | None = None,
) -> torch.Tensor:
    """The mean loss that `trl.DPOTrainer` computes; with `log_sum_sq_probs` (per token, chosen then rejected),
    weighted."""
    token_logps = [*chosen_token_logps, *rejected_token_logps]
    length = PROMPT_LENGTH + max(map(len, token_logps))
    completion_mask = torch.zeros(len(token_logps), length, dtype=torch.long)
    for row, values in zip(completion_mask, token_logps, strict=True):
        row[PROMPT_LENGTH : PROMPT_LENGTH + len(values)] = 1
    zeros = torch.zeros(len(token_logps), length - 1)
    outputs = SimpleNamespace(
        log_probs=_rows(token_logps, length),
        log_sum_sq_probs=None if log_sum_sq_probs is None else _rows(log_sum_sq_probs, length),
        entropy=zeros,
        mean_logits=zeros,
        is_top1=zeros.bool(),
    )
    trainer = object.__new__(DPOTrainer)
    trainer.__dict__.update(
        model=SimpleNamespace(training=False),  # evaluation: the same loss without the count of trained tokens
        accelerator=_ACCELERATOR,
        args=SimpleNamespace(discopop_tau=tau),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        beta=beta,
        label_smoothing=label_smoothing,
        loss_types=[loss_type],
        loss_weights=[1.0],
        use_weighting=log_sum_sq_probs is not None,
        _total_train_tokens=0,
        _metrics=defaultdict(lambda: defaultdict(list)),
    )
    inputs = {
        "input_ids": torch.ones_like(completion_mask),
        "attention_mask": torch.ones_like(completion_mask),
        "completion_mask": completion_mask,
        "ref_chosen_logps": ref_chosen_logps,
        "ref_rejected_logps": ref_rejected_logps,
    }
    return trainer._compute_loss(lambda **_: outputs, inputs, return_outputs=False)


def trl_simpo_losses(chosen_mean_logps: torch.Tensor, rejected_mean_logps: torch.Tensor, *, beta: float, gamma: float):
    """The unreduced SimPO losses of `trl.experimental.cpo.CPOTrainer`."""
    trainer = SimpleNamespace(
        alpha=0.0, loss_type="simpo", simpo_gamma=gamma, beta=beta, label_smoothing=0.0, accelerator=_ACCELERATOR
    )
    return CPOTrainer.cpo_loss(trainer, chosen_mean_logps, rejected_mean_logps)[0]


def trl_reward_loss(chosen_rewards: torch.Tensor, rejected_rewards: torch.Tensor, margin: torch.Tensor | None = None):
    """The mean loss that `trl.RewardTrainer` computes."""
    trainer = object.__new__(RewardTrainer)
    trainer.__dict__.update(
        model=SimpleNamespace(training=False),  # evaluation: the same loss without the count of trained tokens
        accelerator=_ACCELERATOR,
        args=SimpleNamespace(center_rewards_coefficient=None),
        _total_train_tokens=0,
        _metrics=defaultdict(lambda: defaultdict(list)),
    )
    outputs = SimpleNamespace(logits=torch.cat([chosen_rewards, rejected_rewards]).unsqueeze(-1))
    inputs = {} if margin is None else {"margin": margin}
    return trainer.compute_loss(lambda **_: outputs, inputs)
