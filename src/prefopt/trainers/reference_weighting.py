"""Reference weights during training: which (K,) or (K, B) numbers a batch is mixed with, step by step.

A weighting is one class and its line in `WEIGHTINGS`. Online weights change once per optimizer step, over all its
pairs on all ranks. They are computed from the cached scores and the plan of batches, which every rank knows whole, so
they agree without communication. Letters: K references, B pairs of a batch, N pairs of a data set.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from prefopt.references.cache import SIDES
from prefopt.references.weights import (
    SlidingWindowWeights,
    ThompsonSampling,
    discriminative_confidence,
    fixed_weights,
    normalise,
    one_hot_weights,
    uniform_weights,
    validation_accuracy_weights,
    validation_discrimination_weights,
)
from prefopt.scoring.plan import BatchPlan


@dataclass(frozen=True)
class ReferenceTable:
    """Scores of K references on N pairs, in host memory.

    Attributes:
        sums: (2, K, N) log-probs of chosen and rejected completions, float32, in nats.
        lengths: (2, K, N) the units of length that weights are computed per (tokens or bytes).
    """

    sums: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, dataset: Dataset, *, unit: str) -> ReferenceTable:
        """Read the table of a data set with joined scores; `unit` is "token" or "byte"."""

        def read(column: str) -> Tensor:
            names = [column.format(side) for side in SIDES]
            return torch.stack([torch.tensor(dataset[name], dtype=torch.float32) for name in names])

        sums = read("ref_{}_logps").transpose(1, 2)
        if unit == "byte":
            return cls(sums, read("{}_bytes").clamp_min(1)[:, None].expand_as(sums))
        return cls(sums, read("ref_{}_counts").transpose(1, 2))

    @property
    def means(self) -> Tensor:
        """(2, K, N) log-probs per unit of length."""
        return self.sums / self.lengths

    @property
    def confidence(self) -> Tensor:
        """(K, N) discriminative confidence per unit of length."""
        return discriminative_confidence(*self.means)


@dataclass(frozen=True)
class WeightingInputs:
    """What a weighting may be computed from.

    Attributes:
        args: the trainer's settings.
        num_references: K.
        anchor: number of the reference that is the policy's own initial model, if there is one.
        pairs: the data set that the weighting's `pairs` names, with the references' scores.
        plan: returns the training set's batch plan, which exists once training starts.
        measure: computes the policy's metric on these validation pairs, the same on every rank; more is better.
    """

    args: Any
    num_references: int
    anchor: int | None
    pairs: Dataset | None
    plan: Callable[[], BatchPlan]
    measure: Callable[[Sequence[int]], float]

    @property
    def unit(self) -> str:
        """Unit of length that confidences are computed per."""
        return "byte" if self.args.normalize == "byte" else "token"

    @property
    def table(self) -> ReferenceTable:
        """The references' scores on `pairs`."""
        assert self.pairs is not None
        return ReferenceTable.of(self.pairs, unit=self.unit)


class Weighting:
    """How the references are weighted. Subclasses override what they need.

    Attributes:
        per_example: weights are (K, B), otherwise (K,).
        pairs: the data set that it is computed from: "train", "validation", or None.
    """

    per_example: ClassVar[bool] = False
    pairs: ClassVar[str | None] = None

    def __init__(self, inputs: WeightingInputs) -> None:
        """Compute what does not change from step to step."""

    def start_step(self, step: int) -> None:
        """Prepare the weights of optimizer step `step`, before its first micro-batch."""

    def end_step(self) -> None:
        """Take in the result of the optimizer step."""

    def weights(self, batch: dict[str, Any], *, training: bool) -> Tensor:
        """Return the weights of a batch, on its device."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must hold (JSON)."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""


class ConstantWeighting(Weighting):
    """The same (K,) weights throughout."""

    def __init__(self, inputs: WeightingInputs) -> None:
        self._weights = self.compute(inputs)

    def compute(self, inputs: WeightingInputs) -> Tensor:
        """Compute the weights (K,)."""
        raise NotImplementedError

    def weights(self, batch: dict[str, Any], *, training: bool) -> Tensor:
        """Return the weights (K,)."""
        return self._weights.to(batch["real"].device)

    def state_dict(self) -> dict[str, Any]:
        """Return the weights, so that a resumed run can check that they are the same."""
        return {"weights": self._weights.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raise a ValueError where the checkpoint's weights differ from this run's."""
        if len(state["weights"]) != len(self._weights) or not np.allclose(state["weights"], self._weights, atol=1e-5):
            raise ValueError(
                f"The checkpoint was trained with the reference weights {state['weights']}, and the settings or "
                f"scores of this run give {self._weights.tolist()}."
            )


class UniformWeighting(ConstantWeighting):
    """1 / K for each reference."""

    def compute(self, inputs: WeightingInputs) -> Tensor:
        """See `uniform_weights`."""
        return uniform_weights(inputs.num_references)


class FixedWeighting(ConstantWeighting):
    """The weights of `reference_weights`."""

    def compute(self, inputs: WeightingInputs) -> Tensor:
        """See `fixed_weights`."""
        return fixed_weights(inputs.args.reference_weights, inputs.num_references)


class ValidationDiscriminationWeighting(ConstantWeighting):
    """Weights from the confidences on validation pairs (VDW)."""

    pairs = "validation"

    def compute(self, inputs: WeightingInputs) -> Tensor:
        """See `validation_discrimination_weights`."""
        return validation_discrimination_weights(inputs.table.confidence)


