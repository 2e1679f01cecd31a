"""WPO: pairs weighted by how likely the present policy is to write them."""

from __future__ import annotations

from dataclasses import dataclass, field

from prefopt.trainers.config import PreferenceConfig
from prefopt.trainers.preference import PreferenceTrainer


@dataclass
class WPOConfig(PreferenceConfig):
    """Settings of `WPOTrainer`: weights are on and clamped at 1, as in the authors' code.

    `max_weight: null` removes the clamp, which is what TRL's `use_weighting` does.
    """

    beta: float = field(
        default=0.01, metadata={"help": "Strength of the pull towards the reference (0.01 in the paper's runs)."}
    )
    use_weighting: bool = field(default=True, metadata={"help": "Weigh each pair; False is DPO."})
    max_weight: float | None = field(
        default=1.0, metadata={"help": "Largest weight of a pair; null: no clamp, as in TRL."}
    )


class WPOTrainer(PreferenceTrainer):
    """Weighted preference optimization: each pair's loss times exp(omega(chosen) + omega(rejected)), at most `max_weight`.

    The weight comes from the forward pass that the loss needs anyway, and carries no gradient; any loss of `loss_type`
    can be weighted.

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
    author    = {Zhou, Wenxuan and Agrawal, Ravi and Zhang, Shujian and Indurthi, Sathish Reddy and Zhao, Sanqiang and Song, Kaiqiang and Xu, Silei and Zhu, Chenguang},
    booktitle = {EMNLP},
    year      = 2024,
}""",
    }

    @classmethod
    def check_settings(cls, args: WPOConfig) -> None:
        """Refuse WPO without weights."""
        super().check_settings(args)
        if not args.use_weighting:
            raise ValueError("`use_weighting: false` makes WPO plain DPO; use DPOTrainer (`prefopt dpo`) for that.")
