"""Data sets in, token ids and counts out."""

import random

import pytest
from datasets import Dataset, DatasetDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prefopt.data import describe_sample, normalise_rows, tokenize_comparisons, tokenize_pairs, tokenize_prompts
from tests.tiny import tiny_tokenizer


@pytest.fixture(autouse=True)
def quiet():
    import datasets

    datasets.disable_progress_bars()


def user(content):
    return [{"role": "user", "content": content}]


def answer(content):
    return [{"role": "assistant", "content": content}]


PLAIN = tiny_tokenizer(None)
CHAT = tiny_tokenizer("gemma2")
LETTERS = tiny_tokenizer(None, corpus=[" a b c d e f g h"], vocab_size=280)  # " a", " b", ... are one token each


def letters(count, first=0):
    return "".join(f" {'abcdefgh'[(first + place) % 8]}" for place in range(count))


def string_row(prompt, chosen, rejected):
    """A row of so many tokens, for LETTERS: one more in the prompt (BOS) and in each completion (end)."""
    return {"prompt": letters(prompt), "chosen": letters(chosen, 1), "rejected": letters(rejected, 2)}


def test_columns():
    row = {
        "prompt": user("Is it?"),
        "chosen": answer("Ja, schön."),
        "rejected": answer("No."),
        "chosen_probs": 0.75,
        "source": "x",
        "ref_chosen_logps": [-1.0, -2.0],
        "ref_rejected_logps": [-3.0, -4.0],
    }
    dataset, report = tokenize_pairs(Dataset.from_list([row]), CHAT, max_length=64)
    assert dataset.column_names == [
        "row_id",
        "prompt_ids",
        "chosen_ids",
        "rejected_ids",
        "chosen_bytes",
        "rejected_bytes",
        "chosen_over_rejected_prob",
        "ref_chosen_logps",
        "ref_rejected_logps",
    ]
    out = dataset[0]
    assert CHAT.decode(out["prompt_ids"]) == "<s><start_of_turn>user\nIs it?<end_of_turn>\n<start_of_turn>model\n"
    assert CHAT.decode(out["chosen_ids"]) == "Ja, schön.<end_of_turn>\n"
    # the scored text is "Ja, schön.\n" without its special token: ö has two bytes
    assert (out["chosen_bytes"], out["rejected_bytes"]) == (12, 4)
    assert (out["chosen_over_rejected_prob"], out["ref_rejected_logps"]) == (0.75, [-3.0, -4.0])
    assert (report.rows_in, report.rows_kept, report.rows_cut, report.dropped) == (1, 1, 0, {})


def test_cutting_is_counted_and_cut_completions_have_no_end():
    rows = [string_row(3, 2, 2), string_row(6, 4, 1), string_row(2, 9, 9), string_row(8, 9, 2)]
    dataset, report = tokenize_pairs(Dataset.from_list(rows), LETTERS, max_length=10, max_prompt_length=4)
    lengths = [(len(row["prompt_ids"]), len(row["chosen_ids"]), len(row["rejected_ids"])) for row in dataset]
    # 4 + 3 fits; 7 + 5 cuts the prompt to 4; 3 + 10 cuts both completions to 7; 9 + 10 cuts prompt and chosen
    assert lengths == [(4, 3, 3), (4, 5, 2), (3, 7, 7), (4, 6, 3)]
    assert [(row["chosen_ids"][-1] == 2, row["rejected_ids"][-1] == 2) for row in dataset] == [
        (True, True),
        (True, True),
        (False, False),
        (False, True),
    ]
    assert all(row["prompt_ids"][0] == 1 and row["prompt_ids"].count(1) == 1 for row in dataset)
    assert LETTERS.decode(dataset[1]["prompt_ids"]) == "<s> d e f"
    assert report.cut == {"prompt": 2, "chosen": 2, "rejected": 1} and report.rows_cut == 3
    assert (report.lengths["prompt"].mean, report.lengths["prompt"].max) == (3.75, 4)
    assert (report.lengths["chosen"].p50, report.lengths["chosen"].max) == (5.5, 7)
    assert dataset[2]["chosen_bytes"] == 14  # seven tokens of two bytes


def test_keep_start_drops_prompts_that_fill_the_length():
    rows = [string_row(9, 2, 2), string_row(8, 2, 3)]
    dataset, report = tokenize_pairs(Dataset.from_list(rows), LETTERS, max_length=10)
    assert report.dropped == {"prompt leaves no room for a completion": 1}
    assert [(len(row["prompt_ids"]), len(row["chosen_ids"]), len(row["rejected_ids"])) for row in dataset] == [
        (9, 1, 1)
    ]


