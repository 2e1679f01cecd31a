"""The trust region of MRPO: references kept near an anchor."""

from __future__ import annotations

import pytest
import torch

from prefopt import losses

K = 3


def scores(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return -6 + 10 * (torch.rand(K, 50, generator=generator, dtype=torch.float64) - 0.5)


def test_trust_region_by_hand():
    """Anchor (-100, -300), other (-140, -300): b = (-120, -300), eps = 0.07 * (2/7, 5/7) = (0.02, 0.05).

    The other's -140 is below (1 + 0.02) * -100 and becomes -102; -300 is the anchor's own value and stays.
    """
    chosen = torch.tensor([[-100.0], [-140.0]], dtype=torch.float64)
    rejected = torch.tensor([[-300.0], [-300.0]], dtype=torch.float64)
    clipped = losses.clip_to_anchor(chosen, rejected, anchor=0, max_eps=0.07)
    torch.testing.assert_close(clipped[0], torch.tensor([[-100.0], [-102.0]], dtype=torch.float64))
    assert torch.equal(clipped[1], rejected)


@pytest.mark.parametrize("anchor", range(K))
@pytest.mark.parametrize("max_eps", [0.0, 0.1, 0.9])
def test_trust_region_holds_every_reference_near_the_anchor(anchor, max_eps):
    chosen, rejected = scores(0), scores(1)
    eps = max_eps * chosen.mean(0) / (chosen.mean(0) + rejected.mean(0))
    clipped = losses.clip_to_anchor(chosen, rejected, anchor=anchor, max_eps=max_eps)
    for before, after, share in zip((chosen, rejected), clipped, (eps, max_eps - eps), strict=True):
        relative = after / before[anchor]
        assert torch.equal(after[anchor], before[anchor])
        assert (relative <= 1 + share + 1e-12).all()
        assert (relative >= 1 - share - 1e-12).all()
        inside = (before / before[anchor] - 1).abs() <= share
        assert torch.equal(after[inside], before[inside])
        assert not inside.all()


def test_trust_region_of_certain_completions_is_finite():
    """Log-probabilities of 0 on both sides: the distances are 0 / 0 by the formula, shared equally here."""
    zeros = torch.zeros(2, 3)
    assert all(torch.equal(side, zeros) for side in losses.clip_to_anchor(zeros, zeros, anchor=1))
    extreme = torch.tensor([[-2000.0], [-1e4]])
    assert all(side.isfinite().all() for side in losses.clip_to_anchor(extreme, torch.zeros(2, 1), anchor=0))


def test_half_precision_is_computed_in_float32_and_gradients_are_derivatives():
    half = scores(0).bfloat16(), scores(1).bfloat16()
    clipped = losses.clip_to_anchor(*half, anchor=0)
    assert [side.dtype for side in clipped] == [torch.float32] * 2
    for side, same in zip(clipped, losses.clip_to_anchor(*(x.float() for x in half), anchor=0), strict=True):
        assert torch.equal(side, same)
    leaves = [scores(seed)[:, :4].clone().requires_grad_() for seed in (0, 1)]
    assert torch.autograd.gradcheck(lambda c, r: losses.clip_to_anchor(c, r, anchor=1), leaves)


def test_wrong_shapes_and_settings_are_refused_by_name():
    chosen, rejected = scores(0), scores(1)
    with pytest.raises(ValueError, match=r"\(3, 50\).*\(3, 4\)"):
        losses.clip_to_anchor(chosen, rejected[:, :4], anchor=0)
    with pytest.raises(ValueError, match=r"\(50,\)"):
        losses.clip_to_anchor(chosen[0], rejected[0], anchor=0)
    for anchor in (-1, K):
        with pytest.raises(ValueError, match="anchor"):
            losses.clip_to_anchor(chosen, rejected, anchor=anchor)
    for eps in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="max_eps"):
            losses.clip_to_anchor(chosen, rejected, anchor=0, max_eps=eps)
