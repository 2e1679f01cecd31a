"""Weights of pairs."""

from __future__ import annotations

import math

import pytest
import torch

from prefopt import losses


def test_weights_by_hand():
    """exp(-ln 2 - ln 3) = 1/6; exp(ln 4 - ln 2) = 2, clamped to 1, to 3/2, or not at all."""
    chosen = torch.tensor([-math.log(2), math.log(4)], dtype=torch.float64)
    rejected = torch.tensor([-math.log(3), -math.log(2)], dtype=torch.float64)
    for max_weight, expected in [(1.0, [1 / 6, 1.0]), (1.5, [1 / 6, 1.5]), (None, [1 / 6, 2.0])]:
        weights = losses.wpo_pair_weights(chosen, rejected, max_weight=max_weight)
        torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


def test_the_default_clamps_at_one():
    assert losses.wpo_pair_weights(torch.tensor([0.5]), torch.tensor([0.5])).item() == 1.0


def test_aligned_text_weighs_one_and_multiplying_by_it_changes_nothing():
    zeros = torch.zeros(5)
    weights = losses.wpo_pair_weights(zeros, zeros)
    plain = losses.dpo_loss(torch.randn(5), torch.randn(5), beta=0.1)
    assert torch.equal(weights * plain, plain)


def test_weights_carry_no_gradient():
    chosen = torch.randn(4, requires_grad=True)
    rejected = torch.randn(4, requires_grad=True)
    weights = losses.wpo_pair_weights(chosen, rejected, max_weight=None)
    assert not weights.requires_grad
    loss = (weights * losses.dpo_loss(chosen, rejected, beta=0.1)).sum()
    (gradient,) = torch.autograd.grad(loss, chosen)
    (unweighted,) = torch.autograd.grad(losses.dpo_loss(chosen, rejected, beta=0.1).sum(), chosen)
    torch.testing.assert_close(gradient, weights * unweighted)


def test_unlikely_text_weighs_nothing_and_overflow_meets_the_bound():
    extremes = torch.tensor([-2000.0, 2000.0])
    assert losses.wpo_pair_weights(extremes, extremes).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_is_computed_in_float32(dtype):
    chosen, rejected = torch.randn(2, 6).to(dtype)
    weights = losses.wpo_pair_weights(chosen, rejected)
    assert weights.dtype == torch.float32
    assert torch.equal(weights, losses.wpo_pair_weights(chosen.float(), rejected.float()))


def test_wrong_shapes_and_bounds_are_refused():
    with pytest.raises(ValueError, match=r"\(4,\).*\(4, 1\)"):
        losses.wpo_pair_weights(torch.zeros(4), torch.zeros(4, 1))
    for bound in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="max_weight"):
            losses.wpo_pair_weights(torch.zeros(4), torch.zeros(4), max_weight=bound)
