"""Adversarial pairs: what is paired, what is left out and counted, what is refused."""

import pytest
from datasets import Dataset

from prefopt.candidates.build_rows import adversarial_pairs
from prefopt.candidates.formats import clean_response
from prefopt.data.tokenization import tokenize_comparisons
from tests.tiny import tiny_tokenizer

GOLDEN = [
    {"query_id": 1, "golden": " gold 1"},
    {"query_id": "2", "golden": " gold 2\n\nHuman: and then?"},
    {"query_id": 3, "golden": " gold 3"},
]
SAMPLES = [
    {
        "query_id": "2",
        "query": "q2",
        "sample_0": " a",
        "sample_1": " ",
        "sample_10": " c",
        "sample_2": " b\n\nHuman: x\n\nAssistant: y",
    },
    {"query_id": "1", "query": "q1", "sample_0": "gold 1", "sample_1": " d"},
    {"query_id": "9", "query": "q9", "sample_0": " e"},
]


def test_every_sample_meets_the_golden_answer_of_its_prompt():
    rows, left_out = adversarial_pairs(GOLDEN, SAMPLES)
    assert [(row["prompt"], *row["responses"]) for row in rows] == [
        ("q2", "gold 2", " a"),
        ("q2", "gold 2", "b"),
        ("q2", "gold 2", " c"),
        ("q1", " gold 1", " d"),
    ]
    assert all(row["scores"] == [1.0, 0.0] and row["type"] == "apo" for row in rows)
    assert left_out == {
        "golden answer without samples": 1,
        "samples without a golden answer": 1,
        "blank sample": 1,
        "sample equals the golden answer": 1,
    }
    tokenised, _ = tokenize_comparisons(Dataset.from_list(rows), tiny_tokenizer(None), max_length=64)
    assert tokenised["is_adversarial"] == [True] * 4


def test_candidates_of_messages():
    record = {
        "prompt_id": "1",
        "prompt": [{"role": "user", "content": "hi"}],
        "candidates": [{"text": "x"}, {"text": "y"}],
    }
    rows, _ = adversarial_pairs(GOLDEN[:1], [record])
    assert rows[1]["responses"] == [
        [{"role": "assistant", "content": " gold 1"}],
        [{"role": "assistant", "content": "y"}],
    ]


def test_only_a_turn_is_cut():
    assert clean_response(" a\n\nHuman: b\n\nHuman: c") == "a"
    assert clean_response(" d\nHumans are") == " d\nHumans are"


@pytest.mark.parametrize(
    ("golden", "samples", "message"),
    [
        (GOLDEN, SAMPLES[:2], "1 ids with golden answer without samples, '3' among them"),
        (GOLDEN[:2], SAMPLES, "1 ids with samples without a golden answer, '9' among them"),
    ],
)
def test_unmatched_records_can_be_refused(golden, samples, message):
    with pytest.raises(ValueError, match=message):
        adversarial_pairs(golden, samples, on_unmatched="raise")


@pytest.mark.parametrize(
    ("golden", "samples", "message"),
    [
        (GOLDEN[:1], SAMPLES[2:], "No golden answer meets a sample"),
        ([{"golden": "x"}], SAMPLES, "has neither `query_id` nor `prompt_id`"),
        ([*GOLDEN, GOLDEN[0]], SAMPLES, "occurs twice in the golden"),
        (GOLDEN, [{"query_id": 1, "query": "q"}], "neither `sample_0` nor `candidates`"),
        (GOLDEN, [{"query_id": 1, "sample_0": "a"}], "neither `prompt` nor `query`"),
        (GOLDEN, [{"query_id": 1, "query": "q", "sample_0": None}], "`sample_0` of samples record '1' is None"),
        ([{"query_id": 1}], SAMPLES, "`golden` of golden record '1' is None"),
    ],
)
def test_broken_records_are_named(golden, samples, message):
    with pytest.raises(ValueError, match=message):
        adversarial_pairs(golden, samples)
    with pytest.raises(ValueError, match="on_unmatched"):
        adversarial_pairs(GOLDEN, SAMPLES, on_unmatched="skip")
