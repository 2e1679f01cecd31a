import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefopt.candidates.pairs import POLICIES, aggregate_scores, select_pairs, win_probabilities

REAL = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "alpaca_candidates.jsonl.gz"
finite = st.floats(-30, 30)
score_lists = st.lists(finite, min_size=2, max_size=8)
tables = st.integers(2, 6).flatmap(
    lambda n: st.lists(st.lists(finite, min_size=n, max_size=n), min_size=n, max_size=n)
)


def logistic(x):
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def only(pairs):
    assert len(pairs) == 1
    return pairs[0]


# --- win probabilities
# -------------------------------------------------------------------------------------------------------


def test_probabilities_of_scores_by_hand():
    """s = (0, ln 3): P_10 = 3 / (1 + 3) = 0.75; a temperature of 2 gives sqrt(3) / (1 + sqrt(3))."""
    expected = np.array([[0.5, 0.25], [0.75, 0.5]])
    np.testing.assert_allclose(win_probabilities([0.0, math.log(3)]), expected, atol=1e-15)
    warm = win_probabilities([0.0, math.log(3)], temperature=2.0)
    assert warm[1, 0] == pytest.approx(math.sqrt(3) / (1 + math.sqrt(3)))


def test_probabilities_of_a_table_average_both_orders():
    """c_01 = ln 9 and c_10 = 0 (a ranker that likes the first place): D_01 = ln(9) / 2 = ln 3, so P_01 = 0.75."""
    table = win_probabilities([[7.0, math.log(9)], [0.0, -7.0]])
    np.testing.assert_allclose(table, [[0.5, 0.75], [0.25, 0.5]], atol=1e-15)


def test_antisymmetric_table_keeps_its_logits():
    table = np.array([[0.0, 1.5, -2.0], [-1.5, 0.0, 0.25], [2.0, -0.25, 0.0]])
    expected = np.vectorize(logistic)(table)
    np.testing.assert_allclose(win_probabilities(table), expected, atol=1e-15)


@given(tables)
@settings(deadline=None)
def test_probabilities_are_complementary(table):
    probabilities = win_probabilities(table)
    np.testing.assert_allclose(probabilities + probabilities.T, 1.0, atol=1e-12)
    assert (np.diagonal(probabilities) == 0.5).all()
    assert ((probabilities >= 0) & (probabilities <= 1)).all()


def test_tensor_in_tensor_out_and_extremes_are_finite():
    scores = torch.tensor([0.0, 1e4, -1e4])
    result = win_probabilities(scores)
    assert result.dtype == torch.float32 and torch.isfinite(result).all()
    assert result[1, 2] == 1.0 and result[2, 1] == 0.0
    assert isinstance(win_probabilities(scores.tolist()), np.ndarray)


@pytest.mark.parametrize(
    "scores, message",
    [
        ([1.0], "two candidates"),
        ([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]], r"\(2, 3\)"),
        ([0.0, float("nan")], r"\(1,\) is nan"),
        ([[0.0, float("inf")], [0.0, 0.0]], r"\(0, 1\) is inf"),
        (np.zeros((2, 2, 2)), r"\(2, 2, 2\)"),
    ],
)
def test_bad_scores_are_refused(scores, message):
    with pytest.raises(ValueError, match=message):
        win_probabilities(scores)
    with pytest.raises(ValueError, match=message):
        select_pairs(["a"] * len(scores), scores)


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="temperature"):
        win_probabilities([0.0, 1.0], temperature=0.0)
    with pytest.raises(ValueError, match="temperature"):
        select_pairs(["a", "b"], [0.0, 1.0], temperature=-1.0)
    with pytest.raises(ValueError, match="best_worst"):
        select_pairs(["a", "b"], [0.0, 1.0], policy="best")
    with pytest.raises(ValueError, match="agree in length"):
        select_pairs(["a", "b", "c"], [0.0, 1.0])
    with pytest.raises(ValueError, match="sppo_paper fixes"):
        select_pairs(["a", "b"], [0.0, 1.0], policy="sppo_paper", include_self=False)


