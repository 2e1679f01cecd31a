"""Scored responses to one prompt."""

import math

import pytest

from prefopt.data import BadRow
from prefopt.data.rows import normalise_comparison


def test_prompt_responses_scores():
    row = normalise_comparison({"prompt": "q", "responses": ["a", "b", "c"], "scores": [1, 3, 1], "margin": 2})
    assert {name: row[name] for name in row if name != "row_id"} == {
        "prompt": "q", "responses": ["a", "b", "c"], "scores": [1.0, 3.0, 1.0], "is_adversarial": False, "margin": 2.0,
    }  # fmt: skip


def test_separated_texts():
    row = {
        "text": ["\n\nHuman: q\n\nAssistant:<sep> gold", "\n\nHuman: q\n\nAssistant:<sep> sample"],
        "scores": [1.0, 0.0],
    }
    adversarial = normalise_comparison({**row, "type": "apo"})
    assert adversarial["prompt"] == "\n\nHuman: q\n\nAssistant:"
    assert adversarial["responses"] == [" gold", " sample"]
    assert adversarial["is_adversarial"] is True
    human = normalise_comparison({**row, "type": None, "query_id": "7"})
    assert human["is_adversarial"] is False
    assert human["row_id"] == adversarial["row_id"]


def test_messages():
    question, yes = [{"role": "user", "content": "q"}], [{"role": "assistant", "content": "yes"}]
    no = [{"role": "assistant", "content": "no"}]
    for row in (
        {"prompt": question, "responses": ["yes", "no"]},
        {"prompt": question, "responses": [yes, no]},
        {"prompt": "q", "responses": [question + yes, question + no]},
    ):
        clean = normalise_comparison({**row, "scores": [2, 1]})
        assert (clean["prompt"], clean["responses"]) == (question, [yes, no])


def test_a_pair_is_two_responses():
    row = normalise_comparison({"prompt": "q", "chosen": "a", "rejected": "b", "margin": 0.5})
    assert (row["responses"], row["scores"], row["margin"]) == (["a", "b"], [1.0, 0.0], 0.5)


def test_the_scores_are_part_of_the_row_id():
    row = {"prompt": "q", "responses": ["a", "b"], "scores": [1, 0]}
    assert normalise_comparison(row)["row_id"] != normalise_comparison({**row, "scores": [0, 1]})["row_id"]


BASE = {"prompt": "q", "responses": ["a", "b"], "scores": [1, 0]}
FAULTS = [
    ({**BASE, "responses": ["a"], "scores": [1]}, "fewer than two responses", "1 response"),
    ({**BASE, "responses": [], "scores": []}, "fewer than two responses", "0 response"),
    ({**BASE, "scores": [1, 0, 2]}, "unequal numbers of responses and scores", "2 responses, 3 scores"),
    ({**BASE, "scores": None}, "missing field", "`scores` is missing"),
    ({**BASE, "scores": "high"}, "wrong type", "`scores` is not a list of numbers"),
    ({**BASE, "scores": [0.5, 0.5]}, "all scores tied", "every score is 0.5"),
    ({**BASE, "scores": [math.nan, 1]}, "score not finite", "nan"),
    ({**BASE, "scores": [None, 1]}, "score not finite", "None"),
    ({**BASE, "responses": ["a", " "]}, "empty response", "response 1 of 2 is empty"),
    ({**BASE, "responses": ["a", None]}, "missing field", "`responses` is missing"),
    ({**BASE, "responses": "ab"}, "wrong type", "`responses` is not a list"),
    ({**BASE, "prompt": None}, "missing field", "`prompt` is missing"),
    ({"text": ["q<sep>a", "q b"], "scores": [1, 0]}, "not exactly one <sep>", "'<sep>' stands 0 times in 'q b'"),
    ({"text": ["q<sep>a<sep>", "q<sep>b"], "scores": [1, 0]}, "not exactly one <sep>", "stands 2 times"),
    ({"text": ["q<sep>a", "p<sep>b"], "scores": [1, 0]}, "responses to different prompts", "2 different queries"),
    ({"text": ["q<sep>a"], "scores": [1]}, "fewer than two responses", "1 response"),
    ({"text": "q<sep>a", "scores": [1]}, "wrong type", "`text` is not a list"),
    ({"text": None, "scores": [1]}, "missing field", "`text` is missing"),
    ({"prompt": "q", "chosen": "a", "rejected": ""}, "empty completion", "`rejected` is empty"),
]


@pytest.mark.parametrize("row, reason, detail", FAULTS)
def test_faults(row, reason, detail):
    with pytest.raises(BadRow) as caught:
        normalise_comparison(row)
    assert caught.value.reason == reason
    assert detail in caught.value.detail
