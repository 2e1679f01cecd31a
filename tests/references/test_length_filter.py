"""The length filter: thresholds by hand, over all tokenizers, in the stated order."""

import numpy as np
import pytest

from prefopt.data import tokenize_pairs
from prefopt.pipelines.study_data import filter_by_length
from tests.references.helpers import pairs
from tests.tiny import tiny_tokenizer

TOKENIZERS = [tiny_tokenizer("llama3"), tiny_tokenizer("chatml", vocab_size=300)]
ROWS = [("word " * (n % 7 + 1) + str(n), "fox " * (n % 5 + 1), "blue " * (n % 11 + 1) + "x") for n in range(40)]


def counts():
    """(3, rows) largest counts, by tokenising each row alone."""
    longest = []
    for row in ROWS:
        each = []
        for tokenizer in TOKENIZERS:
            (found,) = tokenize_pairs(pairs([row]), tokenizer, max_length=None)[0]
            start = len(found["prompt_ids"])
            each.append([start, start + len(found["chosen_ids"]), start + len(found["rejected_ids"])])
        longest.append(np.max(each, axis=0))
    return np.array(longest).T


def test_three_stages_in_order():
    prompt, chosen, rejected = counts()
    kept = prompt > np.percentile(prompt, 10)
    stages = [kept.sum()]
    replies = chosen - prompt, rejected - prompt
    kept &= (replies[0] > np.percentile(replies[0][kept], 10)) & (replies[1] > np.percentile(replies[1][kept], 10))
    stages.append(kept.sum())
    limit = int(np.percentile(np.maximum(chosen, rejected)[kept], 60))
    kept &= np.maximum(chosen, rejected) <= limit
    rows, report = filter_by_length(pairs(ROWS), TOKENIZERS, max_length=limit, percentile=10)
    assert [row["prompt"][0]["content"] for row in rows] == [ROWS[i][0] for i in np.flatnonzero(kept)]
    assert (report.short_prompts, report.short_replies) == (40 - stages[0], stages[0] - stages[1])
    assert report.rows_kept == len(rows) == kept.sum() > 0 and report.too_long > 0


def test_a_row_that_one_tokenizer_refuses_is_out():
    data = pairs(ROWS).to_list()
    data[3]["prompt"].insert(0, {"role": "system", "content": "Be brief."})
    from datasets import Dataset

    gemma = tiny_tokenizer("gemma2")
    rows, report = filter_by_length(Dataset.from_list(data), [*TOKENIZERS, gemma], max_length=512, percentile=0)
    assert report.unusable == 1
    assert all(row["prompt"][0]["role"] == "user" for row in rows)


def test_nothing_left_is_refused():
    with pytest.raises(ValueError, match="length filter"):
        filter_by_length(pairs(ROWS), TOKENIZERS, max_length=3)