def test_completions_that_are_the_same_once_cut_are_dropped():
    same = {"prompt": letters(3), "chosen": letters(9), "rejected": letters(9) + " z"}
    dataset, report = tokenize_pairs(
        Dataset.from_list([same, string_row(1, 1, 1)]), LETTERS, max_length=10, max_prompt_length=4
    )
    assert report.dropped == {"identical after cutting": 1} and len(dataset) == 1


BAD_ROWS = [
    {"prompt": "p", "chosen": " a", "rejected": " b"},
    {"prompt": "p", "chosen": "", "rejected": " b"},
    {"prompt": "p", "chosen": " a", "rejected": " a"},
    {"prompt": "p", "chosen": None, "rejected": " b"},
    {"prompt": "p", "chosen": " a", "rejected": "  "},
    {"prompt": "p", "chosen": " c", "rejected": " d"},
]


@pytest.mark.parametrize("normalise_first", [False, True])
def test_bad_rows_are_dropped_and_counted(normalise_first):
    dataset = Dataset.from_list(BAD_ROWS)
    if normalise_first:
        dataset = normalise_rows(dataset, "pairs")
        assert len(dataset) == 6
    kept, report = tokenize_pairs(dataset, LETTERS, max_length=32)
    assert (report.rows_in, report.rows_kept, report.rows_dropped) == (6, 2, 4)
    assert report.dropped == {"empty completion": 2, "identical completions": 1, "missing field": 1}
    assert report.examples["missing field"] == (3, "`chosen` is missing")
    assert [LETTERS.decode(row["chosen_ids"]) for row in kept] == [" a</s>", " c</s>"]
    assert report.table() == (
        "train: 6 rows read, 2 kept, 4 dropped, 0 cut\n"
        "  dropped         2  empty completion (first: row 1, `chosen` is empty)\n"
        "  dropped         1  identical completions (first: row 2, `chosen` and `rejected` are the same)\n"
        "  dropped         1  missing field (first: row 3, `chosen` is missing)\n"
        "  tokens          mean     p50     p95     max\n"
        "  prompt           2.0       2       2       2\n"
        "  chosen           2.0       2       2       2\n"
        "  rejected         2.0       2       2       2"
    )


@pytest.mark.parametrize(
    ("column", "value", "detail"),
    [
        ("tools", "{half", "`tools` is not JSON"),
        ("tools", ["{half"], "`tools` is not JSON"),
        ("tools", '{"no": "list"}', "`tools` is not a list"),
        ("chat_template_kwargs", "{half", "`chat_template_kwargs` is not JSON"),
        ("chosen_score", "high", "`chosen_score` is not a number: 'high'"),
    ],
)
def test_columns_beside_the_texts_make_a_bad_row_too(column, value, detail):
    good = {"prompt": "p", "chosen": " a", "rejected": " b", column: None}
    _, report = tokenize_pairs(Dataset.from_list([good, {**good, column: value}]), LETTERS, max_length=32)
    assert report.dropped == {"wrong type": 1}
    assert report.examples["wrong type"][1].startswith(detail)


def test_a_margin_that_is_no_number_makes_a_bad_row():
    good = {"prompt": "p", "responses": ["a", "b"], "scores": [1, 0], "margin": "1.5"}
    kept, report = tokenize_comparisons(Dataset.from_list([good, {**good, "margin": "big"}]), LETTERS, max_length=32)
    assert kept["margin"] == [1.5]
    assert report.examples == {"wrong type": (1, "`margin` is not a number: 'big'")}


def test_bad_rows_can_be_refused():
    with pytest.raises(
        ValueError, match=r"Row 1 of the eval set: empty completion \(`chosen` is empty\)\. Fix it, or set"
    ):
        tokenize_pairs(Dataset.from_list(BAD_ROWS), PLAIN, max_length=32, on_bad_row="raise", name="eval")
    with pytest.raises(ValueError, match='on_bad_row must be "drop" or "raise", not \'skip\''):
        tokenize_pairs(Dataset.from_list(BAD_ROWS), PLAIN, max_length=32, on_bad_row="skip")
    with pytest.raises(
        ValueError, match=r"No row of the train set can be used\.\ntrain: 2 rows read, 0 kept"
    ) as caught:
        tokenize_pairs(Dataset.from_list(BAD_ROWS[1:3]), PLAIN, max_length=32)
    assert "empty completion" in str(caught.value) and "identical completions" in str(caught.value)


