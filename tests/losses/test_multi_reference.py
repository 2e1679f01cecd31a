"""Mixtures of references and multi-reference DPO."""

from __future__ import annotations

import math
from math import log

import pytest
import torch

from prefopt import losses

MODES = ["harmonic", "geometric", "arithmetic"]
each_mode = pytest.mark.parametrize("mode", MODES)
K, B = 3, 5


def scores(*shape: int, seed: int = 0, spread: float = 4.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return -6 + spread * (torch.rand(*shape, generator=generator, dtype=torch.float64) - 0.5)


def shares(*shape: int, seed: int = 9) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(*shape, generator=generator, dtype=torch.float64) + 0.1
    return weights / weights.sum(dim=0)


def mixed_dpo(policy, references, weights, mode, beta=0.7):
    """DPO against the mixture; policy and references are (chosen, rejected)."""
    chosen, rejected = (losses.mixture_logps(side, weights, mode=mode) for side in references)
    return losses.dpo_loss(policy[0] - chosen, policy[1] - rejected, beta=beta)


def multi_dpo(policy, references, weights, beta=0.7):
    return losses.multi_dpo_loss(policy[0] - policy[1], references[0] - references[1], weights, beta=beta)


POLICY = scores(B, seed=1), scores(B, seed=2)
REFERENCES = scores(K, B, seed=3), scores(K, B, seed=4)
ALL = {**{mode: lambda *args, mode=mode: mixed_dpo(*args, mode) for mode in MODES}, "multi_dpo": multi_dpo}
each_method = pytest.mark.parametrize("method", ALL.values(), ids=ALL.keys())


def test_mixtures_by_hand():
    """Probabilities 1/2 and 1/4, weights 1/4 and 3/4.

    Harmonic: 1 / (1/4 * 2 + 3/4 * 4) = 2/7. Geometric: (1/2)^(1/4) (1/4)^(3/4) = 2^(-7/4).
    Arithmetic: 1/4 * 1/2 + 3/4 * 1/4 = 5/16.
    """
    logps = torch.tensor([[log(1 / 2)], [log(1 / 4)]], dtype=torch.float64)
    weights = torch.tensor([0.25, 0.75], dtype=torch.float64)
    for mode, expected in [("harmonic", 2 / 7), ("geometric", 2**-1.75), ("arithmetic", 5 / 16)]:
        mixed = losses.mixture_logps(logps, weights, mode=mode)
        assert mixed.exp().item() == pytest.approx(expected, rel=1e-12)


def test_multi_dpo_by_hand():
    """Policy margin 0, reference margins -ln 3 and ln 3, beta 1, weights 1/4 and 3/4: 1/4 ln 4/3 + 3/4 ln 4."""
    margins = torch.tensor([[-log(3)], [log(3)]], dtype=torch.float64)
    weights = torch.tensor([0.25, 0.75], dtype=torch.float64)
    loss = losses.multi_dpo_loss(torch.zeros(1, dtype=torch.float64), margins, weights, beta=1.0)
    assert loss.item() == pytest.approx(0.25 * log(4 / 3) + 0.75 * log(4), rel=1e-12)


def test_forward_kl_by_hand():
    """References agree: exp of (l_ref - l) is 2 for chosen and 3 for rejected, so -ln sigmoid(ln 3 (3 - 2)) = ln
    4/3."""
    references = torch.full((2, 1), -1.0, dtype=torch.float64)
    chosen = torch.tensor([-1 - log(2)], dtype=torch.float64)
    rejected = torch.tensor([-1 - log(3)], dtype=torch.float64)
    weights = torch.tensor([0.5, 0.5])
    settings = {"beta": log(3), "max_exponent": 10.0}
    loss = losses.forward_kl_loss(chosen, rejected, references, references, weights, **settings)
    assert loss.item() == pytest.approx(log(4 / 3), rel=1e-12)


@each_mode
@pytest.mark.parametrize("weights", [shares(K), shares(K, B)], ids=["K", "KB"])
def test_mixtures_equal_sums_of_probabilities(mode, weights):
    logps = REFERENCES[0]
    mixed = losses.mixture_logps(logps, weights, mode=mode)
    for b in range(B):
        a = [(weights[k] if weights.ndim == 1 else weights[k, b]).item() for k in range(K)]
        p = [math.exp(logps[k, b]) for k in range(K)]
        expected = {
            "harmonic": 1 / sum(x / y for x, y in zip(a, p, strict=True)),
            "geometric": math.prod(y**x for x, y in zip(a, p, strict=True)),
            "arithmetic": sum(x * y for x, y in zip(a, p, strict=True)),
        }[mode]
        assert mixed[b].item() == pytest.approx(log(expected), rel=1e-9)


def test_multi_dpo_and_forward_kl_equal_their_equations():
    weights = shares(K, B)
    multi = multi_dpo(POLICY, REFERENCES, weights, beta=0.7)
    settings = {"beta": 0.7, "max_exponent": 5.0}
    forward = losses.forward_kl_loss(*POLICY, *REFERENCES, weights, **settings)
    for b in range(B):
        policy = [side[b].item() for side in POLICY]
        refs = [[side[k, b].item() for k in range(K)] for side in REFERENCES]
        a = weights[:, b].tolist()
        logits = [0.7 * (policy[0] - policy[1] - refs[0][k] + refs[1][k]) for k in range(K)]
        assert multi[b].item() == pytest.approx(sum(a[k] * log(1 + math.exp(-logits[k])) for k in range(K)), rel=1e-9)
        mixed = [sum(a[k] * math.exp(refs[side][k]) for k in range(K)) / math.exp(policy[side]) for side in (0, 1)]
        assert forward[b].item() == pytest.approx(log(1 + math.exp(-0.7 * (mixed[1] - mixed[0]))), rel=1e-9)


@each_method
def test_one_reference_is_dpo(method):
    references = REFERENCES[0][:1], REFERENCES[1][:1]
    expected = losses.dpo_loss(POLICY[0] - references[0][0], POLICY[1] - references[1][0], beta=0.7)
    torch.testing.assert_close(method(POLICY, references, torch.ones(1)), expected, rtol=1e-12, atol=0)


@each_method
@pytest.mark.parametrize("weights", [shares(K), shares(K, B)], ids=["K", "KB"])
def test_equal_references_are_one(method, weights):
    references = tuple(side[:1].expand(K, B) for side in REFERENCES)
    expected = losses.dpo_loss(POLICY[0] - references[0][0], POLICY[1] - references[1][0], beta=0.7)
    torch.testing.assert_close(method(POLICY, references, weights), expected, rtol=1e-12, atol=0)


@each_mode
@pytest.mark.parametrize("chosen_row", range(K))
def test_one_hot_weights_give_that_reference_exactly(mode, chosen_row):
    one_hot = torch.nn.functional.one_hot(torch.tensor(chosen_row), K).double()
    far_apart = torch.tensor([[-300.0] * B, [-340.0] * B, [-2000.0] * B], dtype=torch.float64) + REFERENCES[0]
    assert torch.equal(losses.mixture_logps(far_apart, one_hot, mode=mode), far_apart[chosen_row])
    multi = losses.multi_dpo_loss(POLICY[0] - POLICY[1], far_apart, one_hot, beta=0.7)
    assert torch.equal(multi, losses.dpo_loss(POLICY[0] - POLICY[1], far_apart[chosen_row], beta=0.7))


@each_method
@pytest.mark.parametrize("broken", [float("-inf"), float("nan"), -1e30, 0.0])
def test_a_reference_of_weight_zero_is_left_out_of_value_and_gradient(method, broken):
    policy = tuple(side.clone().requires_grad_() for side in POLICY)
    references = tuple(side.clone() for side in REFERENCES)
    references[0][1] = broken
    for side in references:
        side.requires_grad_()
    loss = method(policy, references, torch.tensor([0.25, 0.0, 0.75]))
    expected = method(POLICY, tuple(side[[0, 2]] for side in REFERENCES), torch.tensor([0.25, 0.75]))
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    gradients = torch.autograd.grad(loss.sum(), [*policy, *references])
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert gradients[2][1].eq(0).all()


def test_a_reference_may_be_left_out_of_some_examples_only():
    weights = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    logps = torch.tensor([[-3.0, float("nan")], [float("-inf"), -7.0]])
    for mode in MODES:
        assert losses.mixture_logps(logps, weights, mode=mode).tolist() == [-3.0, -7.0]


@each_method
def test_the_order_of_references_does_not_matter(method):
    order = torch.tensor([2, 0, 1])
    weights = shares(K)
    permuted = method(POLICY, tuple(side[order] for side in REFERENCES), weights[order])
    torch.testing.assert_close(permuted, method(POLICY, REFERENCES, weights), rtol=1e-12, atol=0)


@each_method
def test_weights_of_all_examples_are_the_repeated_weights(method):
    weights = shares(K)
    assert torch.equal(method(POLICY, REFERENCES, weights), method(POLICY, REFERENCES, weights[:, None].repeat(1, B)))


@each_method
def test_weights_carry_no_gradient(method):
    policy = tuple(side.clone().requires_grad_() for side in POLICY)
    weights = shares(K).requires_grad_()
    method(policy, REFERENCES, weights).sum().backward()
    assert policy[0].grad.abs().sum() > 0
    assert weights.grad is None


@pytest.mark.parametrize("method", [ALL["geometric"], ALL["multi_dpo"]], ids=["geometric", "multi_dpo"])
def test_a_constant_on_both_sides_of_a_reference_cancels(method):
    shift = torch.tensor([[3.0], [-40.0], [7.0]], dtype=torch.float64)
    shifted = tuple(side + shift for side in REFERENCES)
    weights = shares(K, B)
    torch.testing.assert_close(method(POLICY, shifted, weights), method(POLICY, REFERENCES, weights))


@pytest.mark.parametrize("spread", [0.1, 4.0, 300.0])
def test_harmonic_below_geometric_below_arithmetic(spread):
    logps, weights = scores(K, 200, spread=spread), shares(K, 200)
    harmonic, geometric, arithmetic = (losses.mixture_logps(logps, weights, mode=mode) for mode in MODES)
    assert (harmonic <= geometric).all()
    assert (geometric <= arithmetic).all()
    assert (logps.min(dim=0).values <= harmonic).all()
    assert (arithmetic <= logps.max(dim=0).values).all()


def test_multi_dpo_is_at_least_the_geometric_loss():
    policy = scores(200, seed=5), scores(200, seed=6)
    references = scores(K, 200, seed=7), scores(K, 200, seed=8)
    weights = shares(K, 200)
    gap = multi_dpo(policy, references, weights) - mixed_dpo(policy, references, weights, "geometric")
    assert (gap >= -1e-12).all()
    assert gap.max() > 0.01


def test_a_broken_reference_pulls_with_at_most_its_weight():
    """A reference 1e4 nats off: multi-DPO's gradient from it is beta a_k, geometric DPO's whole gradient is lost."""
    policy = tuple(torch.zeros(1, dtype=torch.float64, requires_grad=True) for _ in range(2))
    references = tuple(torch.tensor([[0.0], [value]], dtype=torch.float64) for value in (1e4, -1e4))
    weights = torch.tensor([0.75, 0.25])
    (pull,) = torch.autograd.grad(multi_dpo(policy, references, weights, beta=1.0).sum(), policy[0])
    (lost,) = torch.autograd.grad(mixed_dpo(policy, references, weights, "geometric", beta=1.0).sum(), policy[0])
    assert pull.item() == pytest.approx(-(0.75 * 0.5 + 0.25))
    assert lost.item() == pytest.approx(-1.0)


@each_method
@pytest.mark.parametrize("value", [-2000.0, -1e4, 0.0])
def test_extreme_scores_stay_finite(method, value):
    policy = tuple(torch.full((2,), v, requires_grad=True) for v in (value, -5.0))
    references = tuple(torch.tensor([[-2000.0, 0.0], [-1e4, -1.0], [value, -3.0]]) for _ in range(2))
    references[1].mul_(0.5)
    loss = method(policy, references, torch.tensor([0.5, 1e-30, 0.5]))
    assert loss.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss.sum(), policy))


