"""WPO: pairs weighted by how likely the present policy is to write them.

The weight of a pair is

    w = min(exp(omega(chosen) + omega(rejected)), max_weight),   omega = mean_t [log p_t(y_t) - log sum_v p_t(v)^2]

without gradient, with p_t the policy's distribution at token t. It is computed in three steps: the model's forward
takes log p_t(y_t) and log sum_v p_t(v)^2 from one pass over the vocabulary and averages their difference over each
completion (`scoring.logprobs`, `mean_aligned_logps`); `losses.wpo_pair_weights` makes w of the two means; and
`PreferenceTrainer.pair_losses` multiplies each pair's loss by it. `weight_alignment` replaces log sum_v p_t(v)^2
by the largest log-probability ("greedy") or by nothing ("none").
"""

from __future__ import annotations

from dataclasses import dataclass

from prefopt.arguments import setting
from prefopt.trainers.config import PreferenceConfig
from prefopt.trainers.preference import PreferenceTrainer


@dataclass
class WPOConfig(PreferenceConfig):
    """Settings of `WPOTrainer`: weights are on and clamped at 1, as in the authors' code.

    `max_weight: null` removes the clamp, which is what TRL's `use_weighting` does.
    """

    beta: float = setting(0.01, "Strength of the pull towards the reference (0.01 in the paper's runs).")
    use_weighting: bool = setting(True, "Weigh each pair; False is DPO.")
    max_weight: float | None = setting(1.0, "Largest weight of a pair; null: no clamp, as in TRL.", above=0)


class WPOTrainer(PreferenceTrainer):
    """Weighted preference optimization: each pair's loss times exp(omega(chosen) + omega(rejected)).

    The weight is at most `max_weight`, comes from the forward pass that the loss needs anyway, and carries no
    gradient; any loss of `loss_type` can be weighted.

    Example:
    ```python
    trainer = WPOTrainer("Qwen/Qwen2.5-0.5B-Instruct", args=WPOConfig("out"), train_dataset=dataset)
    trainer.train()
    ```

    Reference: arXiv 2406.11827.
    """

    config_class = WPOConfig
    _name = "WPO"
    _tag_names = ("prefopt", "wpo")
    _paper = {  # noqa: RUF012
        "title": "WPO: Enhancing RLHF with Weighted Preference Optimization",
        "id": "2406.11827",
        "citation": """
@inproceedings{zhou2024wpo,
    title     = {WPO: Enhancing RLHF with Weighted Preference Optimization},
    author    = {Zhou, Wenxuan and Agrawal, Ravi and Zhang, Shujian and Indurthi, Sathish Reddy and Zhao, Sanqiang
                 and Song, Kaiqiang and Xu, Silei and Zhu, Chenguang},
    booktitle = {EMNLP},
    year      = 2024,
}""",
    }

    @classmethod
    def check_settings(cls, args: PreferenceConfig) -> None:
        """Check that the weights are on; see `BaseTrainer.check_settings`."""
        super().check_settings(args)
        if not args.use_weighting:
            raise ValueError("`use_weighting: false` makes WPO plain DPO; use DPOTrainer (`prefopt dpo`) for that.")
