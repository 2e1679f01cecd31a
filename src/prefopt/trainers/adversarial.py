"""The reward model's side of adversarial preference optimization: human comparisons, and golden answers against the policy's samples."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader

from prefopt.losses.reward import adversarial_reward_loss, ranked_pairs
from prefopt.trainers.comparison import ranked
from prefopt.trainers.metrics import MetricSums
from prefopt.trainers.reward import RewardConfig, RewardTrainer


@dataclass
class AdversarialRewardConfig(RewardConfig):
    """Settings of `AdversarialRewardTrainer`."""

    adversarial_coeff: float = field(
        default=0.1,
        metadata={
            "help": "Weight of the adversarial pairs of one golden answer together (0.1 in the authors' recipe)."
        },
    )
    num_samples: int = field(
        default=4,
        metadata={"help": "Sampled answers per golden one; divides `adversarial_coeff` (4 in the authors' recipe)."},
    )
    human_coeff: float = field(
        default=1.0, metadata={"help": "Weight of a human pair; 0 leaves the human comparisons out."}
    )
    adversarial_loss: str = field(
        default="logistic",
        metadata={
            "help": "Form of the adversarial term: 'logistic' (ranking) or 'difference' (unbounded, WGAN-like)."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adversarial_loss not in ("logistic", "difference"):
            raise ValueError(f"`adversarial_loss` must be 'logistic' or 'difference', not {self.adversarial_loss!r}.")
        if self.num_samples < 1:
            raise ValueError(f"`num_samples` must be at least 1, not {self.num_samples}.")
        for name in ("adversarial_coeff", "human_coeff"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"`{name}` must not be negative, not {getattr(self, name)}.")


class AdversarialRewardTrainer(RewardTrainer):
    """Reward model against a policy: rows marked `type: apo` pair a golden answer with a sampled one, all others are human comparisons.

        L = human_coeff * L_rank(human) + adversarial_coeff / num_samples * L_kind(adversarial)

    Both terms divide by the number of ranked pairs of the whole optimizer step, human and adversarial together, so that the gradient is the
    same for any micro-batch size and any mixture within a micro-batch. `effective_ratio` says how much all adversarial pairs of the data weigh
    against all human ones; it is printed before training.

    Example:

    ```python
    rows = concatenate_datasets([human, adversarial])
    trainer = AdversarialRewardTrainer("base-reward-model", args=AdversarialRewardConfig("out", pooling="last"), train_dataset=rows)
    trainer.train()
    ```

    Reference: arXiv 2311.08045, as computed by its released code.
    """

    config_class = AdversarialRewardConfig
    _name = "adversarial preference optimization (reward model)"
    _tag_names = ("prefopt", "adversarial-reward-trainer")
    _paper = {  # noqa: RUF012
        "title": "Adversarial Preference Optimization: Enhancing Your Alignment via RM-LLM Game",
        "id": "2311.08045",
    }

    @classmethod
    def check_rows(cls, dataset: Dataset, args: AdversarialRewardConfig, name: str) -> None:
        """Refuse margins, and training rows that are all of one kind."""
        if "margin" in dataset.column_names:
            raise ValueError(
                f"The {name} set has margins, which the adversarial loss does not read; remove the column."
            )
        if name != "train":
            return
        adversarial = sum(dataset["is_adversarial"])
        if not adversarial:
            raise ValueError(
                "No training row is adversarial (`type: apo`); train on human comparisons with RewardTrainer."
            )
        if adversarial == len(dataset) and args.human_coeff > 0:
            raise ValueError(
                "Every training row is adversarial; add human comparisons (without them the reward model degrades), or set "
                "`human_coeff: 0` if that is meant."
            )

    @functools.cached_property
    def effective_ratio(self) -> float:
        """Weight of all adversarial pairs of the training rows over that of all human ones."""
        human, adversarial = self._count_pairs()
        against = self.args.adversarial_coeff / self.args.num_samples * adversarial
        return against / (self.args.human_coeff * human) if human and self.args.human_coeff else math.inf

    def _count_pairs(self) -> tuple[int, int]:
        """Ranked pairs of the training rows: human and adversarial."""
        counts = {True: 0, False: 0}
        for scores, adversarial in zip(self.train_dataset["scores"], self.train_dataset["is_adversarial"]):
            counts[adversarial] += len(ranked(scores))
        return counts[False], counts[True]

    def get_train_dataloader(self) -> DataLoader:
        """The planned micro-batches of this rank; says first how the two terms weigh."""
        if self.train_dataset is not None and self.is_world_process_zero():
            args, (human, adversarial) = self.args, self._count_pairs()
            print(
                f"{human} human pairs of weight {args.human_coeff:g}, {adversarial} adversarial pairs of weight "
                f"{args.adversarial_coeff / args.num_samples:g} ({args.adversarial_coeff:g} / {args.num_samples}): "
                f"adversarial to human = {self.effective_ratio:.3g}."
            )
        return super().get_train_dataloader()

    def total_loss(self, rewards: Tensor, mask: Tensor, batch: dict[str, Any]) -> Tensor:
        """See `RewardTrainer.total_loss`."""
        loss = adversarial_reward_loss(
            rewards,
            batch["ranks"],
            batch["is_adversarial"],
            adversarial_coeff=self.args.adversarial_coeff,
            num_samples=self.args.num_samples,
            human_coeff=self.args.human_coeff,
            mask=mask,
            kind=self.args.adversarial_loss,
        )
        return loss * ranked_pairs(batch["ranks"], mask).sum()

    def record(self, total: Tensor, rewards: Tensor, mask: Tensor, batch: dict[str, Any], sums: MetricSums) -> None:
        """Add the metrics of `RewardTrainer`, and accuracy and margin of each kind of pair."""
        super().record(total, rewards, mask, batch, sums)
        values = rewards.reshape(-1)[batch["slots"]]
        margins = values[batch["better"]] - values[batch["worse"]]
        real, adversarial = batch["real"][batch["pair_rows"]], batch["is_adversarial"][batch["pair_rows"]]
        for kind, chosen in (("human", ~adversarial), ("adversarial", adversarial)):
            sums.add_mean(f"accuracy/{kind}", (margins > 0).float(), real & chosen)
            sums.add_mean(f"margin/{kind}", margins, real & chosen)
        sums.add_mean("adversarial_fraction", adversarial.float(), real)
