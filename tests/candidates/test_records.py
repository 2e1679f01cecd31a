"""The candidate record: what goes in comes out, from parquet and from jsonl, and what is not sound is refused."""

import math

import pytest
from datasets import load_dataset

from prefopt.candidates.records import (
    join_candidates,
    make_candidate,
    make_record,
    off_policy_candidates,
    output_file,
    read_records,
    to_dataset,
    write_records,
)
from prefopt.files import write_jsonl

SYSTEM_PROMPT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "None of 你好 <|eot_id|>?"}]


def records():
    sampled = [
        make_candidate(f"answer {k}\n", source="policy", k=k, finish_reason=reason, num_tokens=3 + k)
        for k, reason in enumerate(["stop", "length"])
    ]
    judged = make_candidate("", source="dataset[chosen]", scores={"win_prob": 0.25})
    return [
        make_record("a", SYSTEM_PROMPT, [*sampled, judged]),
        make_record("b", [{"role": "user", "content": "🙂"}], []),
    ]


@pytest.mark.parametrize("name", ["candidates.parquet", "candidates.jsonl", "candidates.jsonl.gz"])
def test_records_survive_the_round_trip(tmp_path, name):
    write_records(tmp_path / name, records())
    assert read_records(tmp_path / name) == records()
    reader = "parquet" if name.endswith("parquet") else "json"
    rows = load_dataset(reader, data_files=str(tmp_path / name), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows[0]["candidates"][1]["text"] == "answer 1\n"
    assert rows[0]["prompt"] == SYSTEM_PROMPT


def test_a_folder_that_a_command_wrote_is_read_by_its_records(tmp_path):
    write_records(tmp_path / "candidates.parquet", records())
    write_jsonl(tmp_path / "skipped.jsonl", [{"row": 1, "reason": "empty prompt"}])
    assert [record["prompt_id"] for record in read_records(tmp_path)] == ["a", "b"]


def test_records_of_two_formats_are_not_left_side_by_side(tmp_path):
    assert output_file(tmp_path, "jsonl") == tmp_path / "candidates.jsonl"
    write_records(tmp_path / "candidates.parquet", records())
    assert output_file(tmp_path, "parquet") == tmp_path / "candidates.parquet"
    with pytest.raises(ValueError, match=r"candidates\.parquet is there already"):
        output_file(tmp_path, "jsonl")


def test_string_prompts_stay_strings_and_join_conversations_as_user_turns(tmp_path):
    plain = [make_record(str(i), f"question {i}", [make_candidate("x", source="m")]) for i in range(3)]
    write_records(tmp_path / "plain.parquet", plain)
    assert read_records(tmp_path / "plain.parquet") == plain
    write_records(tmp_path / "mixed.jsonl", [plain[0], records()[0]])
    assert read_records(tmp_path / "mixed.jsonl")[0]["prompt"] == [{"role": "user", "content": "question 0"}]


def test_tables_tools_and_other_columns_are_kept(tmp_path):
    record = {
        **records()[0],
        "source": "oasst",
        "tables": {"pairs": [[0.0, 1.0, 2.0], [-1.0, 0.0, 1.0], [-2.0, 0.5, 0]]},
    }
    record["tools"] = [{"name": "search", "parameters": {"q": "string"}}]
    write_records(tmp_path / "x.parquet", [record])
    assert read_records(tmp_path / "x.parquet") == [record]


def test_messages_with_further_keys_are_kept(tmp_path):
    call = [
        {"role": "user", "content": "Look it up."},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]},
        {"role": "tool", "content": "42"},
    ]
    write_records(tmp_path / "x.parquet", [make_record("c", call, []), records()[0]])
    assert [record["prompt"] for record in read_records(tmp_path / "x.parquet")] == [call, SYSTEM_PROMPT]


