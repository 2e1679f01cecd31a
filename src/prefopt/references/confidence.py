"""Confidences of K references on B pairs (K, B), checked and turned into weights; constant weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MIN_CONFIDENCE = 1e-6  # nats; a smaller sum over the references is rounding, not confidence


def check_count(num_references: int) -> None:
    if num_references < 1:
        raise ValueError(f"num_references must be at least 1, got {num_references}.")


def check_confidence(confidence: Tensor) -> None:
    if confidence.dim() != 2 or confidence.shape[0] == 0:
        raise ValueError(f"confidence must have shape (references, pairs), got {tuple(confidence.shape)}.")
    bad = ~(torch.isfinite(confidence) & (confidence >= 0))
    if bool(bad.any()):
        reference, row = (int(i) for i in bad.nonzero()[0])
        value = float(confidence[reference, row])
        raise ValueError(f"confidence of reference {reference} at row {row} is {value}: it must be finite and >= 0.")


def check_pair(chosen: Tensor, rejected: Tensor) -> None:
    if chosen.dim() != 2 or chosen.shape != rejected.shape:
        shapes = f"{tuple(chosen.shape)} and {tuple(rejected.shape)}"
        raise ValueError(f"chosen and rejected must have one shape (references, pairs), got {shapes}.")


def normalise(confidence: Tensor) -> Tensor:
    """c / sum over the first dimension; uniform where the sum is below MIN_CONFIDENCE."""
    total = confidence.sum(dim=0, keepdim=True)
    uniform = torch.full_like(confidence, 1.0 / confidence.shape[0])
    return torch.where(total < MIN_CONFIDENCE, uniform, confidence / total.clamp_min(MIN_CONFIDENCE))


def at_least_float32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def uniform_weights(num_references: int) -> Tensor:
    """1 / K for each reference.

    Returns:
        (K,) float32.

    Raises:
        ValueError: fewer than one reference.
    """
    check_count(num_references)
    return torch.full((num_references,), 1.0 / num_references)


def fixed_weights(values: Sequence[float], num_references: int) -> Tensor:
    """The user's own weights, checked.

    Args:
        values: K numbers >= 0 that sum to one (to 1e-4); zeros are allowed and switch a reference off exactly.
        num_references: K.

    Returns:
        (K,) float32, summing to one.

    Raises:
        ValueError: the wrong number of weights, a negative or non-finite one, or a sum other than one.
    """
    check_count(num_references)
    if len(values) != num_references:
        raise ValueError(f"reference_weights has {len(values)} values for {num_references} references: give one each.")
    weights = torch.tensor([float(v) for v in values], dtype=torch.float64)
    if not bool(torch.isfinite(weights).all()) or bool((weights < 0).any()):
        raise ValueError(f"reference_weights must be finite and >= 0, got {list(values)}.")
    total = float(weights.sum())
    if abs(total - 1.0) > 1e-4:
        raise ValueError(f"reference_weights must sum to one, got {list(values)}, which sum to {total:.6g}.")
    return (weights / total).float()