def test_prompts_that_are_no_prefix_are_counted_or_refused():
    rows = [
        {"prompt": "The sky is bl", "chosen": "ue", "rejected": "ack"},
        {"prompt": "The sky is", "chosen": " a", "rejected": " b"},
    ]
    dataset, report = tokenize_pairs(Dataset.from_list(rows), PLAIN, max_length=32)
    assert (report.rows_kept, report.not_prefix) == (2, 1)
    assert "note            1  prompts are not a token prefix" in report.table()
    dataset, report = tokenize_pairs(Dataset.from_list(rows), PLAIN, max_length=32, strict_prefix=True)
    assert report.dropped == {"prompt is not a token prefix": 1} and len(dataset) == 1


def test_a_sample_shows_what_is_scored():
    rows = [{"prompt": user("Is it?"), "chosen": answer("Yes."), "rejected": answer("No.")}]
    dataset, _ = tokenize_pairs(Dataset.from_list(rows), CHAT, max_length=64)
    sample = describe_sample(CHAT, dataset[0])
    assert "<s><start_of_turn>user\nIs it?<end_of_turn>\n<start_of_turn>model\n" in sample
    assert "⟦Yes.<end_of_turn>\n⟧" in sample and "⟦No.<end_of_turn>\n⟧" in sample
    assert sample.count("⟦") == 3  # two completions, and the heading that explains the mark
    compared, _ = tokenize_comparisons(Dataset.from_list(rows), CHAT, max_length=64)
    assert "response 0 (score 1)" in describe_sample(CHAT, compared[0])


def test_wrong_data_sets():
    good = Dataset.from_list(BAD_ROWS[:1])
    with pytest.raises(ValueError, match="The train set is streamed"):
        tokenize_pairs(good.to_iterable_dataset(), PLAIN, max_length=32)
    with pytest.raises(ValueError, match=r"is a DatasetDict: pick one of its splits \['test'\]"):
        tokenize_pairs(DatasetDict({"test": good}), PLAIN, max_length=32)
    with pytest.raises(ValueError, match=r"is a list; pass a datasets\.Dataset"):
        tokenize_pairs(BAD_ROWS, PLAIN, max_length=32)
    with pytest.raises(ValueError, match="The train set has no rows"):
        tokenize_pairs(good.select([]), PLAIN, max_length=32)
    with pytest.raises(ValueError, match=r"The train set has the columns \['chosen', 'prompt'\]"):
        tokenize_pairs(good.remove_columns("rejected"), PLAIN, max_length=32)
    with pytest.raises(ValueError, match="no chat template"):
        tokenize_pairs(
            Dataset.from_list([{"chosen": user("a") + answer("b"), "rejected": user("a") + answer("c")}]),
            PLAIN,
            max_length=9,
        )
    with pytest.raises(ValueError, match="must be smaller than max_length"):
        tokenize_pairs(good, PLAIN, max_length=32, max_prompt_length=32)
    with pytest.raises(ValueError, match="only text is supported"):
        tokenize_pairs(good.add_column("images", [[1]]), PLAIN, max_length=32)


def test_tokenised_rows_pass_through_and_are_still_cut():
    rows = [string_row(3, 2, 2), string_row(6, 4, 1)]
    once, _ = tokenize_pairs(Dataset.from_list(rows), LETTERS, max_length=32)
    again, report = tokenize_pairs(once, LETTERS, max_length=32)
    assert again.to_list() == once.to_list() and report.rows_kept == 2
    shorter, report = tokenize_pairs(once, LETTERS, max_length=10, max_prompt_length=4)
    assert (
        shorter.to_list()
        == tokenize_pairs(Dataset.from_list(rows), LETTERS, max_length=10, max_prompt_length=4)[0].to_list()
    )
    assert report.rows_cut == 1
    bare = once.remove_columns(["row_id", "chosen_bytes", "rejected_bytes"])  # as TRL leaves them
    filled, _ = tokenize_pairs(bare, LETTERS, max_length=32)
    assert filled.remove_columns("row_id").to_list() == once.remove_columns("row_id").to_list()
    assert len(set(filled["row_id"])) == 2
    _, report = tokenize_pairs(
        Dataset.from_list(
            [
                {"prompt_ids": [1], "chosen_ids": [3], "rejected_ids": [4]},
                {"prompt_ids": [1], "chosen_ids": [], "rejected_ids": [4]},
            ]
        ),
        LETTERS,
        max_length=8,
    )
    assert report.dropped == {"empty completion": 1}


