"""Prompt sets without a common prompt."""

import random
from pathlib import Path

import pytest

from prefopt.candidates.split import SplitArguments, assign, check_disjoint, run
from prefopt.data.holdout import prompt_identity
from prefopt.files import read_json, read_jsonl, write_jsonl

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
SETS = ("reward_model", "policy", "test")


def split(tmp_path, rows, name="out", **settings):
    write_jsonl(tmp_path / f"{name}.jsonl", rows)
    folder = run(SplitArguments(str(tmp_path / f"{name}.jsonl"), str(tmp_path / name), **settings))
    return {part: read_jsonl(folder / f"{part}.jsonl") for part in SETS if (folder / f"{part}.jsonl").exists()}


def prompts_of(rows):
    return {row["prompt"] for row in rows}


def test_sets_have_the_asked_sizes_and_no_common_prompt(tmp_path):
    rows = [{"prompt": f"question {i // 2}", "n": i} for i in range(200)]
    found = split(tmp_path, rows, reward_model=0.5, policy=0.3, test=0.2)
    assert {name: len(prompts_of(part)) for name, part in found.items()} == {
        "reward_model": 50,
        "policy": 30,
        "test": 20,
    }
    assert sorted(row["n"] for part in found.values() for row in part) == list(range(200))
    assert [row["n"] for row in found["policy"]] == sorted(row["n"] for row in found["policy"])
    report = read_json(tmp_path / "out" / "split_report.json")
    assert report["rows"] == {"reward_model": 100, "policy": 60, "test": 40}


def test_numbers_of_prompts_and_left_out_sets(tmp_path):
    rows = [{"prompt": f"question {i}"} for i in range(20)]
    found = split(tmp_path, rows, reward_model=0, policy=7, test=3)
    assert {name: len(part) for name, part in found.items()} == {"policy": 7, "test": 3}
    assert read_json(tmp_path / "out" / "split_report.json")["prompts in no set"] == 10


def test_the_seed_decides_and_the_order_does_not(tmp_path):
    rows = [{"prompt": f"question {i}"} for i in range(100)]
    shuffled = random.Random(0).sample(rows, len(rows))
    first, other_order, other_seed = (
        {name: prompts_of(part) for name, part in split(tmp_path, given, name=folder, seed=seed).items()}
        for given, folder, seed in ((rows, "a", 1), (shuffled, "b", 1), (rows, "c", 2))
    )
    assert first == other_order != other_seed


def test_prompts_are_the_same_whatever_their_form(tmp_path):
    same = ["What is  up?", "what is up?\n", [{"role": "user", "content": "What is up?"}]]
    assert len({prompt_identity(prompt) for prompt in same}) == 1
    system = [{"role": "system", "content": "x"}, {"role": "user", "content": "What is up?"}]
    assert prompt_identity(system) != prompt_identity(same[0])
    rows = [{"prompt": text} for i in range(30) for text in (f"What {i}", f"what  {i} ")]
    found = split(tmp_path, rows)
    keys = [{prompt_identity(row["prompt"]) for row in part} for part in found.values()]
    assert sum(map(len, keys)) == len(set().union(*keys)) == 30


def test_pairs_and_dialogues_are_split_by_their_prompts(tmp_path):
    rows = [
        {"chosen": f"\n\nHuman: {i}\n\nAssistant: yes", "rejected": f"\n\nHuman: {i}\n\nAssistant: no"}
        for i in range(30)
    ]
    found = split(tmp_path, [*rows, {"chosen": "", "rejected": None}])
    assert sum(map(len, found.values())) == 30
    assert sum(read_json(tmp_path / "out" / "split_report.json")["rows without a prompt"].values()) == 1


def test_an_overlap_is_found(tmp_path):
    write_jsonl(tmp_path / "policy.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    write_jsonl(tmp_path / "test.jsonl", [{"prompt": " B"}])
    with pytest.raises(ValueError, match="policy and test have 1 prompts in common"):
        check_disjoint(tmp_path, ["policy", "test"])


def test_rounding_loses_no_prompt():
    keys = [str(i) for i in range(101)]
    places = assign(keys, {"a": 0.33, "b": 0.33, "c": 0.34}, seed=0)
    assert len(places) == 101
    with pytest.raises(ValueError, match="c would get none of 5 prompts"):
        assign(keys[:5], {"a": 0.5, "b": 0.45, "c": 0.05}, seed=0)
    with pytest.raises(ValueError, match="102 prompts are asked for, but there are 101"):
        assign(keys, {"a": 100, "b": 2}, seed=0)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"prompts": ""}, "prompts is missing"),
        ({"test": -1}, "test is -1"),
        ({"test": 1.5}, "test is 1.5"),
        ({"test": 0.9}, "more than 1"),
        ({"test": 5}, "mix shares and numbers"),
        ({"test": 0, "policy": 0}, "at least two sets"),
    ],
)
def test_mistakes_are_told(changes, reason):
    with pytest.raises(ValueError, match=reason):
        SplitArguments(**{"prompts": "p", "output_dir": "o", **changes})


@pytest.mark.skipif(not SHARED.exists(), reason="the real data are not here")
def test_real_dialogues(tmp_path):
    folder = run(SplitArguments(str(SHARED / "hh_helpful_train.jsonl.gz"), str(tmp_path / "out")))
    parts = {name: prompts_of(read_jsonl(folder / f"{name}.jsonl")) for name in SETS}
    assert not parts["reward_model"] & parts["policy"] and not parts["policy"] & parts["test"]
    assert sum(len(read_jsonl(folder / f"{name}.jsonl")) for name in SETS) == 1500