# --- policies
# ----------------------------------------------------------------------------------------------------------------


def test_best_worst_takes_the_first_of_several():
    pair = only(select_pairs(["a", "b", "c", "d"], [1.0, 3.0, 1.0, 3.0]))
    assert (pair.chosen, pair.rejected, pair.gap) == (1, 0, 2.0)


def test_wpo_v2_breaks_ties_by_length():
    texts = ["long best text", "best", "bad but very very long", "worse", "ok"]
    pair = only(select_pairs(texts, [9.0, 9.0, 1.0, 1.0, 5.0], policy="wpo_v2"))
    assert (pair.chosen, pair.rejected) == (1, 3)  # the shortest of the best; |5 - 4| < |22 - 4|


def test_best_random_is_seeded_and_never_picks_the_best():
    scores = [0.0, 5.0, 1.0, 5.0, 2.0]
    picks = {only(select_pairs(list("abcde"), scores, policy="best_random", seed=seed)).rejected for seed in range(40)}
    assert picks == {0, 2, 4}
    assert select_pairs(list("abcde"), scores, policy="best_random", seed=3) == select_pairs(
        list("abcde"), scores, policy="best_random", seed=3
    )


def test_all_pairs_above_a_margin():
    scores = [0.0, 1.0, 3.0, 3.0]
    found = {(p.chosen, p.rejected) for p in select_pairs(list("abcd"), scores, policy="all_pairs")}
    assert found == {(1, 0), (2, 0), (3, 0), (2, 1), (3, 1)}
    wide = {(p.chosen, p.rejected) for p in select_pairs(list("abcd"), scores, policy="all_pairs", min_gap=2.5)}
    assert wide == {(2, 0), (3, 0)}


def test_sppo_by_hand():
    """s = (0, ln 3, ln 9), sigma(ln 3) = .75, sigma(ln 9) = .9: rows (.5, .25, .1), (.75, .5, .25), (.9, .75, .5)."""
    scores = [0.0, math.log(3), math.log(9)]
    pair = only(select_pairs(["a", "b", "c"], scores, policy="sppo"))
    assert (pair.chosen, pair.rejected) == (2, 0)
    assert pair.chosen_win_prob == pytest.approx((0.9 + 0.75 + 0.5) / 3)
    assert pair.rejected_win_prob == pytest.approx((0.5 + 0.25 + 0.1) / 3)
    assert pair.chosen_over_rejected_prob == pytest.approx(0.9)
    without_self = only(select_pairs(["a", "b", "c"], scores, policy="sppo", include_self=False))
    assert without_self.chosen_win_prob == pytest.approx((0.9 + 0.75) / 2)
    assert without_self.rejected_win_prob == pytest.approx((0.25 + 0.1) / 2)
    warm = only(select_pairs(["a", "b", "c"], scores, policy="sppo", temperature=2.0))
    assert warm.chosen_over_rejected_prob == pytest.approx(3 / 4)  # sigma(ln(9) / 2)


def test_gpo_scores_are_means_of_differences():
    pair = only(select_pairs(["a", "b", "c"], [0.0, 1.0, 5.0], policy="gpo"))
    assert (pair.chosen, pair.rejected) == (2, 0)
    assert pair.chosen_score == pytest.approx((5 + 4 + 0) / 3)
    assert pair.rejected_score == pytest.approx((0 - 1 - 5) / 3)
    without_self = only(select_pairs(["a", "b", "c"], [0.0, 1.0, 5.0], policy="gpo", include_self=False))
    assert without_self.chosen_score == pytest.approx((5 + 4) / 2)
    halved = only(select_pairs(["a", "b", "c"], [0.0, 1.0, 5.0], policy="gpo", temperature=0.5))
    assert halved.chosen_score == pytest.approx(2 * (5 + 4 + 0) / 3)


