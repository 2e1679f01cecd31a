"""Rows of every shape that users have, brought to one schema."""

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trl import extract_prompt

from prefopt.data import BadRow
from prefopt.data.rows import check_columns, normalise_pair, normalise_prompt


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def texts(row):
    return row["prompt"], row["chosen"], row["rejected"]


QUESTION, YES, NO = [user("Is it?")], [assistant("Yes.")], [assistant("No.")]

SHAPES = {
    "explicit messages": {"prompt": QUESTION, "chosen": YES, "rejected": NO},
    "implicit messages": {"chosen": QUESTION + YES, "rejected": QUESTION + NO},
    "string prompt beside whole conversations": {
        "prompt": "Is it?",
        "chosen": QUESTION + YES,
        "rejected": QUESTION + NO,
    },
    "string prompt beside answers": {"prompt": "Is it?", "chosen": YES, "rejected": NO},
    "message prompt beside whole conversations": {
        "prompt": QUESTION,
        "chosen": QUESTION + YES,
        "rejected": QUESTION + NO,
    },
    "message prompt beside strings": {"prompt": QUESTION, "chosen": "Yes.", "rejected": "No."},
    "messages and rejected_response": {"messages": QUESTION + YES, "rejected_response": "No."},
    "text parts": {
        "prompt": [{"role": "user", "content": [{"type": "text", "text": "Is it?"}]}],
        "chosen": YES,
        "rejected": NO,
    },
    "keys that Arrow filled with None": {
        "prompt": [{**QUESTION[0], "tool_calls": None}],
        "chosen": [{**YES[0], "name": None}],
        "rejected": NO,
    },
}


@pytest.mark.parametrize("shape", SHAPES)
def test_all_message_shapes_give_the_same_row(shape):
    row = normalise_pair(SHAPES[shape])
    assert texts(row) == (QUESTION, YES, NO)
    assert row["row_id"] == normalise_pair(SHAPES["explicit messages"])["row_id"]


def test_strings():
    row = {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}
    assert texts(normalise_pair(row)) == ("The sky is", " blue.", " green.")


def test_hh_dialogues_end_their_prompt_with_the_last_shared_assistant_turn():
    """The answers begin alike; the shared words belong to them, not to the prompt."""
    start = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: A colour?\n\nAssistant:"
    row = normalise_pair({"chosen": start + " I like blue.", "rejected": start + " I like nothing."})
    assert texts(row) == (start, " I like blue.", " I like nothing.")
    # one answer is the beginning of the other
    row = normalise_pair({"chosen": start + " Blue", "rejected": start + " Blue and red"})
    assert texts(row) == (start, " Blue", " Blue and red")


@given(st.text("ab c", max_size=8), st.text("ab c", min_size=1, max_size=8), st.text("ab c", min_size=1, max_size=8))
def test_implicit_string_prompts_are_trls(shared, chosen, rejected):
    chosen, rejected = shared + chosen, shared + rejected
    theirs = extract_prompt({"chosen": chosen, "rejected": rejected})
    try:
        row = normalise_pair({"chosen": chosen, "rejected": rejected})
    except BadRow:
        assert chosen == rejected or not theirs["chosen"].strip() or not theirs["rejected"].strip()
        return
    if chosen[0] != rejected[0]:
        assert row["prompt"] == ""  # TRL looks at the character before the first, which is the last
    else:
        assert {name: row[name] for name in theirs} == theirs


def test_implicit_message_prompts_are_trls():
    chosen = [{"role": "system", "content": "s"}, user("a"), assistant("b"), user("c"), assistant("d")]
    for rejected in (
        [*chosen[:4], assistant("e")],
        [*chosen[:2], assistant("x")],
        [*chosen, user("f"), assistant("g")],
    ):
        theirs = extract_prompt({"chosen": chosen, "rejected": rejected})
        row = normalise_pair({"chosen": chosen, "rejected": rejected})
        assert {name: row[name] for name in theirs} == theirs


