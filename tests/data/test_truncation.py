"""Cutting, against tables written by hand: prompts are 1..p, chosen 101.., rejected 201..; 1 is the BOS if any."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trl.trainer.dpo_trainer import DataCollatorForPreference

from prefopt.data import Truncation


def ids(first, count):
    return list(range(first, first + count))


# prompt, chosen and rejected lengths; then the kept ids for max_length 10, max_prompt_length 4
WITH_PROMPT_LIMIT = [
    # 6 + 4 = 10 fits: nothing is cut, though the prompt is longer than max_prompt_length
    ((6, 4, 2), ids(1, 6), ids(101, 4), ids(201, 2)),
    # 6 + 5 = 11: the prompt keeps its last 4; then 10 - 4 = 6 leave both completions whole
    ((6, 5, 2), ids(3, 4), ids(101, 5), ids(201, 2)),
    # the longer completion decides, whichever it is
    ((6, 2, 5), ids(3, 4), ids(101, 2), ids(201, 5)),
    # 3 + 8 = 11: a prompt within its limit stays; completions keep their first 10 - 3 = 7
    ((3, 8, 2), ids(1, 3), ids(101, 7), ids(201, 2)),
    # both: prompt 4, completions 6
    ((20, 9, 7), ids(17, 4), ids(101, 6), ids(201, 6)),
]


@pytest.mark.parametrize("lengths, prompt, chosen, rejected", WITH_PROMPT_LIMIT)
def test_prompt_limit(lengths, prompt, chosen, rejected):
    p, c, r = lengths
    kept = Truncation(10, 4).cut(ids(1, p), [ids(101, c), ids(201, r)], None)
    assert kept == (prompt, [chosen, rejected])


def test_a_cut_prompt_keeps_its_bos_and_the_bos_counts():
    # 6 + 5 = 11: four prompt tokens are kept, BOS (1) and the last three
    assert Truncation(10, 4).cut(ids(1, 6), [ids(101, 5)], 1) == ([1, 4, 5, 6], [ids(101, 5)])
    # another first token is no BOS
    assert Truncation(10, 4).cut(ids(1, 6), [ids(101, 5)], 99) == ([3, 4, 5, 6], [ids(101, 5)])
    # keep_end: 6 + 6 = 12, so the prompt keeps 4
    assert Truncation(10, None, "keep_end").cut(ids(1, 6), [ids(101, 6)], 1) == ([1, 4, 5, 6], [ids(101, 6)])
    # room for a single prompt token: the BOS alone
    assert Truncation(10, 1).cut(ids(1, 6), [ids(101, 9)], 1) == ([1], [ids(101, 9)])
    # an uncut prompt is left alone
    assert Truncation(10, 4).cut(ids(1, 3), [ids(101, 9)], 1) == ([1, 2, 3], [ids(101, 7)])


def test_keep_end():
    cut = Truncation(10, None, "keep_end").cut
    assert cut(ids(1, 6), [ids(101, 4), ids(201, 2)], None) == (ids(1, 6), [ids(101, 4), ids(201, 2)])
    assert cut(ids(1, 6), [ids(101, 7), ids(201, 2)], None) == (ids(4, 3), [ids(101, 7), ids(201, 2)])
    # a completion of 12 keeps its last 9, behind one prompt token
    assert cut(ids(1, 6), [ids(101, 12), ids(201, 2)], None) == ([6], [ids(104, 9), ids(201, 2)])


def test_keep_start_may_leave_no_room():
    assert Truncation(10).cut(ids(1, 10), [ids(101, 3)], 1) == (ids(1, 10), [[]])
    assert Truncation(10).cut(ids(1, 8), [ids(101, 3), ids(201, 1)], 1) == (ids(1, 8), [[101, 102], [201]])


def test_no_limit_cuts_nothing():
    assert Truncation().cut(ids(1, 999), [ids(1, 999)], 1) == (ids(1, 999), [ids(1, 999)])


LENGTHS = st.integers(1, 20)


@given(LENGTHS, LENGTHS, LENGTHS, st.integers(2, 25))
def test_keep_start_is_trls(p, c, r, max_length):
    """TRL's collator cuts prompt + completion to their first `max_length` ids."""
    collator = DataCollatorForPreference(pad_token_id=0, max_length=max_length, truncation_mode="keep_start")
    batch = collator([{"prompt_ids": ids(1, p), "chosen_ids": ids(101, c), "rejected_ids": ids(201, r)}])
    prompt, completions = Truncation(max_length).cut(ids(1, p), [ids(101, c), ids(201, r)], None)
    for row, completion in enumerate(completions):
        length = int(batch["attention_mask"][row].sum())
        if p >= max_length:  # TRL drops such rows before the collator; we too, for the completion is empty
            assert not completion
        else:
            assert batch["input_ids"][row, :length].tolist() == [*prompt, *completion]
            assert batch["completion_mask"][row, :length].tolist() == [0] * len(prompt) + [1] * len(completion)


@given(LENGTHS, LENGTHS, st.integers(2, 25))
def test_keep_end_is_trls_for_the_longer_completion(p, c, max_length):
    """Without a BOS, and while the completion leaves room for the prompt token that must stand before it."""
    collator = DataCollatorForPreference(pad_token_id=0, max_length=max_length, truncation_mode="keep_end")
    batch = collator([{"prompt_ids": ids(1, p), "chosen_ids": ids(101, c), "rejected_ids": [201]}])
    prompt, (chosen, _) = Truncation(max_length, None, "keep_end").cut(ids(1, p), [ids(101, c), [201]], None)
    length = int(batch["attention_mask"][0].sum())
    theirs = batch["input_ids"][0, :length].tolist()
    assert [*prompt, *chosen][1:] == theirs[1:]
    assert c >= max_length or [*prompt, *chosen] == theirs


@given(
    LENGTHS,
    st.lists(LENGTHS, min_size=1, max_size=4),
    st.integers(2, 25),
    st.integers(1, 24),
    st.booleans(),
    st.booleans(),
)
def test_never_longer_than_max_length(p, completions, max_length, limit, bos, keep_end):
    truncation = Truncation(
        max_length, limit if limit < max_length and not keep_end else None, "keep_end" if keep_end else "keep_start"
    )
    kept, cut = truncation.cut(ids(1, p), [ids(101, c) for c in completions], 1 if bos else None)
    assert len(kept) >= 1
    for completion in cut:
        assert len(kept) + len(completion) <= max_length or not completion
    assert kept[0] == 1 or not bos


@pytest.mark.parametrize(
    "settings, message",
    [
        ((10, 10), r"max_prompt_length \(10\) must be smaller than max_length \(10\)"),
        ((10, 0), "max_prompt_length must be at least 1, not 0"),
        ((None, 5), "max_prompt_length needs max_length"),
        ((1, None), "max_length must be at least 2"),
        ((10, None, "middle"), "truncation_mode must be"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Truncation(*settings)