def test_pairwise_and_aggregate_differ_on_an_intransitive_table():
    """Candidate 0 beats both others narrowly; 1 crushes 2 and loses to 0: mean probability and mean logit differ."""
    table = np.array([[0.0, 1.0, 1.0], [-1.0, 0.0, 9.0], [-1.0, -9.0, 0.0]])
    assert only(select_pairs(["a", "b", "c"], table, policy="best_worst")).chosen == 0
    assert only(select_pairs(["a", "b", "c"], table, policy="max_min")).chosen == 1
    assert only(select_pairs(["a", "b", "c"], table, policy="sppo", probabilities="aggregate")).chosen == 1


def published_pair(table):
    """The released SPPO pipeline in its own float32 arithmetic, written from its description."""
    count = len(table)
    scores = np.array(
        [np.mean([np.float32(table[i][j]) - np.float32(table[j][i]) for j in range(count)]) for i in range(count)]
    )
    probability = [[float(1 / (1 + np.exp(scores[j] - scores[i]))) for j in range(count)] for i in range(count)]
    win, lose = int(np.argmax(scores)), int(np.argmin(scores))
    return win, lose, probability[win][lose], sum(probability[win]) / count, sum(probability[lose]) / count


@pytest.mark.parametrize("count", [2, 3, 5, 7, 15])
def test_preset_reproduces_the_published_numbers(count):
    table = np.random.default_rng(count).normal(size=(count, count)).astype(np.float32)
    np.fill_diagonal(table, 0)
    win, lose, over, chosen, rejected = published_pair(table)
    for scores in (
        table,
        aggregate_scores(table),
    ):  # a table of ours, or the aggregated scores that the pipeline stores
        pair = only(select_pairs(["x"] * count, scores, policy="sppo_paper"))
        assert (pair.chosen, pair.rejected) == (win, lose)
        assert pair.chosen_over_rejected_prob == pytest.approx(over, abs=1e-6)
        assert pair.chosen_win_prob == pytest.approx(chosen, abs=1e-6)
        assert pair.rejected_win_prob == pytest.approx(rejected, abs=1e-6)


def test_preset_doubles_the_logits_of_a_consistent_table():
    scores = np.array([0.0, 0.7, 2.0])
    table = np.subtract.outer(scores, scores)
    paper = only(select_pairs(["a", "b", "c"], table, policy="sppo_paper"))
    plain = only(select_pairs(["a", "b", "c"], table, policy="sppo"))
    assert plain.chosen_over_rejected_prob == pytest.approx(logistic(2.0))
    assert paper.chosen_over_rejected_prob == pytest.approx(logistic(4.0))
    confined = only(select_pairs(list("abcde"), [50.0, 0, -1, -2, -50], policy="sppo_paper"))
    assert confined.chosen_win_prob == pytest.approx(0.9) and confined.rejected_win_prob == pytest.approx(0.1)


@pytest.mark.parametrize("count", [2, 3, 5, 8])
def test_mean_logit_reproduces_the_fork_for_general_preference_models(count):
    """The fork of SPPO picks by mean logit and takes sigmoid(c_ij - c_ji) of each pair, the self term among them."""
    for seed in range(20):
        half = np.triu(np.random.default_rng((count, seed)).normal(scale=3, size=(count, count)), 1)
        table = half - half.T
        doubled = 1 / (1 + np.exp(table.T - table))
        scores = (table - table.T).mean(axis=-1)
        win, lose = int(scores.argmax()), int(scores.argmin())
        pair = only(select_pairs(["x"] * count, table, policy="sppo_mean_logit", temperature=0.5))
        assert (pair.chosen, pair.rejected) == (win, lose)
        assert pair.chosen_over_rejected_prob == pytest.approx(doubled[win, lose], abs=1e-12)
        assert pair.chosen_win_prob == pytest.approx(doubled.sum(axis=1)[win] / count, abs=1e-12)
        assert pair.rejected_win_prob == pytest.approx(doubled.sum(axis=1)[lose] / count, abs=1e-12)


