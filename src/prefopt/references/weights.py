"""Weights of references: fixed, from validation data, from the example itself, or learned online.

K references, B pairs, N validation pairs. References come first: (K, B) per example, (K,) for a whole set. Weights are
non-negative, sum to one over the references, carry no gradient, and are uniform where nothing tells the
references apart. A *confidence* is |m_k(y+) - m_k(y-)|, unsigned: a confidently wrong reference has as much of it as a
confidently right one.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

MIN_CONFIDENCE = 1e-6  # nats; a smaller sum over the references is rounding, not confidence
Reduction = Literal["ratio_of_means", "mean_of_ratios"]
Ties = Literal["failure", "skip"]


def _check_count(num_references: int) -> None:
    if num_references < 1:
        raise ValueError(f"num_references must be at least 1, got {num_references}.")


def _check_confidence(confidence: Tensor) -> None:
    if confidence.dim() != 2 or confidence.shape[0] == 0:
        raise ValueError(f"confidence must have shape (references, pairs), got {tuple(confidence.shape)}.")
    bad = ~(torch.isfinite(confidence) & (confidence >= 0))
    if bool(bad.any()):
        reference, row = (int(i) for i in bad.nonzero()[0])
        value = float(confidence[reference, row])
        raise ValueError(f"confidence of reference {reference} at row {row} is {value}: it must be finite and >= 0.")


def _check_some(pairs: Tensor) -> None:
    if pairs.shape[1] == 0:
        raise ValueError("validation weights need at least one validation pair, got none.")


def _check_pair(chosen: Tensor, rejected: Tensor) -> None:
    if chosen.dim() != 2 or chosen.shape != rejected.shape:
        shapes = f"{tuple(chosen.shape)} and {tuple(rejected.shape)}"
        raise ValueError(f"chosen and rejected must have one shape (references, pairs), got {shapes}.")


def normalise(confidence: Tensor) -> Tensor:
    """Divide by the sum over the first dimension; uniform where the sum is below MIN_CONFIDENCE."""
    total = confidence.sum(dim=0, keepdim=True)
    uniform = torch.full_like(confidence, 1.0 / confidence.shape[0])
    return torch.where(total < MIN_CONFIDENCE, uniform, confidence / total.clamp_min(MIN_CONFIDENCE))


def _at_least_float32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def uniform_weights(num_references: int) -> Tensor:
    """Return 1 / K for each reference.

    Returns:
        (K,) float32.

    Raises:
        ValueError: fewer than one reference.
    """
    _check_count(num_references)
    return torch.full((num_references,), 1.0 / num_references)


def one_hot_weights(reference: int, num_references: int) -> Tensor:
    """Return (K,) float32 with all weight on one reference."""
    return torch.nn.functional.one_hot(torch.tensor(reference), num_references).float()


def fixed_weights(values: Sequence[float], num_references: int) -> Tensor:
    """Check weights that the user gives and return them as a tensor.

    Args:
        values: K numbers >= 0 that sum to one (to 1e-4); zeros are allowed and switch a reference off exactly.
        num_references: K.

    Returns:
        (K,) float32, summing to one.

    Raises:
        ValueError: the wrong number of weights, a negative or non-finite one, or a sum other than one.
    """
    _check_count(num_references)
    if len(values) != num_references:
        raise ValueError(f"reference_weights has {len(values)} values for {num_references} references: give one each.")
    weights = torch.tensor([float(v) for v in values], dtype=torch.float64)
    if not bool(torch.isfinite(weights).all()) or bool((weights < 0).any()):
        raise ValueError(f"reference_weights must be finite and >= 0, got {list(values)}.")
    total = float(weights.sum())
    if abs(total - 1.0) > 1e-4:
        raise ValueError(f"reference_weights must sum to one, got {list(values)}, which sum to {total:.6g}.")
    return (weights / total).float()


def discriminative_confidence(chosen_mean_logps: Tensor, rejected_mean_logps: Tensor) -> Tensor:
    """Measure how clearly each reference tells the two completions apart, whichever it prefers.

    c_kb = |m_kb(chosen) - m_kb(rejected)|

    Args:
        chosen_mean_logps: (K, B) nats per unit of length (token or byte); sums give the confidence of MRPO's code.
        rejected_mean_logps: (K, B) in the same unit.

    Returns:
        (K, B), float32 or float64, without gradient.

    Raises:
        ValueError: the shapes differ or are not (K, B).

    Reference: arXiv 2512.10040 (released notebooks: per-token means, each model's own tokens).
    """
    _check_pair(chosen_mean_logps, rejected_mean_logps)
    dtype = _at_least_float32(chosen_mean_logps)
    return (chosen_mean_logps.detach().to(dtype) - rejected_mean_logps.detach().to(dtype)).abs()


def adaptive_weights(confidence: Tensor) -> Tensor:
    """Compute weights of each example from its own confidences (ARWC); uniform where the example has none.

    alpha_kb = c_kb / sum_j c_jb

    Args:
        confidence: (K, B), from per-token means (`arwc_normalized`) or from sums (`arwc`, MRPO's code).

    Returns:
        (K, B), each column sums to one. MRPO's code adds 1e-6 to the denominator, so its weights sum to a little less.

    Raises:
        ValueError: not (K, B), or an entry is negative or not finite; the message names reference and row.

    Reference: arXiv 2405.16388 (MRPO; ARWC). In harmonic mode MRPO's code gives reference 1 the weight meant for
    reference 2; here a weight belongs to the reference it was computed for.
    """
    _check_confidence(confidence)
    return normalise(confidence.detach().to(_at_least_float32(confidence)))


def validation_discrimination_weights(confidence: Tensor) -> Tensor:
    """Compute one set of weights from the confidences on a validation set (VDW, `offline_1`).

    alpha_k = sum_i c_ki / sum_j sum_i c_ji, a ratio of sums, accumulated in float64

    Args:
        confidence: (K, N) over the validation pairs.

    Returns:
        (K,); uniform where no pair has any confidence.

    Raises:
        ValueError: not (K, N), no pair, or an entry is negative or not finite.

    Reference: arXiv 2512.10040 (VDW).
    """
    _check_confidence(confidence)
    _check_some(confidence)
    return normalise(confidence.detach().double().sum(dim=1)).to(_at_least_float32(confidence))


def validation_accuracy_weights(
    chosen_mean_logps: Tensor, rejected_mean_logps: Tensor, *, temperature: float | None = None
) -> Tensor:
    """Compute one set of weights from each reference's accuracy on a validation set (VAW, `offline_2`).

    acc_k = mean_i 1[m_ki(chosen) > m_ki(rejected)];  alpha_k = acc_k / sum_j acc_j,
    or softmax_k(acc_k / temperature), because the ratio of accuracies is nearly uniform by construction.

    Args:
        chosen_mean_logps: (K, N) nats per unit of length.
        rejected_mean_logps: (K, N); an equal pair counts as wrong.
        temperature: in units of accuracy (0.05: five points more weigh e times as much); None for the ratio.

    Returns:
        (K,); uniform where no reference is ever right.

    Raises:
        ValueError: the shapes differ or are not (K, N), no pair, a score that is not finite, a temperature <= 0.

    Reference: arXiv 2512.10040 (VAW); the temperature is ours.
    """
    _check_pair(chosen_mean_logps, rejected_mean_logps)
    _check_some(chosen_mean_logps)
    if not bool(torch.isfinite(chosen_mean_logps).all() & torch.isfinite(rejected_mean_logps).all()):
        raise ValueError("validation weights need finite log-probs of every reference.")
    accuracy = (chosen_mean_logps.detach() > rejected_mean_logps.detach()).double().mean(dim=1)
    dtype = _at_least_float32(chosen_mean_logps)
    if temperature is None:
        return normalise(accuracy).to(dtype)
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}.")
    return torch.softmax(accuracy / temperature, dim=0).to(dtype)


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
        _check_count(num_references)
        if window < 1:
            raise ValueError(f"window must be at least 1 step, got {window}.")
        if reduce not in get_args(Reduction):
            raise ValueError(f'reduce must be "ratio_of_means" or "mean_of_ratios", got {reduce!r}.')
        self.num_references = num_references
        self.reduce = reduce
        self.one_hot = one_hot
        self._initial = _initial_weights(initial, num_references)
        # per update: sum over pairs of c, sum over pairs of c / sum_j c_j, number of pairs
        self._window: deque[tuple[Tensor, Tensor, int]] = deque(maxlen=window)

    def weights(self) -> Tensor:
        """Return the weights to use now: (K,) float32."""
        pairs = sum(count for _, _, count in self._window)
        if pairs == 0:
            return self._initial.clone()
        confidence = torch.stack([c for c, _, _ in self._window]).sum(dim=0) / pairs
        if float(confidence.sum()) < MIN_CONFIDENCE:
            return self._initial.clone()
        if self.one_hot:
            return one_hot_weights(int(confidence.argmax()), self.num_references)
        if self.reduce == "ratio_of_means":
            return normalise(confidence).float()
        return (torch.stack([r for _, r, _ in self._window]).sum(dim=0) / pairs).float()

    def update(self, confidence: Tensor) -> None:
        """Add the confidences of one optimizer step, of all its pairs on all ranks.

        Args:
            confidence: (K, B).

        Raises:
            ValueError: not (K, B), or an entry is negative or not finite.
        """
        _check_confidence(confidence)
        if confidence.shape[0] != self.num_references:
            raise ValueError(f"confidence has {confidence.shape[0]} references, expected {self.num_references}.")
        values = confidence.detach().double().cpu()
        self._window.append((values.sum(dim=1), normalise(values).sum(dim=1), values.shape[1]))

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must hold for a resumed run to continue with the same weights (JSON)."""
        window = [{"confidence": c.tolist(), "ratios": r.tolist(), "pairs": n} for c, r, n in self._window]
        return {"num_references": self.num_references, "window": window}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

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
    return one_hot_weights(initial, num_references)


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
        ties: an unchanged metric is counted as a "failure" (the paper) or not at all ("skip").
        discount: in (0, 1]; every s and f is multiplied by it before an update, so that old steps fade.

    Attributes:
        successes: K numbers s_k, without the prior.
        failures: K numbers f_k, without the prior.

    Raises:
        ValueError: an argument out of its range.

    Reference: arXiv 2512.10040 (TSW); skipping ties and the discount are ours.
    """

    def __init__(
        self, num_references: int, *, prior: float, seed: int, ties: Ties = "failure", discount: float = 1.0
    ) -> None:
        _check_count(num_references)
        if not prior > 0:
            raise ValueError(f"prior must be > 0, got {prior}.")
        if ties not in get_args(Ties):
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
        """Count one step with `reference` as a success or a failure by what it did to the metric.

        Args:
            reference: the number `select` gave.
            before: the metric before the step (accuracy, or minus the loss: more is better).
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
        """Return counts and generator, for a checkpoint (JSON)."""
        return {
            "num_references": self.num_references,
            "successes": self.successes,
            "failures": self.failures,
            "generator": self._generator.bit_generator.state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned: the next choice is the one the saved run would have made.

        Raises:
            ValueError: the state is of another number of references.
        """
        _check_state(state, self.num_references)
        self.successes = [float(s) for s in state["successes"]]
        self.failures = [float(f) for f in state["failures"]]
        self._generator.bit_generator.state = state["generator"]