def test_comparisons():
    rows = [
        {
            "prompt": letters(3),
            "responses": [letters(2, 1), letters(9, 2), letters(1, 3)],
            "scores": [0.5, 2.0, 1.0],
            "is_adversarial": True,
        },
        {
            "prompt": letters(6),
            "responses": [letters(1, 1), letters(4, 2)],
            "scores": [1.0, 0.0],
            "is_adversarial": False,
        },
        {"prompt": letters(1), "responses": [" a", " b"], "scores": [1.0, 1.0], "is_adversarial": False},
        {"prompt": letters(1), "responses": [" a"], "scores": [1.0], "is_adversarial": False},
    ]
    dataset, report = tokenize_comparisons(Dataset.from_list(rows), LETTERS, max_length=10, max_prompt_length=4)
    assert dataset.column_names == ["row_id", "prompt_ids", "response_ids", "scores", "is_adversarial"]
    assert [[len(ids) for ids in row["response_ids"]] for row in dataset] == [[3, 6, 2], [2, 5]]
    assert [len(row["prompt_ids"]) for row in dataset] == [4, 4]
    assert dataset["scores"][0] == [0.5, 2.0, 1.0] and list(dataset["is_adversarial"]) == [True, False]
    assert report.dropped == {"all scores tied": 1, "fewer than two responses": 1}
    assert report.cut == {"prompt": 1, "responses": 1} and report.rows_cut == 2
    assert report.lengths["responses"].max == 6
    assert tokenize_comparisons(dataset, LETTERS, max_length=10)[0].to_list() == dataset.to_list()
    with pytest.raises(ValueError, match="Row 2 of the train set: all scores tied"):
        tokenize_comparisons(Dataset.from_list(rows), LETTERS, max_length=10, on_bad_row="raise")
    separated = [{"text": [f"{letters(3)}<sep> a", f"{letters(3)}<sep> b"], "scores": [1.0, 0.0], "type": "apo"}]
    (row,) = tokenize_comparisons(Dataset.from_list(separated), LETTERS, max_length=10)[0]
    assert row["is_adversarial"] and LETTERS.decode(row["response_ids"][1]) == " b</s>"


def test_prompts_are_those_of_the_pairs():
    rows = [
        {"chosen": user(text) + answer("Yes."), "rejected": user(text) + answer("No."), "prompt_id": text}
        for text in ("Is it?", "None")
    ]
    pairs, _ = tokenize_pairs(Dataset.from_list(rows), CHAT, max_length=64)
    prompts, report = tokenize_prompts(Dataset.from_list(rows), CHAT, max_length=64)
    assert list(prompts["prompt_ids"]) == list(pairs["prompt_ids"])
    assert prompts.column_names == ["chosen", "rejected", "prompt_id", "row_id", "prompt_ids"]
    assert list(prompts["prompt_id"]) == ["Is it?", "None"] and prompts["chosen"][0] == rows[0]["chosen"]
    assert all(ids.count(1) == 1 for ids in prompts["prompt_ids"])
    assert list(report.lengths) == ["prompt"]


def test_prompts_that_are_too_long_are_counted():
    rows = Dataset.from_dict({"prompt": [letters(4), letters(5), " "]})
    prompts, report = tokenize_prompts(rows, LETTERS, max_length=5)
    assert report.dropped == {"prompt too long": 1, "empty prompt": 1} and len(prompts) == 1
    with pytest.raises(ValueError, match=r"Row 1 of the prompts set: prompt too long \(6 tokens, max_length 5\)"):
        tokenize_prompts(rows, LETTERS, max_length=5, on_bad_row="raise")


def test_string_prompts_as_user_turns():
    templated, _ = tokenize_prompts(
        Dataset.from_dict({"prompt": ["Is it?"]}), CHAT, max_length=64, template_strings=True
    )
    asked, _ = tokenize_prompts(Dataset.from_list([{"prompt": user("Is it?")}]), CHAT, max_length=64)
    assert templated["prompt_ids"][0] == asked["prompt_ids"][0]
    plain, _ = tokenize_prompts(Dataset.from_dict({"prompt": ["Is it?"]}), CHAT, max_length=64)
    assert CHAT.decode(plain["prompt_ids"][0]) == "<s>Is it?"