@pytest.mark.parametrize("policy", POLICIES)
def test_ties_give_no_pair(policy):
    assert select_pairs(["a", "bb", "c"], [1.0, 1.0, 1.0], policy=policy) == []
    assert select_pairs(["a", "bb", "c"], np.zeros((3, 3)), policy=policy) == []
    # equal row means whose sums round differently
    cycle = np.array([[0, 0.1, -0.3, 0.2], [-0.1, 0, 0.2, -0.1], [0.3, -0.2, 0, -0.1], [-0.2, 0.1, 0.1, 0]])
    assert select_pairs(list("abcd"), cycle, policy="max_min") == []


@pytest.mark.parametrize("policy", POLICIES)
def test_only_eligible_candidates_are_picked_but_all_count(policy):
    scores = [3.0, 9.0, 1.0, -9.0]
    pairs = select_pairs(list("abcd"), scores, policy=policy, eligible=[True, False, True, False])
    assert {(pair.chosen, pair.rejected) for pair in pairs} == {(0, 2)}
    probabilities = win_probabilities(scores)
    assert only(pairs).chosen_win_prob == pytest.approx(probabilities[0].mean())  # over all four
    assert select_pairs(list("abcd"), scores, policy=policy, eligible=[False] * 4) == []


@given(score_lists, st.sampled_from(sorted(POLICIES)), st.floats(0, 5))
@settings(max_examples=150, deadline=None)
def test_invariants(scores, policy, min_gap):
    texts = ["x" * (index * 7 % 5 + 1) for index in range(len(scores))]
    pairs = select_pairs(texts, scores, policy=policy, min_gap=min_gap)
    check_pairs(pairs, scores, policy, min_gap)


def check_pairs(pairs, scores, policy, min_gap):
    gap = max(scores) - min(scores)
    if policy == "all_pairs":
        expected = sum(1 for i in scores for j in scores if i > j and i - j >= min_gap)
        assert len(pairs) == expected
    else:
        assert len(pairs) == (1 if gap > 0 and gap >= min_gap else 0)
    for pair in pairs:
        assert scores[pair.chosen] > scores[pair.rejected] and pair.gap >= min_gap
        assert pair.gap == scores[pair.chosen] - scores[pair.rejected]
        assert pair.chosen_win_prob >= pair.rejected_win_prob and pair.chosen_over_rejected_prob > 0.5 - 1e-12
        assert pair.chosen_score > pair.rejected_score or math.isclose(pair.chosen_score, pair.rejected_score)
        if policy != "all_pairs":
            assert scores[pair.chosen] == max(scores)
        if policy not in ("all_pairs", "best_random"):
            assert scores[pair.rejected] == min(scores)


@pytest.mark.skipif(not REAL.exists(), reason="the candidate set is not there")
@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_on_real_candidates(policy):
    with gzip.open(REAL, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    dropped = {}
    for count in (2, 3, 5, 7, 15):
        kept = 0
        for row in rows:
            candidates = row["candidates"][:count]
            scores = [candidate["win_prob"] for candidate in candidates]
            texts = [candidate["text"] for candidate in candidates]
            pairs = select_pairs(texts, scores, policy=policy, seed=row["prompt_id"])
            check_pairs(pairs, scores, policy, 0.0)
            kept += bool(pairs)
            if policy == "wpo_v2" and pairs:
                best = [len(text) for text, score in zip(texts, scores) if score == max(scores)]
                assert len(texts[pairs[0].chosen]) == min(best)
        dropped[count] = len(rows) - kept
        assert kept == sum(len({c["win_prob"] for c in row["candidates"][:count]}) > 1 for row in rows)
    assert dropped[2] > 0 and sorted(dropped.values(), reverse=True) == list(dropped.values())
