"""Ranking, adversarial and RRHF losses."""

from __future__ import annotations

import math
from math import log

import pytest
import torch

from prefopt import losses
from prefopt.losses.reward import ranked_pairs


def batch(prompts=4, responses=5, seed=0):
    """Rewards, scores with ties, and a mask with padding."""
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(prompts, responses, generator=generator, dtype=torch.float64)
    scores = torch.randint(0, 4, (prompts, responses), generator=generator).double()
    mask = torch.rand(prompts, responses, generator=generator) > 0.3
    return rewards, scores, mask


def ranking_by_loops(rewards, scores, mask, coefficients, kind):
    """Both directions of each pair and the sign of the score difference, as the equation is printed."""
    total, count = 0.0, 0
    for b in range(len(rewards)):
        for i in range(len(rewards[b])):
            for j in range(len(rewards[b])):
                if not (mask[b][i] and mask[b][j]) or scores[b][i] == scores[b][j]:
                    continue
                sign = 1 if scores[b][j] > scores[b][i] else -1
                x = sign * (rewards[b][j] - rewards[b][i])
                total += coefficients[b] * (-log(1 + math.exp(-x)) if kind == "logistic" else x)
                count += 1
    return -total / count


@pytest.mark.parametrize(
    ("rewards", "scores", "kind", "expected"),
    [
        ([2.0, 1.0], [1.0, 0.0], "logistic", 0.3132617),
        ([2.0, 1.0], [0.0, 1.0], "logistic", 1.3132617),
        ([2.0, 1.0], [1.0, 0.0], "difference", -1.0),
        ([2.0, 1.0, 0.5], [0.1, 0.9, 0.5], "logistic", 1.1629175),
        ([2.0, 1.0, 0.5], [0.9, 0.1, 0.1], "logistic", 0.2573375),
    ],
)
def test_ranking_values(rewards, scores, kind, expected):
    """ln(1 + e^-1) = 0.3132617 in order, ln(1 + e) = 1.3132617 against it; three responses are means over pairs:

    (ln(1 + e) + ln(1 + e^1.5) + ln(1 + e^-0.5)) / 3 = 1.1629175, and with a tie (ln(1 + e^-1) + ln(1 + e^-1.5)) / 2.
    """
    loss = losses.ranking_loss(torch.tensor([rewards]), torch.tensor([scores]), kind=kind)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_padding_is_what_the_mask_says_and_not_a_negative_score():
    rewards, scores = torch.tensor([[2.0, 1.0, 9.0]]), torch.tensor([[1.0, 0.0, -1.0]])
    masked = losses.ranking_loss(rewards, scores, mask=torch.tensor([[True, True, False]]))
    assert masked.item() == pytest.approx(0.3132617, abs=1e-6)
    assert losses.ranking_loss(rewards, scores).item() > 4


