"""Losses, weights and mixtures as pure functions of tensors; torch only, nothing else imported.

Data is positional, hyperparameters are keywords, and results are unreduced, (B,), unless a function says otherwise.
Half-precision inputs are computed in float32; float64 stays float64.
"""

from prefopt.losses.multi_reference import clip_to_anchor, forward_kl_loss, mixture_logps, multi_dpo_loss
from prefopt.losses.pairwise import (
    anchored_down_loss,
    anchored_zero_loss,
    aot_loss,
    aot_unpaired_loss,
    bco_pair_loss,
    discopop_loss,
    dpo_loss,
    exo_pair_loss,
    hinge_loss,
    ipo_loss,
    nca_pair_loss,
    robust_dpo_loss,
    sigmoid_norm_loss,
    simpo_loss,
    wpo_pair_weights,
)
from prefopt.losses.reward import (
    adversarial_reward_loss,
    bradley_terry_loss,
    general_preference_loss,
    general_preference_score,
    ranking_loss,
    rrhf_loss,
)
from prefopt.losses.self_play import gpo_loss, sppo_hard_loss, sppo_loss, sppo_single_loss

__all__ = [
    "adversarial_reward_loss",
    "anchored_down_loss",
    "anchored_zero_loss",
    "aot_loss",
    "aot_unpaired_loss",
    "bco_pair_loss",
    "bradley_terry_loss",
    "clip_to_anchor",
    "discopop_loss",
    "dpo_loss",
    "exo_pair_loss",
    "forward_kl_loss",
    "general_preference_loss",
    "general_preference_score",
    "gpo_loss",
    "hinge_loss",
    "ipo_loss",
    "mixture_logps",
    "multi_dpo_loss",
    "nca_pair_loss",
    "ranking_loss",
    "robust_dpo_loss",
    "rrhf_loss",
    "sigmoid_norm_loss",
    "simpo_loss",
    "sppo_hard_loss",
    "sppo_loss",
    "sppo_single_loss",
    "wpo_pair_weights",
]