def test_tools_and_template_settings():
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"x": None}}}}
    clean = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    base = SHAPES["explicit messages"]
    rows = [
        normalise_pair({**base, "tools": value, "chat_template_kwargs": {"enable_thinking": False, "other": None}})
        for value in ([tool], json.dumps([tool]), [json.dumps(tool)])
    ]
    for row in rows:
        assert row["tools"] == [clean]
        assert row["chat_template_kwargs"] == {"enable_thinking": False}
    assert rows[0]["row_id"] == rows[1]["row_id"] != normalise_pair(base)["row_id"]
    bare = normalise_pair({**base, "tools": None, "chat_template_kwargs": None})
    assert (
        bare == normalise_pair({**base, "tools": []}) == normalise_pair({**base, "tools": ""}) == normalise_pair(base)
    )


def test_method_columns_are_kept_under_one_name():
    base = SHAPES["explicit messages"]
    row = normalise_pair(
        {**base, "chosen_probs": 0.75, "chosen_probs_win": 0.625, "chosen_probs_lose": 0.25, "source": "x"}
    )
    numbers = {"chosen_over_rejected_prob": 0.75, "chosen_win_prob": 0.625, "rejected_win_prob": 0.25}
    assert {name: row[name] for name in numbers} == numbers
    assert "source" not in row and "chosen_probs" not in row
    row = normalise_pair(
        {**base, "ref_chosen_logps": [-1, -2.5], "ref_rejected_logps": -3, "margin": 1, "chosen_score": None}
    )
    assert row["ref_chosen_logps"] == [-1.0, -2.5] and row["ref_rejected_logps"] == -3.0
    assert row["margin"] == 1.0 and row["chosen_score"] is None


def test_row_ids_depend_on_content_alone():
    base = SHAPES["explicit messages"]
    identity = normalise_pair(base)["row_id"]
    assert len(identity) == 16 and int(identity, 16) >= 0
    assert normalise_pair({**base, "margin": 1.0, "extra": 5})["row_id"] == identity
    assert normalise_pair({**base, "chosen": NO, "rejected": YES})["row_id"] != identity
    assert (
        normalise_pair({"prompt": "a", "chosen": "bc", "rejected": "d"})["row_id"]
        != normalise_pair({"prompt": "ab", "chosen": "c", "rejected": "d"})["row_id"]
    )
    # fixed for ever: caches on disk are keyed by it
    fixed = hashlib.sha256(b'["a",["b","c"]]').hexdigest()[:16]
    assert normalise_pair({"prompt": "a", "chosen": "b", "rejected": "c"})["row_id"] == fixed


FAULTS = [
    ({"prompt": "a", "chosen": "b", "rejected": None}, "missing field", "`rejected` is missing"),
    ({"prompt": None, "chosen": "b", "rejected": "c"}, "missing field", "`prompt` is missing"),
    ({"prompt": "a", "chosen": "b"}, "missing field", "`rejected` is missing"),
    (
        {"prompt": "a", "chosen": 5, "rejected": "c"},
        "wrong type",
        "`chosen` is neither a string nor a list of messages",
    ),
    ({"prompt": "a", "chosen": [{"content": "x"}], "rejected": "c"}, "wrong type", "a list of messages with a role"),
    ({"prompt": "a", "chosen": "b", "rejected": NO}, "wrong type", "one completion is a string"),
    ({"prompt": "a", "chosen": [{"role": "assistant", "content": 5}], "rejected": NO}, "wrong type", "is not text"),
    ({"prompt": "a", "chosen": [{"role": "assistant"}], "rejected": NO}, "missing field", "no content"),
    ({"prompt": "a", "chosen": [], "rejected": NO}, "missing field", "an empty list of messages"),
    ({"prompt": "a", "chosen": "", "rejected": "c"}, "empty completion", "`chosen` is empty"),
    ({"prompt": "a", "chosen": "b", "rejected": " \n"}, "empty completion", "`rejected` is empty"),
    ({"prompt": QUESTION, "chosen": YES, "rejected": [assistant("  ")]}, "empty completion", "`rejected` is empty"),
    ({"prompt": "a", "chosen": "b", "rejected": "b"}, "identical completions", "are the same"),
    ({"chosen": QUESTION + YES, "rejected": QUESTION + YES}, "identical completions", "are the same"),
    ({"chosen": YES, "rejected": NO}, "empty prompt", "share no turn"),
    ({"prompt": [], "chosen": YES, "rejected": NO}, "empty prompt", "empty list"),
    ({"messages": QUESTION, "rejected_response": "x"}, "missing field", "does not end with an assistant turn"),
    ({"messages": QUESTION + YES, "rejected_response": None}, "missing field", "`rejected_response` is missing"),
    (
        {"prompt": "a", "chosen": "b", "rejected": "c", "margin": "wide"},
        "wrong type",
        "`margin` is not a number: 'wide'",
    ),
    ({"prompt": "a", "chosen": "b", "rejected": "c", "tools": "[{"}, "wrong type", "`tools` is not JSON"),
    ({"prompt": "a", "chosen": "b", "rejected": "c", "tools": {"x": 1}}, "wrong type", "`tools` is not a list"),
    ({"prompt": "a", "chosen": "b", "rejected": "c", "chat_template_kwargs": "{"}, "wrong type", "is not JSON"),
    ({"prompt": "a", "chosen": "b", "rejected": "c", "chat_template_kwargs": [1]}, "wrong type", "is not a mapping"),
]


