"""Reference weights: each by derivation, and where there is nothing to weigh by."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefopt.references.weights import (
    SlidingWindowWeights,
    ThompsonSampling,
    adaptive_weights,
    discriminative_confidence,
    fixed_weights,
    uniform_weights,
    validation_accuracy_weights,
    validation_discrimination_weights,
)
from prefopt.trainers.reference_weighting import weighting_name

CHOSEN = torch.tensor([[-1.0, -2.0, -3.0], [-1.5, -1.0, -2.0]])
REJECTED = torch.tensor([[-1.5, -1.0, -3.0], [-1.0, -4.0, -2.0]])
# |.|: reference 0 has 0.5, 1, 0 and reference 1 has 0.5, 3, 0
CONFIDENCE = torch.tensor([[0.5, 1.0, 0.0], [0.5, 3.0, 0.0]])


def test_uniform():
    torch.testing.assert_close(uniform_weights(4), torch.full((4,), 0.25))
    with pytest.raises(ValueError, match="at least 1"):
        uniform_weights(0)


def test_confidence_is_the_absolute_difference():
    torch.testing.assert_close(discriminative_confidence(CHOSEN, REJECTED), CONFIDENCE)
    torch.testing.assert_close(discriminative_confidence(REJECTED, CHOSEN), CONFIDENCE)  # unsigned: no label in it


def test_adaptive_weights_by_hand():
    """0.5:0.5 -> 1/2, 1/2; 1:3 -> 1/4, 3/4; 0:0 -> uniform."""
    expected = torch.tensor([[0.5, 0.25, 0.5], [0.5, 0.75, 0.5]])
    torch.testing.assert_close(adaptive_weights(CONFIDENCE), expected, rtol=0, atol=0)


def test_validation_discrimination_is_a_ratio_of_sums():
    """Sums 1.5 and 3.5 of 5; a mean of ratios would give (0.5 + 0.25 + 0.5) / 3 = 0.4167 instead of 0.3."""
    torch.testing.assert_close(validation_discrimination_weights(CONFIDENCE), torch.tensor([0.3, 0.7]))


def test_validation_discrimination_accumulates_in_float64():
    """2^24 + 1 + 1 + ... stays at 2^24 in a float32 running sum; the exact ratio is (2^24 + 2000) : 2^24."""
    big, count = 2.0**24, 2000
    confidence = torch.zeros(2, count + 1)
    confidence[:, 0] = big
    confidence[0, 1:] = 1.0
    weights = validation_discrimination_weights(confidence)
    assert float(weights[0]) == pytest.approx((big + count) / (2 * big + count), abs=2e-8 * 4)
    assert float(weights[0]) > 0.50002


def test_validation_accuracy_by_hand():
    """Reference 0 is right on 1 of 3 (a tie is wrong), reference 1 on 1 of 3 and, without the first row, 1 of 2 to
    0."""
    torch.testing.assert_close(validation_accuracy_weights(CHOSEN, REJECTED), torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(validation_accuracy_weights(CHOSEN[:, 1:], REJECTED[:, 1:]), torch.tensor([0.0, 1.0]))
    assert validation_accuracy_weights(CHOSEN[:, 2:], REJECTED[:, 2:]).tolist() == [0.5, 0.5]  # nobody is ever right


def test_validation_accuracy_temperature():
    """Accuracies 0.5 and 1: softmax at T = 0.25 is 1 : e^2."""
    chosen, rejected = torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    e2 = math.exp(2)
    weights = validation_accuracy_weights(chosen, rejected, temperature=0.25)
    torch.testing.assert_close(weights, torch.tensor([1 / (1 + e2), e2 / (1 + e2)]))
    with pytest.raises(ValueError, match="temperature"):
        validation_accuracy_weights(chosen, rejected, temperature=0.0)


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 6),
    st.integers(1, 5),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.integers(0, 99),
)
def test_weights_are_distributions_without_gradient(references, pairs, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    chosen, rejected = -2000 * torch.rand(2, references, pairs, generator=generator).to(dtype)
    chosen[:, 0] = rejected[:, 0]  # a pair of identical replies
    chosen.requires_grad_()
    confidence = discriminative_confidence(chosen, rejected)
    for weights in (
        adaptive_weights(confidence),
        validation_discrimination_weights(confidence),
        validation_accuracy_weights(chosen, rejected),
    ):
        assert weights.shape[0] == references and not weights.requires_grad
        assert weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert bool((weights >= 0).all())
        torch.testing.assert_close(weights.sum(dim=0).double(), torch.ones(weights.shape[1:], dtype=torch.float64))
    torch.testing.assert_close(
        adaptive_weights(confidence)[:, 0], torch.full((references,), 1 / references).to(weights.dtype)
    )


def test_permutation_of_the_references():
    order = torch.tensor([1, 0])
    torch.testing.assert_close(adaptive_weights(CONFIDENCE[order]), adaptive_weights(CONFIDENCE)[order])
    torch.testing.assert_close(
        validation_discrimination_weights(CONFIDENCE[order]), validation_discrimination_weights(CONFIDENCE)[order]
    )


def test_non_finite_confidence_names_reference_and_row():
    bad = CONFIDENCE.clone()
    bad[1, 2] = math.nan
    with pytest.raises(ValueError, match="reference 1 at row 2 is nan"):
        adaptive_weights(bad)


@pytest.mark.parametrize("shapes", [((2, 3), (3, 2)), ((3,), (3,))])
def test_wrong_shapes_raise(shapes):
    with pytest.raises(ValueError, match="shape"):
        discriminative_confidence(*(torch.zeros(s) for s in shapes))
    with pytest.raises(ValueError, match="shape"):
        validation_accuracy_weights(*(torch.zeros(s) for s in shapes))
    with pytest.raises(ValueError, match="shape"):
        adaptive_weights(torch.zeros(3))


def test_fixed_weights():
    assert fixed_weights([1, 0], 2).tolist() == [1.0, 0.0]  # zeros stay zeros
    with pytest.raises(ValueError, match=r"3 values for 2 references"):
        fixed_weights([0.5, 0.25, 0.25], 2)
    with pytest.raises(ValueError, match=r"sum to 0\.9"):
        fixed_weights([0.5, 0.4], 2)
    for bad in ([1.5, -0.5], [math.nan, 1.0]):
        with pytest.raises(ValueError, match="finite and >= 0"):
            fixed_weights(bad, 2)


def test_names_of_the_original_notebooks():
    assert [weighting_name(n) for n in ("offline_1", "offline_2", "online_1", "arwc_normalized")] == [
        "vdw",
        "vaw",
        "swcw",
        "arwc_normalized",
    ]
    with pytest.raises(ValueError, match="'offline_3'"):
        weighting_name("offline_3")


def test_states_survive_json():
    for weights in (SlidingWindowWeights(2), ThompsonSampling(2, prior=1, seed=0)):
        state = weights.state_dict()
        assert json.loads(json.dumps(state)) == state
