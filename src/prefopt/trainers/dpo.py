"""DPO and the other pairwise losses of TRL's list, on the fast path."""

from __future__ import annotations

from dataclasses import dataclass

from prefopt.trainers.config import PreferenceConfig
from prefopt.trainers.preference import PreferenceTrainer


@dataclass
class DPOConfig(PreferenceConfig):
    """Settings of `DPOTrainer`: TRL's `DPOConfig` and `PreferenceConfig`'s fields, nothing more."""


class DPOTrainer(PreferenceTrainer):
    """Direct preference optimization, and every loss of `loss_type`; takes the place of TRL's `DPOTrainer`.

    Example:
    ```python
    trainer = DPOTrainer("Qwen/Qwen2.5-0.5B-Instruct", args=DPOConfig("out", beta=0.1), train_dataset=dataset)
    trainer.train()
    ```

    Reference: arXiv 2305.18290.
    """

    config_class = DPOConfig
    _name = "DPO"
    _tag_names = ("prefopt", "dpo")
    _paper = {  # noqa: RUF012
        "title": "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
        "id": "2305.18290",
        "citation": """
@inproceedings{rafailov2023direct,
    title     = {Direct Preference Optimization: Your Language Model is Secretly a Reward Model},
    author    = {Rafailov, Rafael and Sharma, Archit and Mitchell, Eric and Manning, Christopher D. and Ermon, Stefano
                 and Finn, Chelsea},
    booktitle = {NeurIPS},
    year      = 2023,
}""",
    }