@pytest.mark.parametrize("row, reason, detail", FAULTS)
def test_faults(row, reason, detail):
    with pytest.raises(BadRow) as caught:
        normalise_pair(row)
    assert caught.value.reason == reason
    assert detail in caught.value.detail


def test_pictures_are_refused():
    picture = [{"role": "user", "content": [{"type": "image", "image": 1}, {"type": "text", "text": "what?"}]}]
    with pytest.raises(
        ValueError, match=r"A message of `prompt` holds a part of type \['image'\]: only text is supported"
    ):
        normalise_pair({"prompt": picture, "chosen": YES, "rejected": NO})
    with pytest.raises(ValueError, match="The train set has the column 'images': only text is supported"):
        check_columns(["prompt", "chosen", "rejected", "images"], "pairs", where="The train set")


def test_wrong_columns_are_listed_with_what_is_accepted():
    message = r"Data has the columns \['chosen', 'prompt', 'text'\]\. Rows of pairs need one of: "
    message += r"prompt \+ chosen \+ rejected; "
    with pytest.raises(ValueError, match=message + r"chosen \+ rejected; messages \+ rejected_response; prompt_ids"):
        check_columns(["text", "prompt", "chosen"], "pairs", where="Data")
    with pytest.raises(
        ValueError, match=r"Rows of comparisons need one of: prompt \+ responses \+ scores; text \+ scores"
    ):
        check_columns(["prompt"], "comparisons")
    with pytest.raises(ValueError, match="both 'chosen_probs' and 'chosen_over_rejected_prob'"):
        check_columns(["prompt", "chosen", "rejected", "chosen_probs", "chosen_over_rejected_prob"], "pairs")
    check_columns(["whatever"], "any")


def test_prompts():
    system = {"role": "system", "content": "Be brief."}
    assert normalise_prompt({"prompt": "None"})["prompt"] == "None"
    assert normalise_prompt({"prompt": [system, *QUESTION]})["prompt"] == [system, *QUESTION]
    assert normalise_prompt({"messages": [system, *QUESTION, *YES]})["prompt"] == [system, *QUESTION]
    assert normalise_prompt({"messages": QUESTION})["prompt"] == QUESTION
    for shape in SHAPES.values():
        if "chosen" in shape:
            assert normalise_prompt(shape)["prompt"] == QUESTION
    for row in ({"prompt": " "}, {"prompt": []}, {"messages": YES}):
        with pytest.raises(BadRow, match="empty prompt"):
            normalise_prompt(row)
    with pytest.raises(BadRow, match="missing field"):
        normalise_prompt({"prompt": None})