def test_a_second_run_reads_the_cache(tmp_path, monkeypatch):
    """Only what decides ids enters the key: a tokenizer that has been used and a new name of the set do not."""
    import prefopt.data.tokenization as module

    Dataset.from_list(BAD_ROWS).save_to_disk(str(tmp_path / "rows"))
    tokenizer = tiny_tokenizer(None)
    calls = []
    original = module.RowTokenizer.tokenize_batch

    def counted(self, batch, **settings):
        calls.append(1)
        return original(self, batch, **settings)

    monkeypatch.setattr(module.RowTokenizer, "tokenize_batch", counted)

    def run(**changes):
        dataset = Dataset.load_from_disk(str(tmp_path / "rows"))
        return tokenize_pairs(dataset, tokenizer, **{"max_length": 16, **changes})

    first, report = run()
    assert len(calls) == 1
    tokenizer(["a", "b c"], padding=True)
    second, again = run(name="other")
    assert len(calls) == 1 and second.to_list() == first.to_list()
    assert again.dropped == report.dropped and again.lengths == report.lengths
    run(max_length=15)
    assert len(calls) == 2
    run(strict_prefix=True)
    assert len(calls) == 3


def test_what_was_tokenised_here_with_the_same_settings_is_taken_as_it_is(monkeypatch):
    dataset, report = tokenize_pairs(Dataset.from_list(BAD_ROWS), LETTERS, max_length=16, name="first")

    def fail(*args, **settings):
        raise AssertionError("mapped again")

    with monkeypatch.context() as patch:
        patch.setattr(Dataset, "map", fail)
        again, told = tokenize_pairs(dataset, LETTERS, max_length=16, name="second")
        assert again is dataset
        assert told.name == "second" and told.dropped == report.dropped and told.lengths == report.lengths
        for other in (dataset.select([0]), dataset.remove_columns("row_id")):  # another set
            with pytest.raises(AssertionError, match="mapped again"):
                tokenize_pairs(other, LETTERS, max_length=16)
        for settings in ({"max_length": 15}, {"max_length": 16, "strict_prefix": True}):
            with pytest.raises(AssertionError, match="mapped again"):
                tokenize_pairs(dataset, LETTERS, **settings)
        with pytest.raises(AssertionError, match="mapped again"):
            tokenize_pairs(dataset, PLAIN, max_length=16)
    assert tokenize_pairs(dataset, LETTERS, max_length=15)[0].to_list() == dataset.to_list()


def test_several_processes_give_the_same(tmp_path):
    Dataset.from_list(BAD_ROWS).save_to_disk(str(tmp_path / "rows"))
    dataset = Dataset.load_from_disk(str(tmp_path / "rows"))
    alone = tokenize_pairs(dataset, PLAIN, max_length=32)
    several = tokenize_pairs(dataset, PLAIN, max_length=31, num_proc=2)
    assert several[0].to_list() == alone[0].to_list() and several[1] == alone[1]


WORDS = st.lists(st.sampled_from([" a", " b", " c", "\n", "é"]), min_size=1, max_size=12).map("".join)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.tuples(WORDS, WORDS, WORDS), min_size=1, max_size=6),
    st.integers(4, 20),
    st.booleans(),
    st.integers(0, 99),
)
def test_lengths_and_row_ids(triples, max_length, with_limit, seed):
    """No sequence is longer than max_length, every row is kept or counted, and names do not depend on the order."""
    rows = [{"prompt": "x" + p, "chosen": c + "x", "rejected": r + "y"} for p, c, r in triples]
    options = {"max_length": max_length, "max_prompt_length": max_length // 2 if with_limit else None}
    good = {"prompt": "x", "chosen": " a", "rejected": " b"}  # so that never all rows are dropped

    def run(rows):
        return tokenize_pairs(Dataset.from_list([*rows, good]), LETTERS, **options)

    dataset, report = run(rows)
    assert (
        len(dataset) == report.rows_kept and report.rows_kept + report.rows_dropped == report.rows_in == len(rows) + 1
    )
    for row in dataset:
        assert row["prompt_ids"][0] == 1 and row["prompt_ids"].count(1) == 1
        assert len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) <= max_length
        assert row["chosen_ids"] and row["rejected_ids"] and row["chosen_ids"] != row["rejected_ids"]
    shuffled = random.Random(seed).sample(rows, len(rows))
    by_name = {row["row_id"]: row for row in dataset}
    assert {row["row_id"]: row for row in run(shuffled)[0]} == by_name
