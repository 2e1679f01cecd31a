"""The cached scores of K references on a whole data set, as arrays."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from datasets import Dataset
from torch import Tensor

from prefopt.references.weights import discriminative_confidence


@dataclass(frozen=True)
class ReferenceTable:
    """Scores of K references on N pairs, in host memory.

    Attributes:
        chosen, rejected: (K, N) summed log-probs, float32, in nats.
        chosen_lengths, rejected_lengths: (K, N) the units of length that weights are computed per (tokens or bytes).
    """

    chosen: Tensor
    rejected: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor

    @classmethod
    def of(cls, dataset: Dataset, *, unit: str) -> ReferenceTable:
        """The table of a data set with joined scores; `unit` is "token" or "byte"."""
        names = ("chosen", "rejected")
        sums = [torch.tensor(dataset[f"ref_{side}_logps"], dtype=torch.float32).T for side in names]
        if unit == "byte":
            sizes = [torch.tensor(dataset[f"{side}_bytes"], dtype=torch.float32) for side in names]
            lengths = [size.clamp_min(1).expand_as(total) for size, total in zip(sizes, sums)]
        else:
            lengths = [torch.tensor(dataset[f"ref_{side}_counts"], dtype=torch.float32).T for side in names]
        return cls(*sums, *lengths)

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """(K, N) log-probs per unit of length, chosen and rejected."""
        return self.chosen / self.chosen_lengths, self.rejected / self.rejected_lengths

    @property
    def confidence(self) -> Tensor:
        """(K, N) discriminative confidence per unit of length."""
        return discriminative_confidence(*self.means)