def test_adversarial_value():
    """Rewards (2, 1) human and (0, 1) adversarial, each ranked 1 over 0; two pairs in all.

    Human: ln(1 + e^-1) / 2 = 0.1566308. Adversarial: ln(1 + e) / 2 = 0.6566309. Sum: 0.1566308 + 0.1 / 4 * 0.6566309.
    """
    rewards, scores = torch.tensor([[2.0, 1.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    is_adversarial = torch.tensor([False, True])
    settings = {"adversarial_coeff": 0.1, "num_samples": 4}
    for flags in (is_adversarial, is_adversarial.long(), is_adversarial.float()):
        loss = losses.adversarial_reward_loss(rewards, scores, flags, **settings)
        assert loss.item() == pytest.approx(0.1730466, abs=1e-6)
    human = losses.ranking_loss(rewards, scores, coefficients=torch.tensor([1.0, 0.0]))
    adversarial = losses.ranking_loss(rewards, scores, coefficients=torch.tensor([0.0, 1.0]))
    assert human.item() == pytest.approx(0.1566308, abs=1e-6)
    assert adversarial.item() == pytest.approx(0.6566309, abs=1e-6)


def test_kind_is_that_of_the_adversarial_term_only():
    """Difference: the adversarial row gives -(0 - 1) / 2 = 1/2 instead, the human row is logistic as before."""
    rewards, scores = torch.tensor([[2.0, 1.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    settings = {"adversarial_coeff": 0.1, "num_samples": 4, "human_coeff": 2.0, "kind": "difference"}
    loss = losses.adversarial_reward_loss(rewards, scores, torch.tensor([0, 1]), **settings)
    assert loss.item() == pytest.approx(2 * 0.1566308 + 0.025 * 0.5, abs=1e-6)


@pytest.mark.parametrize("kind", ["logistic", "difference"])
def test_ranking_equals_loops_over_pairs(kind):
    rewards, scores, mask = batch()
    coefficients = torch.tensor([1.0, 0.25, 0.0, 2.0], dtype=torch.float64)
    loss = losses.ranking_loss(rewards, scores, mask=mask, coefficients=coefficients, kind=kind)
    expected = ranking_by_loops(rewards.tolist(), scores.tolist(), mask.tolist(), coefficients.tolist(), kind)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_coefficients_carry_no_gradient():
    rewards, scores, mask = batch()
    coefficients = torch.ones(4, dtype=torch.float64, requires_grad=True)
    losses.ranking_loss(rewards.requires_grad_(), scores, mask=mask, coefficients=coefficients).backward()
    assert rewards.grad.abs().sum() > 0
    assert coefficients.grad is None


def test_ranked_pairs_is_the_number_that_is_divided_by():
    rewards, scores, mask = batch()
    summed = sum(
        losses.ranking_loss(rewards[b : b + 1], scores[b : b + 1], mask=mask[b : b + 1])
        * ranked_pairs(scores[b : b + 1], mask[b : b + 1]).sum()
        for b in range(len(rewards))
    )
    torch.testing.assert_close(
        summed / ranked_pairs(scores, mask).sum(), losses.ranking_loss(rewards, scores, mask=mask)
    )


def test_only_human_rows_is_the_ranking_loss():
    rewards, scores, mask = batch()
    human = losses.adversarial_reward_loss(
        rewards, scores, torch.zeros(4), adversarial_coeff=0.1, num_samples=4, mask=mask
    )
    torch.testing.assert_close(human, losses.ranking_loss(rewards, scores, mask=mask))
    adversarial = losses.adversarial_reward_loss(
        rewards, scores, torch.ones(4), adversarial_coeff=0.1, num_samples=4, mask=mask
    )
    torch.testing.assert_close(adversarial, 0.025 * losses.ranking_loss(rewards, scores, mask=mask))


def test_a_ranked_pair_is_bradley_terry_and_rows_of_pairs_are_its_mean():
    rewards = batch(responses=2)[0]
    scores = torch.tensor([[1.0, 0.0]] * 4)
    expected = losses.bradley_terry_loss(rewards[:, 0], rewards[:, 1]).mean()
    torch.testing.assert_close(losses.ranking_loss(rewards, scores), expected, rtol=1e-12, atol=0)


def test_rrhf_by_hand():
    """p = (-1, -2, -3) against scores (1, 2, 3): (2 - 1) + (3 - 1) + (3 - 2) = 4; in order of the scores, 0."""
    p = torch.tensor([[-1.0, -2.0, -3.0], [-3.0, -2.0, -1.0]])
    scores = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    assert losses.rrhf_loss(p, scores).tolist() == [4.0, 0.0]


def test_rrhf_equals_loops_over_pairs():
    p, scores, mask = batch()
    expected = [
        sum(
            max(0.0, p[b, i].item() - p[b, j].item())
            for i in range(5)
            for j in range(5)
            if mask[b, i] and mask[b, j] and scores[b, i] < scores[b, j]
        )
        for b in range(4)
    ]
    assert losses.rrhf_loss(p, scores, mask=mask).tolist() == pytest.approx(expected, rel=1e-12)


LISTWISE = {
    "logistic": lambda x, s, m: losses.ranking_loss(x, s, mask=m),
    "difference": lambda x, s, m: losses.ranking_loss(x, s, mask=m, kind="difference"),
    "adversarial": lambda x, s, m: losses.adversarial_reward_loss(
        x, s, torch.arange(len(x), device=x.device) % 2, adversarial_coeff=0.5, num_samples=2, mask=m
    ),
    "rrhf": lambda x, s, m: losses.rrhf_loss(x, s, mask=m),
}
each_listwise = pytest.mark.parametrize("loss", LISTWISE.values(), ids=LISTWISE.keys())


@each_listwise
def test_the_order_of_responses_and_more_padding_change_nothing(loss):
    values, scores, mask = batch()
    expected = loss(values, scores, mask)
    order = torch.tensor([3, 1, 4, 0, 2])
    torch.testing.assert_close(loss(values[:, order], scores[:, order], mask[:, order]), expected)
    garbage = torch.tensor([[float("nan"), float("inf"), -1e30]] * 4, dtype=torch.float64)
    padded = (torch.cat([x, y], dim=1) for x, y in [(values, garbage), (scores, garbage), (mask, garbage > 1e99)])
    values, scores, mask = padded
    mask[:, 5:] = False
    values.requires_grad_()
    loss_padded = loss(values, scores, mask)
    torch.testing.assert_close(loss_padded, expected)
    (gradient,) = torch.autograd.grad(loss_padded.sum(), values)
    assert gradient.isfinite().all()
    assert gradient[:, 5:].eq(0).all()


@each_listwise
def test_listwise_gradients_are_derivatives_and_raise_the_better(loss):
    values, scores, mask = batch()
    assert torch.autograd.gradcheck(lambda x: loss(x, scores, mask), values.requires_grad_())
    flat = torch.tensor([[-0.1, 0.0, 0.1]] * 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(flat, torch.tensor([[3.0, 2.0, 1.0]] * 2), None).sum(), flat)
    assert (gradient[:, 0] < 0).all()
    assert (gradient[:, 2] > 0).all()


@each_listwise
def test_listwise_losses_without_any_ranked_pair_are_zero_with_zero_gradient(loss):
    values = torch.randn(2, 3, requires_grad=True)
    nothing = loss(values, torch.ones(2, 3), None), loss(values, torch.rand(2, 3), torch.zeros(2, 3, dtype=torch.bool))
    for value in nothing:
        assert value.eq(0).all()
        assert torch.autograd.grad(value.sum(), values)[0].eq(0).all()


@each_listwise
@pytest.mark.parametrize("size", [2000.0, 1e4])
def test_listwise_extremes_and_half_precision(loss, size):
    values = torch.tensor([[-size, 0.0, size], [size, -size, 0.0]], requires_grad=True)
    scores = torch.tensor([[3.0, 2.0, 1.0]] * 2)
    value = loss(values, scores, None)
    assert value.isfinite().all()
    assert torch.autograd.grad(value.sum(), values)[0].isfinite().all()
    half = values.detach().bfloat16()
    assert loss(half, scores, None).dtype == torch.float32
    assert torch.equal(loss(half, scores, None), loss(half.float(), scores, None))


@each_listwise
def test_listwise_values_are_never_looked_at(loss):
    values, scores = torch.empty(2, 4, 3, device="meta")
    assert loss(values, scores, torch.empty(4, 3, device="meta", dtype=torch.bool)).device.type == "meta"


@each_listwise
def test_listwise_shapes_are_refused(loss):
    values, scores, mask = batch()
    for bad in [(values[:, :3], scores, mask), (values, scores[:2], mask), (values, scores, mask[:, :1])]:
        with pytest.raises(ValueError, match=r"\(4, 5\)"):
            loss(*bad)
    with pytest.raises(ValueError, match=r"\(5,\)"):
        loss(values[0], scores[0], mask[0])


def test_coefficients_flags_and_settings_are_checked():
    rewards, scores, _ = batch()
    with pytest.raises(ValueError, match=r"\(4, 5\).*\(3,\)"):
        losses.ranking_loss(rewards, scores, coefficients=torch.ones(3))
    with pytest.raises(ValueError, match=r"\(4, 5\).*\(4, 5\).*\(4, 1\)"):
        losses.adversarial_reward_loss(rewards, scores, torch.ones(4, 1), adversarial_coeff=0.1, num_samples=4)
    with pytest.raises(ValueError, match="kind must be one of logistic, difference"):
        losses.ranking_loss(rewards, scores, kind="diff")
    good = {"adversarial_coeff": 0.1, "num_samples": 4}
    for bad in ({"adversarial_coeff": -0.1}, {"num_samples": 0}, {"human_coeff": float("nan")}, {"kind": "ranking"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            losses.adversarial_reward_loss(rewards, scores, torch.ones(4), **{**good, **bad})