@pytest.mark.parametrize("policy_side", [(-2000.0, 0.0), (0.0, -2000.0), (-1e4, -1e4), (0.0, 0.0)])
def test_forward_kl_is_finite_at_its_largest_cap(policy_side):
    policy = [torch.full((2,), v, requires_grad=True) for v in policy_side]
    references = torch.tensor([[-2000.0, 0.0], [-1.0, -1.0]]), torch.tensor([[0.0, -2000.0], [-1.0, -1e4]])
    settings = {"beta": 10.0, "max_exponent": 80.0}
    loss = losses.forward_kl_loss(*policy, *references, torch.tensor([0.5, 0.5]), **settings)
    assert loss.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss.sum(), policy))


def test_gradients_are_derivatives():
    weights = torch.tensor([0.25, 0.0, 0.75])
    policy = [side.clone().requires_grad_() for side in POLICY]
    references = [side.clone().requires_grad_() for side in REFERENCES]
    for mode in MODES:
        assert torch.autograd.gradcheck(
            lambda x, mode=mode: losses.mixture_logps(x, weights, mode=mode), references[:1]
        )
    assert torch.autograd.gradcheck(
        lambda p, r: losses.multi_dpo_loss(p, r, weights, beta=0.7), [policy[0], references[0]]
    )
    assert torch.autograd.gradcheck(
        lambda *x: losses.forward_kl_loss(*x, weights, beta=0.7, max_exponent=20.0), policy + references
    )


