"""Bradley-Terry and general preference models: values by hand, and the score's operator."""

from __future__ import annotations

import math
from math import log

import pytest
import torch

from prefopt import losses


def test_bradley_terry_by_hand():
    """(1 - 0 - (1 - ln 3 / 2)) / (1/2) = ln 3."""
    ones, zeros = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    loss = losses.bradley_terry_loss(ones, zeros, tau=0.5, margin=ones - log(3) / 2)
    assert loss.item() == pytest.approx(log(4 / 3), rel=1e-12)
    assert losses.general_preference_loss(ones * log(3), tau=1.0).item() == pytest.approx(log(4 / 3), rel=1e-12)


def test_bradley_terry_names_its_own_arguments():
    with pytest.raises(ValueError, match=r"chosen_rewards \(4,\).*margin \(1,\)"):
        losses.bradley_terry_loss(torch.zeros(4), torch.zeros(4), margin=torch.zeros(1))


def test_preference_score_by_hand():
    """c = (1, 2, 3, 4), r = (5, 6, 7, 8): (1*6 - 2*5) + (3*8 - 4*7) = -8; scaled by 1/2 and 2: -2 - 8 = -10."""
    c, r = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[5.0, 6.0, 7.0, 8.0]])
    assert losses.general_preference_score(c, r).item() == -8.0
    assert losses.general_preference_score(c, r, torch.tensor([[0.5, 2.0]])).item() == -10.0


def test_preference_score_is_the_operator_with_its_sign():
    """c^T R^T r with R[2k, 2k+1] = -1 and R[2k+1, 2k] = 1."""
    generator = torch.Generator().manual_seed(0)
    c, r = torch.randn(2, 7, 6, generator=generator, dtype=torch.float64)
    scales = torch.rand(7, 3, generator=generator, dtype=torch.float64)
    operator = torch.zeros(6, 6, dtype=torch.float64)
    for k in range(3):
        operator[2 * k, 2 * k + 1], operator[2 * k + 1, 2 * k] = -1, 1
    rotated = r @ operator  # rows (R^T r)^T
    torch.testing.assert_close(losses.general_preference_score(c, r), (c * rotated).sum(1))
    expected = (c * rotated * scales.repeat_interleave(2, dim=1)).sum(1)
    torch.testing.assert_close(losses.general_preference_score(c, r, scales), expected)


def test_preference_score_is_antisymmetric_and_of_oneself_zero():
    c, r, scales = torch.randn(7, 6), torch.randn(7, 6), torch.rand(7, 3)
    assert torch.equal(losses.general_preference_score(c, r, scales), -losses.general_preference_score(r, c, scales))
    assert losses.general_preference_score(c, c).eq(0).all()


def test_ones_as_scales_change_nothing():
    c, r = torch.randn(2, 7, 6)
    assert torch.equal(losses.general_preference_score(c, r, torch.ones(7, 3)), losses.general_preference_score(c, r))


def test_preferences_may_be_cyclic():
    """Three embeddings at 120 degrees: each beats the next by sin 120, as rock, paper, scissors."""
    angles = torch.tensor([0.0, 2.0, 4.0], dtype=torch.float64) * math.pi / 3
    embeddings = torch.stack([angles.cos(), angles.sin()], dim=1)
    scores = losses.general_preference_score(embeddings, embeddings.roll(-1, dims=0))
    torch.testing.assert_close(scores, torch.full((3,), math.sqrt(3) / 2, dtype=torch.float64))


def test_preference_score_gradient_precision_and_extremes():
    c, r = torch.randn(2, 3, 4, dtype=torch.float64)
    scales = torch.rand(3, 2, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (c.clone(), r.clone(), scales)]
    assert torch.autograd.gradcheck(losses.general_preference_score, leaves)
    half = c.bfloat16(), r.bfloat16()
    assert losses.general_preference_score(*half).dtype == torch.float32
    assert torch.equal(
        losses.general_preference_score(*half), losses.general_preference_score(*(x.float() for x in half))
    )
    large = torch.full((1, 4), 1e4) * torch.tensor([1.0, -1.0, 1.0, 1.0])
    loss = losses.general_preference_loss(losses.general_preference_score(large, large.flip(1)), tau=0.1)
    assert loss.isfinite().all()


@pytest.mark.parametrize(
    ("c", "r", "scales"),
    [
        ((4, 3), (4, 3), None),
        ((4, 6), (4, 4), None),
        ((4, 6), (3, 6), None),
        ((4, 6), (4, 6), (4, 6)),
        ((4, 6), (4, 6), (4,)),
        ((6,), (6,), None),
    ],
)
def test_embeddings_that_do_not_fit_are_refused(c, r, scales):
    given = [torch.zeros(shape) for shape in (c, r, scales) if shape is not None]
    with pytest.raises(ValueError) as error:
        losses.general_preference_score(*given)
    assert all(str(tuple(x.shape)) in str(error.value) for x in given)
