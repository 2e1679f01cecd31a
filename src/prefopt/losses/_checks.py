"""Checks that every loss runs before it computes: shapes, then hyperparameters; and the common dtype."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import reduce

import torch
from torch import Tensor


def check_shapes(expected: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    """Check that the shapes of tensors agree with one another.

    Args:
        expected: for each argument, its shape in letters, as in `"K,B"`; one letter means one size everywhere. Several
            shapes are allowed where they differ in rank: `"K|K,B"`.
        tensors: the arguments under the same names.

    Raises:
        ValueError: not a tensor, the wrong rank, or one letter with two sizes; the message shows every shape.
    """
    sizes: dict[str, int] = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} must be a torch.Tensor of shape {_shown(expected[name])}, got {tensor!r}.")
        fitting = [shape.split(",") for shape in expected[name].split("|") if shape.count(",") + 1 == tensor.ndim]
        agrees = bool(fitting) and all(
            sizes.setdefault(letter, size) == size for letter, size in zip(fitting[0], tensor.shape, strict=True)
        )
        if not agrees:
            found = ", ".join(f"{key} {_shown_shape(value)}" for key, value in tensors.items())
            wanted = ", ".join(f"{key} {_shown(expected[key])}" for key in tensors)
            raise ValueError(f"The shapes do not agree: got {found}; expected {wanted}. Nothing is broadcast.")


def _shown(shape: str) -> str:
    return " or ".join(f"({s.replace(',', ', ')}{',' if ',' not in s else ''})" for s in shape.split("|"))


def _shown_shape(value: object) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else f"({type(value).__name__})"


def in_float(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast tensors to their common dtype, float32 at least (float64 stays float64)."""
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)
    return tuple(tensor.to(dtype) for tensor in tensors)


def per_pair(**tensors: Tensor) -> tuple[Tensor, ...]:
    """Check that each tensor is (B,) with one B, and cast all to their common float dtype."""
    check_shapes(dict.fromkeys(tensors, "B"), tensors)
    return in_float(*tensors.values())


def check_positive(**values: float) -> None:
    """Raise a ValueError for a hyperparameter that is not a finite number above 0."""
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be a finite number above 0, got {value}.")


def check_not_negative(**values: float) -> None:
    """Raise a ValueError for a hyperparameter that is not a finite number of at least 0."""
    for name, value in values.items():
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be a finite number of at least 0, got {value}.")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise a ValueError for a name that is not one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}.")