def test_half_precision_is_computed_in_float32_and_weights_do_not_widen():
    half = REFERENCES[0].bfloat16()
    weights = shares(K)
    for mode in MODES:
        mixed = losses.mixture_logps(half, weights, mode=mode)
        assert mixed.dtype == torch.float32
        assert torch.equal(mixed, losses.mixture_logps(half.float(), weights, mode=mode))
    assert losses.multi_dpo_loss(POLICY[0].bfloat16(), half, weights.bfloat16(), beta=0.1).dtype == torch.float32


def test_values_on_a_device_are_never_looked_at():
    policy, references = torch.empty(2, B, device="meta"), torch.empty(2, K, B, device="meta")
    weights = torch.empty(K, device="meta")
    for method in ALL.values():
        assert method(policy, references, weights).shape == (B,)
    loss = losses.forward_kl_loss(*policy, *references, weights, beta=0.1, max_exponent=5.0)
    assert loss.device.type == "meta"


def test_wrong_shapes_are_refused():
    weights = shares(K)
    for bad in (shares(K + 1), shares(K, B + 1), shares(B, K), torch.tensor(1.0), torch.ones(1)):
        with pytest.raises(ValueError, match=r"\(3, 5\).*weights"):
            losses.mixture_logps(REFERENCES[0], bad, mode="geometric")
        with pytest.raises(ValueError, match=r"\(5,\).*\(3, 5\).*weights"):
            losses.multi_dpo_loss(POLICY[0], REFERENCES[0], bad, beta=0.1)
    with pytest.raises(ValueError, match=r"\(5,\)"):
        losses.mixture_logps(POLICY[0], weights, mode="geometric")
    with pytest.raises(ValueError, match=r"\(4,\).*\(3, 5\)"):
        losses.multi_dpo_loss(POLICY[0][:4], REFERENCES[0], weights, beta=0.1)
    with pytest.raises(ValueError, match=r"\(5,\).*\(3, 5\).*\(2, 5\)"):
        losses.forward_kl_loss(*POLICY, REFERENCES[0], REFERENCES[1][:2], weights, beta=0.1, max_exponent=5.0)


def test_weights_that_are_no_weights_are_refused():
    for bad in (torch.tensor([1.0, 1.0, 1.0]), torch.tensor([1.5, -0.5, 0.0]), torch.tensor([float("nan"), 0.5, 0.5])):
        with pytest.raises(ValueError, match="sum to 1"):
            losses.mixture_logps(REFERENCES[0], bad, mode="harmonic")


def test_settings_out_of_range_are_refused_by_name():
    weights = shares(K)
    with pytest.raises(ValueError, match="mode must be one of harmonic, geometric, arithmetic"):
        losses.mixture_logps(REFERENCES[0], weights, mode="mean")
    for beta in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="beta"):
            losses.multi_dpo_loss(POLICY[0], REFERENCES[0], weights, beta=beta)
        with pytest.raises(ValueError, match="beta"):
            losses.forward_kl_loss(*POLICY, *REFERENCES, weights, beta=beta, max_exponent=5.0)
    for cap in (0.0, -1.0, 81.0, float("nan")):
        with pytest.raises(ValueError, match="max_exponent"):
            losses.forward_kl_loss(*POLICY, *REFERENCES, weights, beta=0.1, max_exponent=cap)
