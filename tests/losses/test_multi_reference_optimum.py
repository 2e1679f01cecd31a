"""Which loss belongs to which objective: a policy over six outcomes, optimised by brute force.

The policy maximises E r - beta sum_k a_k D_k, D_k being the reverse KL(pi || pi_k) or the forward KL(pi_k || pi). At
that
optimum, a loss that belongs to the objective reads the true reward differences off the policy.
"""

from __future__ import annotations

import pytest
import torch

from prefopt import losses

BETA, OUTCOMES, K = 0.5, 6, 3


def world():
    generator = torch.Generator().manual_seed(2)
    rewards = 2 * torch.rand(OUTCOMES, generator=generator, dtype=torch.float64)
    references = torch.randn(K, OUTCOMES, generator=generator, dtype=torch.float64).mul(1.5).log_softmax(dim=1)
    return rewards, references, torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)


def optimum(direction: str) -> torch.Tensor:
    """Log-probabilities of the best policy, found by following the gradient of the objective itself."""
    rewards, references, weights = world()
    logits = torch.zeros(OUTCOMES, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=2000, tolerance_grad=1e-13, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def cost():
        optimizer.zero_grad()
        policy = logits.log_softmax(dim=0)
        if direction == "reverse":
            divergences = (policy.exp() * (policy - references)).sum(dim=1)
        else:
            divergences = (references.exp() * (references - policy)).sum(dim=1)
        value = -(policy.exp() * rewards).sum() + BETA * (weights * divergences).sum()
        value.backward()
        return value

    optimizer.step(cost)
    return logits.detach().log_softmax(dim=0)


def logit(loss: torch.Tensor) -> torch.Tensor:
    """The number whose negative log-sigmoid `loss` is."""
    return -torch.log(torch.expm1(loss))


def worst_error(losses_of_pairs, chosen, rejected) -> float:
    rewards, _, _ = world()
    return (logit(losses_of_pairs) - (rewards[chosen] - rewards[rejected])).abs().max().item()


def pairs():
    return torch.cartesian_prod(torch.arange(OUTCOMES), torch.arange(OUTCOMES)).unbind(dim=1)


def mixture_error(policy: torch.Tensor, mode: str) -> float:
    _, references, weights = world()
    ratios = policy - losses.mixture_logps(references, weights, mode=mode)
    chosen, rejected = pairs()
    return worst_error(losses.dpo_loss(ratios[chosen], ratios[rejected], beta=BETA), chosen, rejected)


def forward_kl_error(policy: torch.Tensor) -> float:
    _, references, weights = world()
    chosen, rejected = pairs()
    columns = policy[chosen], policy[rejected], references[:, chosen], references[:, rejected]
    return worst_error(losses.forward_kl_loss(*columns, weights, beta=BETA, max_exponent=50.0), chosen, rejected)


def test_geometric_dpo_recovers_rewards_under_the_reverse_kl():
    policy = optimum("reverse")
    assert mixture_error(policy, "geometric") < 1e-5
    assert mixture_error(policy, "harmonic") > 0.05
    assert mixture_error(policy, "arithmetic") > 0.05
    assert forward_kl_error(policy) > 0.05


def test_forward_kl_loss_recovers_rewards_under_the_forward_kl():
    policy = optimum("forward")
    assert forward_kl_error(policy) < 1e-5
    for mode in ("harmonic", "geometric", "arithmetic"):
        assert mixture_error(policy, mode) > 0.05


@pytest.mark.parametrize("cap", [1e-3, 5.0])
def test_the_cap_bounds_the_penalty(cap):
    """Beyond the cap the two exponentials differ by at most exp(cap), and a completion out there gets no gradient."""
    chosen = torch.tensor([-500.0], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([0.0], dtype=torch.float64, requires_grad=True)
    references = torch.zeros(1, 1, dtype=torch.float64)
    loss = losses.forward_kl_loss(chosen, rejected, references, references, torch.ones(1), beta=1.0, max_exponent=cap)
    assert -logit(loss).item() <= torch.tensor(cap).exp().item()
    chosen_gradient, rejected_gradient = torch.autograd.grad(loss.sum(), [chosen, rejected])
    assert chosen_gradient.item() == 0.0
    assert rejected_gradient.item() > 0.0
