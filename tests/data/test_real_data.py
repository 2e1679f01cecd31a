"""Both real sets, where they lie beside the checkout: every row is kept or counted, and nothing is out of order."""

from pathlib import Path

import pytest
from datasets import Dataset

from prefopt.data import (
    DataArguments,
    DataSource,
    load_datasets,
    tokenize_comparisons,
    tokenize_pairs,
    tokenize_prompts,
)
from prefopt.files import read_jsonl
from tests.tiny import tiny_tokenizer

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="the real data are not beside this checkout")


def check(dataset, tokenizer, max_length, *, bos):
    for row in dataset:
        prompt, completions = row["prompt_ids"], [row["chosen_ids"], row["rejected_ids"]]
        assert len(prompt) + max(map(len, completions)) <= max_length
        assert prompt.count(tokenizer.bos_token_id) == bos and prompt[:bos] == [tokenizer.bos_token_id] * bos
        assert all(completions) and completions[0] != completions[1]


def test_hh_dialogues():
    train, _ = load_datasets(DataArguments([DataSource(str(DATA / "hh_helpful_train.jsonl.gz"))]))
    tokenizer = tiny_tokenizer(None)
    dataset, report = tokenize_pairs(train, tokenizer, max_length=512, max_prompt_length=256)
    print(f"\n{report.table()}")
    check(dataset, tokenizer, 512, bos=1)
    rows = read_jsonl(DATA / "hh_helpful_train.jsonl.gz")
    empty = sum(not row["chosen"].strip() or not row["rejected"].strip() for row in rows)
    assert report.rows_in == len(rows) == 1500 and report.dropped == {"empty completion": empty}
    assert report.not_prefix == 0
    whole = {row["prompt"] + row["chosen"] for row in rows}
    uncut = [
        row
        for row in dataset
        if row["chosen_ids"][-1] == 2 and tokenizer.decode(row["prompt_ids"]).startswith("<s>\n\nHuman:")
    ]
    assert len(uncut) > 300
    for row in uncut:
        text = tokenizer.decode([*row["prompt_ids"][1:], *row["chosen_ids"][:-1]])
        assert text in whole or len(row["prompt_ids"]) == 256
    # the same dialogues with their prompt only implied give the same prompts
    implied = Dataset.from_list(
        [{"chosen": r["prompt"] + r["chosen"], "rejected": r["prompt"] + r["rejected"]} for r in rows[:100]]
    )
    given, _ = tokenize_pairs(train.select(range(100)), tokenizer, max_length=None)
    assert tokenize_pairs(implied, tokenizer, max_length=None)[0].to_list() == given.to_list()


@pytest.mark.parametrize("style", ["gemma2", pytest.param("zephyr", marks=pytest.mark.slow)])
def test_alpaca_answers_as_messages(style):
    records = read_jsonl(DATA / "alpaca_candidates.jsonl.gz")
    rows = []
    for record in records:
        ranked = sorted(record["candidates"], key=lambda candidate: candidate["win_prob"])
        rows.append({
            "prompt": [{"role": "user", "content": record["prompt"]}],
            "responses": [ranked[place]["text"] for place in (-1, 7, 0)],
            "scores": [ranked[place]["win_prob"] for place in (-1, 7, 0)],
        })  # fmt: skip
    tokenizer = tiny_tokenizer(style)
    pairs = [{"prompt": r["prompt"], "chosen": r["responses"][0], "rejected": r["responses"][2]} for r in rows]
    dataset, report = tokenize_pairs(Dataset.from_list(pairs), tokenizer, max_length=1024, max_prompt_length=512)
    print(f"\n{report.table()}")
    check(dataset, tokenizer, 1024, bos=1 if style == "gemma2" else 0)
    assert report.rows_in == 603 and report.rows_kept + report.rows_dropped == 603 and report.not_prefix == 0
    empty = sum(not row["chosen"].strip() or not row["rejected"].strip() for row in pairs)
    assert report.dropped == ({"empty completion": empty} if empty else {})
    compared, report = tokenize_comparisons(Dataset.from_list(rows), tokenizer, max_length=None)
    tied = sum(len(set(row["scores"])) == 1 for row in rows)
    assert report.dropped.get("all scores tied", 0) == tied and report.rows_kept + report.rows_dropped == 603
    prompts, report = tokenize_prompts(Dataset.from_list(rows), tokenizer, max_length=None)
    assert report.rows_kept == 603
    named = {tuple(ids) for ids in prompts["prompt_ids"]}
    assert {tuple(ids) for ids in compared["prompt_ids"]} <= named
