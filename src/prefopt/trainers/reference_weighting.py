"""The reference weights of a run: which (K,) or (K, B) numbers a batch is mixed with, step by step.

Online weights change once per optimizer step, over all its pairs on all ranks. They are computed from the cached
scores and the plan of batches, which every rank knows whole, so they agree without communication. Letters: K
references, B pairs of a batch, N pairs of a data set.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from prefopt.references.weights import (
    SlidingWindowWeights,
    ThompsonSampling,
    discriminative_confidence,
    fixed_weights,
    normalise,
    uniform_weights,
    validation_accuracy_weights,
    validation_discrimination_weights,
)
from prefopt.scoring.plan import BatchPlan
from prefopt.trainers.multi_reference_config import MultiReferenceDPOConfig


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


class Weighting(Protocol):
    """How the references are weighed; `per_example` says whether weights are (K, B) or (K,)."""

    per_example: bool

    def start_step(self, step: int) -> None:
        """Called before the first micro-batch of optimizer step `step`."""

    def end_step(self) -> None:
        """Called after the optimizer step."""

    def weights(self, batch: dict[str, Any], *, training: bool) -> Tensor:
        """The weights of a batch, on its device."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold (JSON)."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""


class ConstantWeighting:
    """The same (K,) weights throughout: uniform, fixed, or from validation pairs."""

    per_example = False

    def __init__(self, weights: Tensor) -> None:
        self._weights = weights

    def start_step(self, step: int) -> None:
        """Nothing changes."""

    def end_step(self) -> None:
        """Nothing changes."""

    def weights(self, batch: dict[str, Any], *, training: bool) -> Tensor:
        """(K,)."""
        return self._weights.to(batch["real"].device)

    def state_dict(self) -> dict[str, Any]:
        """The weights, so that a resumed run can see that they are the same."""
        return {"weights": self._weights.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Refuse a run whose weights were others."""
        if len(state["weights"]) != len(self._weights) or not np.allclose(state["weights"], self._weights, atol=1e-5):
            raise ValueError(
                f"The checkpoint was trained with the reference weights {state['weights']}, and the settings or "
                "scores of this "
                f"run give {self._weights.tolist()}."
            )


class ExampleWeighting:
    """Each pair's weights from its own confidences (ARWC), per unit of length or, as in MRPO's code, from sums.

    Args:
        unit: "token", "byte" or "sum".
    """

    per_example = True

    def __init__(self, unit: str) -> None:
        self.unit = unit

    def start_step(self, step: int) -> None:
        """Nothing changes."""

    def end_step(self) -> None:
        """Nothing changes."""

    def weights(self, batch: dict[str, Any], *, training: bool) -> Tensor:
        """(K, B), without waiting for the device (the scores were checked to be finite when they were joined)."""
        sides = []
        for side in ("chosen", "rejected"):
            logps = batch[f"ref_{side}_logps"]
            if self.unit == "token":
                logps = logps / batch[f"ref_{side}_counts"]
            elif self.unit == "byte":
                logps = logps / batch[f"{side}_bytes"].clamp_min(1)
            sides.append(logps)
        return normalise(discriminative_confidence(*sides))

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing."""


class WindowWeighting:
    """Weights from the confidences of the last optimizer steps (SWCW).

    Args:
        window: the state.
        confidence: (K, N) on the training set.
        plan: gives the training set's batch plan, which exists once training starts.
    """

    per_example = False

    def __init__(self, window: SlidingWindowWeights, confidence: Tensor, plan: Callable[[], BatchPlan]) -> None:
        self.window = window
        self.confidence = confidence
        self.plan = plan
        self._next_update = 0  # optimizer steps that the window has seen

    def start_step(self, step: int) -> None:
        """Take in the steps before `step` that the window has not seen yet."""
        plan = self.plan()
        for seen in range(self._next_update, step):
            epoch, number = divmod(seen, plan.num_steps)
            indices = [
                i for rank in plan.step(epoch, number) for batch in rank if not batch.is_filler for i in batch.indices
            ]
            self.window.update(self.confidence[:, sorted(indices)])
        self._next_update = max(step, self._next_update)

    def end_step(self) -> None:
        """The finished step is taken in when the next one starts."""

    def weights(self, batch: dict[str, Any], *, training: bool) -> Tensor:
        """(K,)."""
        return self.window.weights().to(batch["real"].device)

    def state_dict(self) -> dict[str, Any]:
        """The window and how far it has come."""
        return {"window": self.window.state_dict(), "next_update": self._next_update}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        self.window.load_state_dict(state["window"])
        self._next_update = state["next_update"]


class SamplingWeighting:
    """One reference a step, by Thompson sampling on what its steps do to a validation metric (TSW).

    Args:
        sampler: the posteriors.
        subset: validation pairs that are scored before and after each step.
        num_validation: size of the validation set; a subset is drawn from it without replacement.
        seed: of the subsets, which depend on it and on the step alone.
        measure: the policy's metric on these validation pairs, more is better; the same on every rank.
    """

    per_example = False

    def __init__(
        self,
        sampler: ThompsonSampling,
        *,
        subset: int,
        num_validation: int,
        seed: int,
        measure: Callable[[Sequence[int]], float],
    ) -> None:
        self.sampler = sampler
        self.subset = min(subset, num_validation)
        self.num_validation = num_validation
        self.seed = seed
        self.measure = measure
        self._step: int | None = None
        self._reference = 0
        self._indices: list[int] = []
        self._before = 0.0

    def start_step(self, step: int) -> None:
        """Choose a reference and measure the policy before the step."""
        if step == self._step:
            return
        self._step = step
        self._reference = self.sampler.select()
        draw = np.random.Generator(np.random.PCG64([self.seed, step]))
        self._indices = sorted(draw.choice(self.num_validation, self.subset, replace=False).tolist())
        self._before = self.measure(self._indices)

    def end_step(self) -> None:
        """Measure again and update the chosen reference's posterior."""
        self.sampler.update(self._reference, before=self._before, after=self.measure(self._indices))

    def weights(self, batch: dict[str, Any], *, training: bool) -> Tensor:
        """One-hot (K,) in training, uniform in evaluation, where no reference has been chosen."""
        weights = uniform_weights(self.sampler.num_references)
        if training:
            weights = torch.nn.functional.one_hot(torch.tensor(self._reference), len(weights)).float()
        return weights.to(batch["real"].device)

    def state_dict(self) -> dict[str, Any]:
        """The posteriors and their generator."""
        return {"sampler": self.sampler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        self.sampler.load_state_dict(state["sampler"])


def make_weighting(
    args: MultiReferenceDPOConfig,
    *,
    num_references: int,
    anchor: int | None,
    dataset: Dataset | None,
    plan: Callable[[], BatchPlan],
    measure: Callable[[Sequence[int]], float],
) -> Weighting:
    """The weighting that the settings ask for.

    Args:
        args: the trainer's config.
        num_references: K.
        anchor: number of the reference that is the policy's own initial model, if there is one.
        dataset: the training set (swcw) or the held-out validation pairs (vdw, vaw, tsw), with their scores.
        plan: gives the training set's batch plan.
        measure: the policy's metric on validation pairs.
    """
    name, unit = args.weighting, "byte" if args.normalize == "byte" else "token"
    if name == "uniform":
        return ConstantWeighting(uniform_weights(num_references))
    if name == "fixed":
        assert args.reference_weights is not None
        return ConstantWeighting(fixed_weights(args.reference_weights, num_references))
    if name in ("arwc", "arwc_normalized"):
        return ExampleWeighting("sum" if name == "arwc" else unit)
    assert dataset is not None
    if name == "tsw":
        sampler = ThompsonSampling(
            num_references,
            prior=args.sampling_prior,
            seed=args.seed,
            ties=args.sampling_ties,
            discount=args.sampling_discount,
        )
        return SamplingWeighting(
            sampler, subset=args.sampling_subset, num_validation=len(dataset), seed=args.seed, measure=measure
        )
    table = ReferenceTable.of(dataset, unit=unit)
    if name == "vdw":
        return ConstantWeighting(validation_discrimination_weights(table.confidence))
    if name == "vaw":
        return ConstantWeighting(validation_accuracy_weights(*table.means, temperature=args.accuracy_temperature))
    one_hot = name == "swcw_one_hot"
    window = SlidingWindowWeights(
        num_references,
        window=args.window,
        reduce=args.window_reduce,
        one_hot=one_hot,
        initial=anchor if one_hot else None,
    )
    return WindowWeighting(window, table.confidence, plan)
