"""Online weights: the sliding window by hand, Thompson sampling against its definition, resumption to the bit."""

import json

import numpy as np
import pytest
import torch

from prefopt.references.weights import SlidingWindowWeights, ThompsonSampling

FIRST = torch.tensor([[1.0, 0.0], [1.0, 2.0]])  # sums 1, 3; ratios (1/2, 0), (1/2, 1)
SECOND = torch.tensor([[9.0, 0.0], [1.0, 0.0]])  # sums 9, 1; ratios (0.9, uniform 0.5), (0.1, 0.5)


def test_window_starts_uniform_and_looks_one_step_back():
    weights = SlidingWindowWeights(2)
    assert weights.weights().tolist() == [0.5, 0.5]
    weights.update(FIRST)
    assert weights.weights().tolist() == [0.25, 0.75]
    weights.update(SECOND)
    torch.testing.assert_close(weights.weights(), torch.tensor([0.9, 0.1]))


def test_window_of_two_and_both_reductions():
    """Ratio of means: (1 + 9) : (3 + 1) = 10 : 4. Mean of ratios over the four pairs: (0.5 + 0 + 0.9 + 0.5) / 4."""
    by_means = SlidingWindowWeights(2, window=2)
    by_ratios = SlidingWindowWeights(2, window=2, reduce="mean_of_ratios")
    for batch in (torch.full((2, 2), 7.0), FIRST, SECOND):  # the first has left the window
        by_means.update(batch)
        by_ratios.update(batch)
    torch.testing.assert_close(by_means.weights(), torch.tensor([10 / 14, 4 / 14]))
    torch.testing.assert_close(by_ratios.weights(), torch.tensor([0.475, 0.525]))


def test_one_hot_starts_at_the_given_reference_and_follows_the_largest_mean():
    weights = SlidingWindowWeights(3, one_hot=True, initial=2)
    assert weights.weights().tolist() == [0.0, 0.0, 1.0]
    weights.update(torch.tensor([[1.0, 1.0], [0.0, 3.0], [1.0, 1.5]]))
    assert weights.weights().tolist() == [0.0, 1.0, 0.0]


def test_a_window_without_confidence_gives_the_initial_weights():
    for one_hot in (False, True):
        weights = SlidingWindowWeights(2, one_hot=one_hot, initial=1)
        weights.update(torch.zeros(2, 3))
        assert weights.weights().tolist() == [0.0, 1.0]
    weights = SlidingWindowWeights(2, initial=[0.2, 0.8])
    weights.update(torch.zeros(2, 3))
    torch.testing.assert_close(weights.weights(), torch.tensor([0.2, 0.8]))


def test_window_arguments():
    for arguments in ({"window": 0}, {"reduce": "mean"}, {"initial": 2}, {"initial": [0.5, 0.6]}):
        with pytest.raises(ValueError):
            SlidingWindowWeights(2, **arguments)
    with pytest.raises(ValueError, match="3 references, expected 2"):
        SlidingWindowWeights(2).update(torch.zeros(3, 1))


def test_thompson_draws_are_beta_posteriors():
    """The choices are the arg max of independent Beta(p + s, p + f) draws; 4,000 of them against NumPy's own rate."""
    sampler = ThompsonSampling(2, prior=2, seed=3)
    for _ in range(6):
        sampler.update(0, before=0.5, after=0.6)
        sampler.update(1, before=0.5, after=0.4)
    assert (sampler.successes, sampler.failures) == ([6.0, 0.0], [0.0, 6.0])
    rng = np.random.default_rng(0)
    rate = (rng.beta(8, 2, 200_000) < rng.beta(2, 8, 200_000)).mean()
    chosen = sum(sampler.select() for _ in range(4000)) / 4000
    assert chosen == pytest.approx(rate, abs=5 * (rate * (1 - rate) / 4000) ** 0.5)


def test_thompson_with_a_flat_prior_explores_and_learns():
    sampler = ThompsonSampling(3, prior=5, seed=0)
    choices = []
    for _ in range(300):
        arm = sampler.select()
        choices.append(arm)
        sampler.update(arm, before=0.0, after=1.0 if arm == 1 else -1.0)
    assert set(choices) == {0, 1, 2}
    assert choices[-50:].count(1) >= 48
    assert sum(sampler.successes) + sum(sampler.failures) == 300


def test_a_tie_is_a_failure_unless_skipped():
    strict, lenient = ThompsonSampling(2, prior=5, seed=0), ThompsonSampling(2, prior=5, seed=0, ties="skip")
    for sampler in (strict, lenient):
        sampler.update(1, before=0.5, after=0.5)
    assert (strict.successes, strict.failures) == ([0.0, 0.0], [0.0, 1.0])
    assert (lenient.successes, lenient.failures) == ([0.0, 0.0], [0.0, 0.0])


def test_discount_fades_old_steps():
    """Three successes at discount 1/2: 1 + 1/2 + 1/4; the other arm's single one has faded to 1/8."""
    sampler = ThompsonSampling(2, prior=1, seed=0, discount=0.5)
    sampler.update(1, before=0.0, after=1.0)
    for _ in range(3):
        sampler.update(0, before=0.0, after=1.0)
    assert sampler.successes == [1.75, 0.125]


def test_thompson_arguments():
    for arguments in ({"prior": 0}, {"ties": "win"}, {"discount": 0.0}, {"discount": 1.5}):
        with pytest.raises(ValueError):
            ThompsonSampling(2, **{"prior": 1, "seed": 0, **arguments})
    sampler = ThompsonSampling(2, prior=1, seed=0)
    with pytest.raises(ValueError, match="reference number 2"):
        sampler.update(2, before=0.0, after=1.0)
    with pytest.raises(ValueError, match="finite"):
        sampler.update(0, before=0.0, after=float("nan"))


def _run(sampler, steps):
    choices = []
    for step in steps:
        arm = sampler.select()
        sampler.update(arm, before=0.0, after=float((arm + step) % 2))
        choices.append(arm)
    return choices


def test_resumed_thompson_goes_on_as_if_never_stopped():
    whole = _run(ThompsonSampling(4, prior=2, seed=7, discount=0.99), range(40))
    first = ThompsonSampling(4, prior=2, seed=7, discount=0.99)
    head = _run(first, range(25))
    second = ThompsonSampling(4, prior=2, seed=999, discount=0.99)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert head + _run(second, range(25, 40)) == whole
    assert _run(ThompsonSampling(4, prior=2, seed=8), range(40)) != whole  # the seed matters
    with pytest.raises(ValueError, match="for 4 references"):
        ThompsonSampling(3, prior=2, seed=0).load_state_dict(first.state_dict())


def test_resumed_window_is_the_same_to_the_bit():
    generator = torch.Generator().manual_seed(0)
    batches = [torch.rand(3, 5, generator=generator) for _ in range(6)]
    whole = SlidingWindowWeights(3, window=4, reduce="mean_of_ratios")
    head = SlidingWindowWeights(3, window=4, reduce="mean_of_ratios")
    for batch in batches[:4]:
        whole.update(batch)
        head.update(batch)
    resumed = SlidingWindowWeights(3, window=4, reduce="mean_of_ratios")
    resumed.load_state_dict(json.loads(json.dumps(head.state_dict())))
    for batch in batches[4:]:
        whole.update(batch)
        resumed.update(batch)
        assert torch.equal(whole.weights(), resumed.weights())
