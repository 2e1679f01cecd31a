"""Calibration errors against values worked out by hand, a slow transcription of the definition, and bad input."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefopt.evaluation.calibration import calibration_errors, reliability_diagram, score_length_correlation


def test_bins_are_closed_on_the_right():
    """K = 5: 0.1, 0.2 and 0.2 share the bin up to 0.2 (|0.5 - 2| / 4 = 0.375, |1/6 - 2/3| = 0.5), 1.0 is alone and
    wrong."""
    for make in (list, np.array, torch.tensor, lambda p: np.array(p, dtype=np.float32)):
        errors = calibration_errors(make([0.1, 0.2, 0.2, 1.0]), [1, 0, 1, 0], num_bins=5)
        assert (errors.ece, errors.ace, errors.mce) == pytest.approx((0.625, 0.75, 1.0))
        assert errors.counts.tolist() == [3, 0, 0, 0, 1]
        assert np.isnan(errors.frequencies[1]) and errors.frequencies[0] == pytest.approx(2 / 3)


def test_both_directions_of_ranked_pairs():
    """Two ranked rows of reward gaps 1 and -0.7 (and a reward tie), each seen from both sides: 6 points."""
    gaps = np.array([1.0, -0.7, 0.0])
    p = 1 / (1 + np.exp(-np.concatenate([gaps, -gaps])))
    y = np.concatenate([np.ones(3), np.zeros(3)])
    ten, five = calibration_errors(p, y), calibration_errors(p, y, num_bins=5)
    assert (ten.ece, ten.ace, ten.mce) == pytest.approx((0.3123764, 0.3748517, 0.6681878), abs=1e-6)
    assert (five.ece, five.ace, five.mce) == pytest.approx((0.1330821, 0.1330821, 0.1996232), abs=1e-6)


@pytest.mark.parametrize("num_bins", [3, 5, 7, 10, 20, 100])
def test_every_edge_belongs_to_the_bin_below_it(num_bins):
    for dtype in (np.float64, np.float32):
        for k in range(1, num_bins + 1):
            errors = calibration_errors(np.array([k / num_bins], dtype=dtype), [1], num_bins=num_bins)
            assert errors.counts.argmax() == k - 1
    assert calibration_errors([0.0], [0], num_bins=num_bins).counts.argmax() == 0


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=60), st.integers(1, 15))
def test_against_a_slow_transcription(points, num_bins):
    groups = {}
    for p, y in points:
        home = next(k for k in range(num_bins) if p <= (k + 1) / num_bins or k == num_bins - 1)
        groups.setdefault(home, []).append((p, y))
    gaps = [abs(np.mean([p for p, _ in g]) - np.mean([y for _, y in g])) for g in groups.values()]
    ece = sum(gap * len(g) for gap, g in zip(gaps, groups.values())) / len(points)
    errors = calibration_errors([p for p, _ in points], [y for _, y in points], num_bins=num_bins)
    assert (errors.ece, errors.ace, errors.mce) == pytest.approx((ece, np.mean(gaps), max(gaps)), abs=1e-9)


def test_a_calibrated_predictor_has_small_errors():
    rng = np.random.default_rng(0)
    p = rng.random(200_000)
    errors = calibration_errors(p, rng.random(200_000) < p)
    assert errors.mce < 0.02
    assert calibration_errors(p**2, rng.random(200_000) < p).ece > 0.1


@pytest.mark.parametrize(
    ("p", "y", "bins", "message"),
    [
        ([], [], 10, "M > 0"),
        ([0.5], [1, 0], 10, "same length"),
        ([[0.5]], [[1]], 10, "same length"),
        ([1.5], [1], 10, r"lie in \[0, 1\]"),
        ([float("nan")], [1], 10, r"lie in \[0, 1\]"),
        ([0.5], [0.3], 10, "must be 0 or 1"),
        ([0.5], [1], 0, "num_bins must be at least 1"),
    ],
)
def test_bad_input(p, y, bins, message):
    with pytest.raises(ValueError, match=message):
        calibration_errors(p, y, num_bins=bins)


def test_the_diagram_is_a_picture_with_the_figures_in_it(tmp_path):
    errors = calibration_errors([0.1, 0.2, 0.2, 1.0], [1, 0, 1, 0], num_bins=5)
    reliability_diagram({"first": errors, "second": errors}, tmp_path / "deep" / "diagram.svg", title="A title")
    assert "</svg>" in (tmp_path / "deep" / "diagram.svg").read_text()
    reliability_diagram(errors, tmp_path / "diagram.png")
    assert (tmp_path / "diagram.png").read_bytes()[:4] == b"\x89PNG"


def test_score_length_correlation():
    """Scores 0, 1, 2 against lengths 1, 1, 4: covariance 1, variances 2/3 and 2, so 1 / sqrt(4/3)."""
    assert score_length_correlation([0.0, 1.0, 2.0], [1, 1, 4]) == pytest.approx(0.8660254)
    assert score_length_correlation(torch.tensor([0.0, 1.0], dtype=torch.bfloat16), [5, 2]) == pytest.approx(-1)
    assert np.isnan(score_length_correlation([1.0, 1.0], [1, 2])) and np.isnan(score_length_correlation([1.0], [1]))
    with pytest.raises(ValueError, match="same shape"):
        score_length_correlation([1.0, 2.0], [1])
