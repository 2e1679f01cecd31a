"""Best of n: what is chosen, what is dropped and counted, what is refused."""

import pytest

from prefopt.candidates.build_rows import best_of_n, best_of_n_rows

RECORDS = [
    {"prompt": "p0", "responses": ["a", "b", "c"], "scores": [0.1, 2, -3.0], "source": "x"},
    {"prompt": "p1", "responses": ["  ", "b", "c"], "scores": [9, 1, 1.5]},  # the best is blank
    {"prompt": [{"role": "user", "content": "p2"}], "responses": ["a", "b"], "scores": [1, 0]},
    {"prompt": "p3", "responses": ["\n", ""], "scores": [1, 0]},
    {"prompt": "p4", "responses": ["a", "", "b"], "scores": [1, 0, 1]},
    {"prompt": "p5", "responses": ["only"], "scores": [1]},
]


def test_the_highest_score_that_is_not_blank_and_the_first_of_equals():
    assert best_of_n(["a", "b", "c"], [1.0, 3.0, 3.0]) == 1
    assert best_of_n([" ", "b"], [9.0, 1.0]) == 1
    assert best_of_n(["", " \n"], [9.0, 1.0]) is None
    assert best_of_n([], []) is None


def test_supervised_rows():
    rows, dropped = best_of_n_rows(RECORDS)
    assert rows == [
        {"prompt": "p0", "completion": "b"},
        {"prompt": "p1", "completion": "c"},
        {"prompt": [{"role": "user", "content": "p2"}], "completion": [{"role": "assistant", "content": "a"}]},
        {"prompt": "p4", "completion": "a"},
        {"prompt": "p5", "completion": "only"},
    ]
    assert dropped == {"all responses blank": 1}


def test_pairs_of_best_and_worst():
    rows, dropped = best_of_n_rows(RECORDS, form="pairs")
    assert rows == [
        {"prompt": "p0", "chosen": "b", "rejected": "c", "chosen_score": 2.0, "rejected_score": -3.0},
        {"prompt": "p1", "chosen": "c", "rejected": "b", "chosen_score": 1.5, "rejected_score": 1.0},
        {
            "prompt": [{"role": "user", "content": "p2"}],
            "chosen": [{"role": "assistant", "content": "a"}],
            "rejected": [{"role": "assistant", "content": "b"}],
            "chosen_score": 1.0,
            "rejected_score": 0.0,
        },
    ]
    assert dropped == {"all responses blank": 1, "all scores tied": 1, "fewer than two responses": 1}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "p", "responses": ["a"]}, "Record 1 has no `scores`"),
        ({"prompt": "p", "responses": ["a"], "scores": [1, 2]}, "Record 1: 1 candidates but 2 scores"),
        (
            {"prompt": "p", "responses": ["a", "b"], "scores": [1, float("nan")]},
            "Record 1: The score of candidate 1 is nan",
        ),
    ],
)
def test_bad_records_are_named(record, message):
    with pytest.raises(ValueError, match=message):
        best_of_n_rows([RECORDS[0], record])
    with pytest.raises(ValueError, match="form must be"):
        best_of_n_rows([], form="rows")
