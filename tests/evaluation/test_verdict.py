"""The verdict by derivation: intervals by hand, choices that use validation only."""

import math

import numpy as np
import pytest

from prefopt.evaluation.study import (
    chosen_on_validation,
    influence,
    paired_difference,
    sentence,
)


def test_a_paired_interval_by_hand():
    """d = (0.01, 0.02, 0.03): mean 0.02, sd 0.01, so the reach is 4.3027 * 0.01 / sqrt(3) = 0.024842."""
    theirs = {0: 0.50, 1: 0.60, 2: 0.55}
    mine = {0: 0.51, 1: 0.62, 2: 0.58, 9: 0.99}  # a seed that only one of them has says nothing
    found = paired_difference(mine, theirs)
    assert (found.seeds, found.interval, found.verdict) == (3, "t", "no evidence")
    assert [found.mean, found.low, found.high] == pytest.approx([0.02, -0.004842, 0.044842], abs=1e-6)
    assert paired_difference(theirs, mine).verdict == "no evidence"


def test_pairing_sees_what_the_spread_over_seeds_hides():
    """Seeds differ by 10 points and the methods by 1 +- 0.1: unpaired there would be no telling."""
    theirs = {s: 0.5 + 0.1 * s for s in range(4)}
    mine = {s: value + 0.01 + 0.001 * (-1) ** s for s, value in theirs.items()}
    assert paired_difference(mine, theirs).verdict == "helps"
    assert paired_difference(theirs, mine).verdict == "hurts"
    assert paired_difference(theirs, theirs).verdict == "no evidence"


def test_one_seed_is_no_evidence_however_large_the_difference():
    found = paired_difference({3: 0.9}, {3: 0.1})
    assert (found.low, found.high, found.verdict) == (-math.inf, math.inf, "no evidence")
    assert sentence("best single", found).endswith("(1 seed): no evidence")


@pytest.mark.parametrize("seeds", [2, 3, 40])
def test_equal_differences_tell_nothing_of_the_spread(seeds):
    """Accuracies of 200 pairs are multiples of 0.005, so seeds may differ alike by chance, up to rounding of 1e-17."""
    theirs = {s: 0.1 * (s % 7) for s in range(seeds)}
    found = paired_difference({s: value + 0.005 for s, value in theirs.items()}, theirs)
    assert (found.interval, found.seeds, found.verdict) == ("none", seeds, "no evidence")
    assert sentence("best single", found).endswith(f"no interval (the same in {seeds} seeds): no evidence")


def test_many_seeds_are_resampled():
    """A mean of n values has standard error sd / sqrt(n); a percentile interval reaches about 1.96 of them."""
    values = np.random.default_rng(1).normal(0.02, 0.05, size=400)
    found = paired_difference(dict(enumerate(values)), dict.fromkeys(range(400), 0.0))
    reach = 1.96 * values.std() / 20
    assert found.interval == "bootstrap" and found.verdict == "helps"
    assert found.high - found.mean == pytest.approx(reach, rel=0.1)
    assert found.mean - found.low == pytest.approx(reach, rel=0.1)


def test_the_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(1000):
        found = paired_difference(dict(enumerate(rng.normal(0.3, 1.0, size=5))), dict.fromkeys(range(5), 0.0))
        covered += found.low <= 0.3 <= found.high
    assert covered / 1000 == pytest.approx(0.95, abs=0.02)


def test_the_best_is_chosen_within_a_seed_and_by_validation():
    validation = {"a": {0: 0.6, 1: 0.5, 2: 0.7}, "b": {0: 0.5, 1: 0.6, 2: 0.7}}
    test = {"a": {0: 0.1, 1: 0.9, 2: 0.3}, "b": {0: 0.9, 1: 0.1, 2: 0.4}}
    reached, names = chosen_on_validation(validation, test)
    assert names == {0: "a", 1: "b", 2: "a"}  # of equals the first
    assert reached == {0: 0.1, 1: 0.1, 2: 0.3}  # although test says otherwise


def test_a_seed_that_a_candidate_lacks_is_no_choice():
    values = {"a": {0: 0.6, 1: 0.5}, "b": {1: 0.6}}
    assert chosen_on_validation(values, values) == ({1: 0.6}, {1: "b"})


def test_influence_is_the_mean_of_what_was_logged():
    entry = {"references/effective_number": 2.0, "references/harmonic_dominance": 0.5, "references/weight/a": 1.0}
    log = [{"loss": 1.0, "references/spread": 1.0, **entry}, {"references/spread": 3.0, **entry}, {"train_loss": 1.0}]
    found = influence(log)
    assert (found.spread, found.effective_number, found.harmonic_dominance) == (2.0, 2.0, 0.5)
    assert found.weights == {"a": 1.0}
    assert influence([{"loss": 1.0}]) is None


@pytest.mark.parametrize(
    ("mine", "theirs", "message"),
    [
        ({0: 1.0}, {1: 1.0}, "no seed in common"),
        ({0: math.nan}, {0: 1.0}, "not finite"),
        ({}, {}, "no seed in common"),
    ],
)
def test_what_cannot_be_compared_is_refused(mine, theirs, message):
    with pytest.raises(ValueError, match=message):
        paired_difference(mine, theirs)


def test_bad_confidence_and_empty_choices_are_refused():
    with pytest.raises(ValueError, match="confidence"):
        paired_difference({0: 1.0}, {0: 1.0}, confidence=95)
    with pytest.raises(ValueError, match="no run"):
        chosen_on_validation({}, {})
    with pytest.raises(ValueError, match="finished by all"):
        chosen_on_validation({"a": {0: 1.0}, "b": {1: 1.0}}, {"a": {0: 1.0}, "b": {1: 1.0}})