def test_rows_without_any_candidate_have_the_same_columns():
    empty = to_dataset([make_record("a", "hello", [])])
    full = to_dataset([make_record("a", "hello", [make_candidate("x", source="m")])])
    assert empty.features == full.features


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"prompt_id": None}, "row 0 has no `prompt_id`"),
        ({"prompt": 3}, "neither a string nor a list of messages"),
        ({"candidates": "x"}, "`candidates` is not a list"),
        ({"candidates": [{"source": "m"}]}, "candidate 0 has no `text`"),
        ({"candidates": [{"text": "x", "finish_reason": "eos"}]}, "finish_reason is 'eos'"),
        ({"candidates": [{"text": "x", "scores": {"rm": math.nan}}]}, "a score is nan"),
        ({"candidates": [{"text": "x", "scores": {"rm": "high"}}]}, "a score is 'high'"),
        ({"candidates": [{"text": "x"}], "tables": {"t": [[0.0, 1.0]]}}, "table 't' does not have 1 rows of 1"),
        ({"candidates": [], "tables": {"t": False}}, "table 't' does not have 0 rows of 0"),
        ({"candidates": [{"text": "x"}], "tables": {"t": [[math.inf]]}}, "table 't' is inf"),
    ],
)
def test_what_is_not_a_record_is_refused(tmp_path, change, reason):
    write_jsonl(tmp_path / "x.jsonl", [{"prompt_id": "a", "prompt": "hi", "candidates": [], **change}])
    with pytest.raises(ValueError, match=reason):
        read_records(tmp_path / "x.jsonl")


def test_unsound_records_are_not_written(tmp_path):
    bad = make_record("a", "hi", [make_candidate("x", source="m", scores={"rm": math.inf})])
    with pytest.raises(ValueError, match="a score is inf"):
        write_records(tmp_path / "x.parquet", [bad])
    with pytest.raises(ValueError, match=r"written as \.parquet"):
        write_records(tmp_path / "x.csv", records())
    with pytest.raises(ValueError, match="no records"):
        write_records(tmp_path / "x.jsonl", [])
    assert not list(tmp_path.iterdir())


def test_two_records_of_one_prompt_are_refused(tmp_path):
    write_jsonl(tmp_path / "x.jsonl", [{"prompt_id": "a", "prompt": "hi", "candidates": []}] * 2)
    with pytest.raises(ValueError, match="row 1: a second record of the prompt_id 'a'"):
        read_records(tmp_path / "x.jsonl")


def test_responses_of_a_dataset_become_candidates():
    row = {
        "chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "good"}],
        "rejected": "bad",
        "completions": [
            {"model": "gpt-4", "response": "one", "overall_score": 8.5},
            {"model": "gpt-4", "response": "two", "overall_score": 3},
            {"model": "llama", "response": "three", "custom_system_prompt": "x"},
        ],
        "baseline": None,
    }
    found = off_policy_candidates(row, ["chosen", "rejected", "completions", "baseline"])
    assert [(c["source"], c["k"], c["text"], c["scores"]) for c in found] == [
        ("dataset[chosen]", 0, "good", {}),
        ("dataset[rejected]", 0, "bad", {}),
        ("gpt-4", 0, "one", {"overall_score": 8.5}),
        ("gpt-4", 1, "two", {"overall_score": 3.0}),
        ("llama", 0, "three", {}),
    ]
    joined = join_candidates(records()[0], found)
    assert [c["text"] for c in joined["candidates"]][-5:] == ["good", "bad", "one", "two", "three"]
    assert all(c["finish_reason"] is None and c["num_tokens"] is None for c in found)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"other": "x"}, r"no column 'chosen' of responses; it has \['other'\]"),
        ({"chosen": 3}, "holds no response"),
        ({"chosen": [{"role": "user", "content": "q"}]}, "ends with 'user'"),
        ({"chosen": {"model": "m"}}, "holds no response"),
    ],
)
def test_a_column_without_responses_is_refused(row, reason):
    with pytest.raises(ValueError, match=reason):
        off_policy_candidates(row, ["chosen"])
