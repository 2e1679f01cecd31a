"""Weights of the references that change during training: they look back at the last steps, or draw from posteriors.

Each object is the same on all ranks when it is given the same numbers on all ranks, and its state goes into checkpoints.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from prefopt.references.confidence import (
    MIN_CONFIDENCE,
    check_confidence,
    check_count,
    fixed_weights,
    normalise,
    uniform_weights,
)

Reduction = Literal["ratio_of_means", "mean_of_ratios"]


class SlidingWindowWeights:
    """Weights of the next step from the confidences of the last W steps (SWCW, `online_1`).

    ratio_of_means: alpha_k = mean_i c_ki / sum_j mean_i c_ji;  mean_of_ratios: alpha_k = mean_i (c_ki / sum_j c_ji),
    i over all pairs of the last W updates; `one_hot` puts all the weight on the largest mean confidence instead.

    Args:
        num_references: K.
        window: W, the number of updates that count.
        reduce: see above. The two differ where one reference's confidences are heavy-tailed.
        one_hot: choose one reference instead of mixing.
        initial: weights before the first update, and where the window holds no confidence: the number of a reference
            (the paper starts one-hot with the policy's own initial weights), K weights, or None for uniform.

    Raises:
        ValueError: an argument out of its range.

    Reference: arXiv 2512.10040 (SWCW). Its notebook reuses the previous batch's (K, B) matrix row by row, which gives
    a pair the weights of an unrelated one; here they are averaged over the batch.
    """

    def __init__(
        self,
        num_references: int,
        *,
        window: int = 1,
        reduce: Reduction = "ratio_of_means",
        one_hot: bool = False,
        initial: int | Sequence[float] | None = None,
    ) -> None:
        check_count(num_references)
        if window < 1:
            raise ValueError(f"window must be at least 1 step, got {window}.")
        if reduce not in ("ratio_of_means", "mean_of_ratios"):
            raise ValueError(f'reduce must be "ratio_of_means" or "mean_of_ratios", got {reduce!r}.')
        self.num_references = num_references
        self.reduce = reduce
        self.one_hot = one_hot
        self._initial = _initial_weights(initial, num_references)
        # per update: sum over pairs of c, sum over pairs of c / sum_j c_j, number of pairs
        self._window: deque[tuple[Tensor, Tensor, int]] = deque(maxlen=window)

    def weights(self) -> Tensor:
        """The weights to use now: (K,) float32."""
        pairs = sum(count for _, _, count in self._window)
        if pairs == 0:
            return self._initial.clone()
        confidence = torch.stack([c for c, _, _ in self._window]).sum(dim=0) / pairs
        if float(confidence.sum()) < MIN_CONFIDENCE:
            return self._initial.clone()
        if self.one_hot:
            return torch.nn.functional.one_hot(confidence.argmax(), self.num_references).float()
        if self.reduce == "ratio_of_means":
            return normalise(confidence).float()
        return (torch.stack([r for _, r, _ in self._window]).sum(dim=0) / pairs).float()

    def update(self, confidence: Tensor) -> None:
        """Take in the confidences of one optimizer step, all its pairs on all ranks.

        Args:
            confidence: (K, B).

        Raises:
            ValueError: not (K, B), or an entry is negative or not finite.
        """
        check_confidence(confidence)
        if confidence.shape[0] != self.num_references:
            raise ValueError(f"confidence has {confidence.shape[0]} references, expected {self.num_references}.")
        values = confidence.detach().double().cpu()
        self._window.append((values.sum(dim=1), normalise(values).sum(dim=1), values.shape[1]))

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold for a resumed run to go on with the same weights (JSON)."""
        window = [{"confidence": c.tolist(), "ratios": r.tolist(), "pairs": n} for c, r, n in self._window]
        return {"num_references": self.num_references, "window": window}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            ValueError: the state is of another number of references.
        """
        _check_state(state, self.num_references)
        self._window.clear()
        for entry in state["window"]:
            confidence, ratios = (torch.tensor(entry[key], dtype=torch.float64) for key in ("confidence", "ratios"))
            self._window.append((confidence, ratios, int(entry["pairs"])))


def _initial_weights(initial: int | Sequence[float] | None, num_references: int) -> Tensor:
    if initial is None:
        return uniform_weights(num_references)
    if not isinstance(initial, int):
        return fixed_weights(initial, num_references)
    if not 0 <= initial < num_references:
        raise ValueError(f"initial: there is no reference number {initial} among {num_references}.")
    return torch.nn.functional.one_hot(torch.tensor(initial), num_references).float()


def _check_state(state: dict[str, Any], num_references: int) -> None:
    if state["num_references"] != num_references:
        raise ValueError(
            f"the saved reference weights are for {state['num_references']} references, this run has {num_references}."
        )


class ThompsonSampling:
    """Choose one reference a step, more often those after whose steps a validation metric went up (TSW).

    theta_k ~ Beta(p + s_k, p + f_k), k = argmax_k theta_k; then s_k += 1 if the metric rose, else f_k += 1.

    Args:
        num_references: K.
        prior: p > 0, the same for successes and failures (the paper: 5 and 10).
        seed: of the draws; the same seed and updates give the same choices on every rank.
        ties: what an unchanged metric is: a "failure" (the paper) or to "skip".
        discount: in (0, 1]; every s and f is multiplied by it before an update, so that old steps fade.

    Attributes:
        successes: K numbers s_k, without the prior.
        failures: K numbers f_k, without the prior.

    Raises:
        ValueError: an argument out of its range.

    Reference: arXiv 2512.10040 (TSW); skipping ties and the discount are ours.
    """

    def __init__(
        self,
        num_references: int,
        *,
        prior: float,
        seed: int,
        ties: Literal["failure", "skip"] = "failure",
        discount: float = 1.0,
    ) -> None:
        check_count(num_references)
        if not prior > 0:
            raise ValueError(f"prior must be > 0, got {prior}.")
        if ties not in ("failure", "skip"):
            raise ValueError(f'ties must be "failure" or "skip", got {ties!r}.')
        if not 0 < discount <= 1:
            raise ValueError(f"discount must be in (0, 1], got {discount}.")
        self.num_references = num_references
        self.prior = prior
        self.ties = ties
        self.discount = discount
        self.successes = [0.0] * num_references
        self.failures = [0.0] * num_references
        self._generator = np.random.Generator(np.random.PCG64(seed))

    def select(self) -> int:
        """Draw from each reference's posterior and return the number of the largest draw."""
        draws = self._generator.beta(self.prior + np.array(self.successes), self.prior + np.array(self.failures))
        return int(draws.argmax())

    def update(self, reference: int, *, before: float, after: float) -> None:
        """Take in what one step with `reference` did to the metric, of which more is better.

        Args:
            reference: the number `select` gave.
            before: the metric before the step (accuracy, or minus the loss).
            after: the metric on the same pairs after the step.

        Raises:
            ValueError: no such reference, or a metric that is not finite.
        """
        if not 0 <= reference < self.num_references:
            raise ValueError(f"there is no reference number {reference} among {self.num_references}.")
        if not (math.isfinite(before) and math.isfinite(after)):
            raise ValueError(f"the validation metric must be finite, got {before} before and {after} after the step.")
        if after == before and self.ties == "skip":
            return
        self.successes = [s * self.discount for s in self.successes]
        self.failures = [f * self.discount for f in self.failures]
        (self.successes if after > before else self.failures)[reference] += 1.0

    def state_dict(self) -> dict[str, Any]:
        """Counts and generator, for a checkpoint (JSON)."""
        return {
            "num_references": self.num_references,
            "successes": self.successes,
            "failures": self.failures,
            "generator": self._generator.bit_generator.state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave: the next choice is the one the saved run would have made.

        Raises:
            ValueError: the state is of another number of references.
        """
        _check_state(state, self.num_references)
        self.successes = [float(s) for s in state["successes"]]
        self.failures = [float(f) for f in state["failures"]]
        self._generator.bit_generator.state = state["generator"]
