"""Health cards: the figures by hand, outliers found, honest references left alone."""

import math

import numpy as np
import pytest

from prefopt.intervals import wilson_interval
from prefopt.references.health import cards_table, health_cards


def scores(nats_per_byte, *, rows=200, gap=0.1, seed=0):
    """Scores of one reference: about `nats_per_byte`, chosen better by `gap` nats per token in the mean."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(20, 80, (2, rows)).astype(float)
    sizes = 4 * tokens
    logps = -nats_per_byte * sizes * rng.uniform(0.8, 1.2, (2, rows))
    logps[0] += gap * tokens[0]
    return logps, tokens, sizes


def cards(*references, checks=None):
    parts = [np.stack(part, axis=1) for part in zip(*references)]  # each (2, K, N)
    logps, tokens, sizes = (tuple(part) for part in parts)
    return health_cards(
        [f"r{k}" for k in range(len(references))], logps=logps, tokens=tokens, num_bytes=sizes, checks=checks
    )


def test_wilson_by_hand():
    """p = 1/2, n = 4, z = 2: (1/2 + 1/2 -+ 2 sqrt(1/16 + 1/16)) / 2 -> centre 1/2, reach sqrt(1/8)."""
    low, high = wilson_interval(2, 4, z=2)
    assert (low, high) == pytest.approx((0.5 - math.sqrt(1 / 8), 0.5 + math.sqrt(1 / 8)))
    assert wilson_interval(0, 10)[0] == pytest.approx(0, abs=1e-12) and wilson_interval(10, 10)[1] == pytest.approx(1)
    assert wilson_interval(585, 1000) == pytest.approx((0.5542, 0.6151), abs=2e-4)


def test_figures_by_hand():
    """Means per token: (-1, -2), (-3, -1), (-2, -2): one right, one tie; confidences 1, 2, 0."""
    (card,) = health_cards(
        ["only"],
        logps=(np.array([[-4.0, -12.0, -8.0]]), np.array([[-8.0, -4.0, -8.0]])),
        tokens=(np.full((1, 3), 4.0), np.full((1, 3), 4.0)),
        num_bytes=(np.full(3, 8.0), np.full(3, 16.0)),
        checks=[{"not_prefix": 2, "batched_vs_single": 1e-6}],
    )
    assert (card.accuracy, card.ties, card.rows) == (1 / 3, 1 / 3, 3)
    assert (card.confidence_mean, card.confidence_median) == (1.0, 1.0)
    assert card.nats_per_token == 2.0
    assert card.nats_per_byte == pytest.approx(np.median([0.5, 1.5, 1.0, 0.5, 0.25, 0.5]))
    assert card.quarantine == "" and "2 prompts are no token prefix" in card.remarks


def test_a_broken_reference_is_quarantined_and_its_peers_are_not():
    found = cards(scores(0.6), scores(0.7, seed=1), scores(0.9, seed=2), scores(2.5, seed=3))
    assert [bool(card.quarantine) for card in found] == [False, False, False, True]
    assert "times its peers' median" in found[3].quarantine
    assert "QUARANTINED r3" in cards_table(found)


def test_a_small_model_among_large_ones_is_no_outlier():
    found = cards(scores(0.55), scores(0.6, seed=1), scores(0.58, seed=2), scores(0.95, seed=3))
    assert not any(card.quarantine for card in found)


def test_two_references_have_no_majority():
    assert not any(card.quarantine for card in cards(scores(0.5), scores(5.0, seed=1)))


def test_wide_peers_need_a_wider_gap():
    """Peers at 0.5, 1 and 2 spread by a factor of two themselves: 2.5 is not five deviations away."""
    assert not any(
        card.quarantine for card in cards(scores(0.5), scores(1.0, seed=1), scores(2.0, seed=2), scores(2.5, seed=3))
    )


def test_a_reference_that_scores_all_answers_alike_is_quarantined():
    nothing, tokens, sizes = scores(0.6)
    found = cards(scores(0.6, seed=1), (0 * nothing, tokens, sizes))
    assert found[1].quarantine == "100% of its pairs tie" and not found[0].quarantine


def test_batches_that_disagree_with_single_texts_are_quarantined():
    found = cards(scores(0.6), scores(0.6, seed=1), checks=[{"batched_vs_single": 0.3}, {"batched_vs_single": 0.01}])
    assert "batched scores differ" in found[0].quarantine and not found[1].quarantine
    nan = cards(scores(0.6), checks=[{"batched_vs_single": float("nan")}])
    assert nan[0].quarantine


def test_chance_accuracy_is_reported_and_not_quarantined():
    found = cards(scores(0.6, gap=0.0), scores(0.6, gap=-0.4, seed=1), scores(0.6, gap=0.4, seed=2))
    assert [card.remarks[:1] for card in found] == [
        ("accuracy is not above chance",),
        ("accuracy is below chance",),
        (),
    ]
    assert not any(card.quarantine for card in found)


def test_wrong_shapes_raise():
    good = np.zeros((1, 3)) - 1
    with pytest.raises(ValueError, match="shape"):
        health_cards(["a"], logps=(good, good[:, :2]), tokens=(good, good), num_bytes=(good, good))