class ValidationAccuracyWeighting(ConstantWeighting):
    """Weights from the references' accuracies on validation pairs (VAW)."""

    pairs = "validation"

    def compute(self, inputs: WeightingInputs) -> Tensor:
        """See `validation_accuracy_weights`."""
        return validation_accuracy_weights(*inputs.table.means, temperature=inputs.args.accuracy_temperature)


class ExampleWeighting(Weighting):
    """Each pair's weights from its own confidences, per unit of length (normalised ARWC)."""

    per_example = True

    def __init__(self, inputs: WeightingInputs) -> None:
        self.unit = inputs.unit

    def weights(self, batch: dict[str, Any], *, training: bool) -> Tensor:
        """Return (K, B), without waiting for the device (the scores were checked to be finite when attached)."""
        sides = []
        for side in SIDES:
            logps = batch[f"ref_{side}_logps"]
            if self.unit == "token":
                logps = logps / batch[f"ref_{side}_counts"]
            elif self.unit == "byte":
                logps = logps / batch[f"{side}_bytes"].clamp_min(1)
            sides.append(logps)
        return normalise(discriminative_confidence(*sides))


class SummedExampleWeighting(ExampleWeighting):
    """Each pair's weights from the confidences of summed log-probs, as in MRPO's code (ARWC)."""

    def __init__(self, inputs: WeightingInputs) -> None:
        self.unit = "sum"


class WindowWeighting(Weighting):
    """Weights from the confidences of the last optimizer steps (SWCW)."""

    pairs = "train"
    one_hot: ClassVar[bool] = False

    def __init__(self, inputs: WeightingInputs) -> None:
        args = inputs.args
        self.window = SlidingWindowWeights(
            inputs.num_references,
            window=args.window,
            reduce=args.window_reduce,
            one_hot=self.one_hot,
            initial=inputs.anchor if self.one_hot else None,
        )
        self.confidence = inputs.table.confidence
        self.plan = inputs.plan
        self._next_update = 0  # optimizer steps that the window has seen

    def start_step(self, step: int) -> None:
        """Add the steps before `step` that the window has not seen yet."""
        plan = self.plan()
        for seen in range(self._next_update, step):
            epoch, number = divmod(seen, plan.num_steps)
            batches = [batch for rank in plan.step(epoch, number) for batch in rank if not batch.is_filler]
            self.window.update(self.confidence[:, sorted(i for batch in batches for i in batch.indices)])
        self._next_update = max(step, self._next_update)

    def weights(self, batch: dict[str, Any], *, training: bool) -> Tensor:
        """Return the weights (K,) of this step."""
        return self.window.weights().to(batch["real"].device)

    def state_dict(self) -> dict[str, Any]:
        """Return the window and the number of steps that it has seen."""
        return {"window": self.window.state_dict(), "next_update": self._next_update}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.window.load_state_dict(state["window"])
        self._next_update = state["next_update"]


class OneHotWindowWeighting(WindowWeighting):
    """All weight on the reference with the largest mean confidence of the last optimizer steps."""

    one_hot = True


class SamplingWeighting(Weighting):
    """One reference a step, by Thompson sampling on what its steps do to a validation metric (TSW)."""

    pairs = "validation"

    def __init__(self, inputs: WeightingInputs) -> None:
        args = inputs.args
        self.sampler = ThompsonSampling(
            inputs.num_references,
            prior=args.sampling_prior,
            seed=args.seed,
            ties=args.sampling_ties,
            discount=args.sampling_discount,
        )
        assert inputs.pairs is not None
        self.num_validation = len(inputs.pairs)
        self.subset = min(args.sampling_subset, self.num_validation)
        self.seed = args.seed
        self.measure = inputs.measure
        self._step: int | None = None
        self._reference = 0
        self._indices: list[int] = []
        self._before = 0.0

    def start_step(self, step: int) -> None:
        """Choose a reference and measure the policy on a subset that depends on seed and step alone."""
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
        """Return (K,), one-hot in training, uniform in evaluation, where no reference has been chosen."""
        count = self.sampler.num_references
        weights = one_hot_weights(self._reference, count) if training else uniform_weights(count)
        return weights.to(batch["real"].device)

    def state_dict(self) -> dict[str, Any]:
        """Return the posteriors and their generator."""
        return {"sampler": self.sampler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.sampler.load_state_dict(state["sampler"])


WEIGHTINGS: dict[str, type[Weighting]] = {
    "uniform": UniformWeighting,
    "fixed": FixedWeighting,
    "arwc": SummedExampleWeighting,
    "arwc_normalized": ExampleWeighting,
    "vdw": ValidationDiscriminationWeighting,
    "vaw": ValidationAccuracyWeighting,
    "swcw": WindowWeighting,
    "swcw_one_hot": OneHotWindowWeighting,
    "tsw": SamplingWeighting,
}
NOTEBOOK_NAMES = {"offline_1": "vdw", "offline_2": "vaw", "online_1": "swcw"}  # of the released notebooks


def weighting_name(name: str) -> str:
    """Return the library's name of a weighting, given that name or the released notebooks' one (`offline_1`, ...).

    Raises:
        ValueError: no weighting has this name.
    """
    if name not in WEIGHTINGS and name not in NOTEBOOK_NAMES:
        known = ", ".join([*WEIGHTINGS, *NOTEBOOK_NAMES])
        raise ValueError(f"weighting: no weighting is called {name!r}; choose one of {known}.")
    return NOTEBOOK_NAMES.get(name, name)
