"""A study's rows: one pool, split anew for each seed, never a prompt in two parts."""

from itertools import chain

import numpy as np
import pytest

from prefopt.data import DataSource
from prefopt.files import read_json, read_jsonl, write_jsonl
from prefopt.pipelines.study_data import PARTS, Pool, make_pool, split_pool, split_rows
from tests.tiny import tiny_tokenizer
from tests.tiny_runs import pair_rows


@pytest.fixture
def pool(tmp_path):
    """Sixty rows, one of them far too long, under two tokenizers."""
    for style in ("llama3", "chatml"):
        tiny_tokenizer(style).save_pretrained(tmp_path / style)
    rows = pair_rows(60)
    rows[7]["chosen"][0]["content"] = "fox " * 400
    write_jsonl(tmp_path / "rows.jsonl", rows)
    models = (str(tmp_path / "llama3"), str(tmp_path / "chatml"))
    return Pool(DataSource(str(tmp_path / "rows.jsonl")), models, rows=40, seed=858, max_length=200, percentile=2.5)


def read_parts(folder):
    return [read_jsonl(folder / f"{name}.jsonl") for name in PARTS]


def test_the_pool_is_filtered_and_drawn_once(tmp_path, pool):
    report = make_pool(pool, tmp_path / "data")
    rows = read_jsonl(tmp_path / "data" / "pool.jsonl")
    assert len(rows) == 40 and set(rows[0]) == {"prompt", "chosen", "rejected"}
    assert report["too_long"] == 1 and report["short_prompts"] >= 1 and report["rows_kept"] < 60
    assert all("fox fox fox" not in row["chosen"][0]["content"] for row in rows)
    before = (tmp_path / "data" / "pool.jsonl").stat().st_mtime_ns
    assert make_pool(pool, tmp_path / "data") == report
    assert (tmp_path / "data" / "pool.jsonl").stat().st_mtime_ns == before
    other = Pool(**{**vars(pool), "seed": 1})
    make_pool(other, tmp_path / "data")
    assert read_jsonl(tmp_path / "data" / "pool.jsonl") != rows


def test_seeds_permute_one_pool(tmp_path, pool):
    make_pool(pool, tmp_path / "data")
    parts = {seed: read_parts(split_pool(tmp_path / "data", seed, (20, 10, 10))) for seed in (0, 1)}
    everything = sorted(map(str, read_jsonl(tmp_path / "data" / "pool.jsonl")))
    for seed in parts:
        assert sorted(map(str, chain(*parts[seed]))) == everything
    assert parts[0][2] != parts[1][2]


def test_another_pool_is_split_again_and_the_same_one_is_not(tmp_path, pool):
    make_pool(pool, tmp_path / "data")
    place = split_pool(tmp_path / "data", 0, (20, 10, 10))
    before = (place / "train.jsonl").stat().st_mtime_ns
    split_pool(tmp_path / "data", 0, (20, 10, 10))
    assert (place / "train.jsonl").stat().st_mtime_ns == before
    split_pool(tmp_path / "data", 0, (10, 10, 10))
    assert len(read_jsonl(place / "train.jsonl")) == 10
    make_pool(Pool(**{**vars(pool), "seed": 1}), tmp_path / "data")
    split_pool(tmp_path / "data", 0, (10, 10, 10))
    assert read_json(place / "split.json")["pool"] == read_json(tmp_path / "data" / "pool.json")["settings"]
    drawn = list(map(str, read_jsonl(tmp_path / "data" / "pool.jsonl")))
    assert all(str(row) in drawn for part in read_parts(place) for row in part)


def test_rows_of_one_prompt_stay_together():
    prompts = [f"p{n // 3}" for n in range(60)]
    parts = split_rows(prompts, (30, 15, 15), seed=3)
    asked = [{prompts[row] for row in part} for part in parts]
    assert sorted(chain(*parts)) == list(range(60)) and [len(part) for part in parts] == [30, 15, 15]
    assert not (asked[0] & asked[1] or asked[0] & asked[2] or asked[1] & asked[2])


def test_with_one_row_a_prompt_the_parts_are_those_of_a_permutation_of_rows():
    order = np.random.default_rng(4).permutation(7000).tolist()
    parts = split_rows([str(n) for n in range(7000)], (5000, 1000, 1000), seed=4)
    assert parts == [order[:5000], order[5000:6000], order[6000:]]


def test_too_few_rows_are_refused(tmp_path, pool):
    with pytest.raises(ValueError, match=r"pool_rows is 60, but only \d+ of the 60 rows"):
        make_pool(Pool(**{**vars(pool), "rows": 60}), tmp_path / "data")
    assert not (tmp_path / "data").exists()
    with pytest.raises(ValueError, match="of a pool of 4"):
        split_rows(list("abcd"), (3, 1, 1), seed=0)
    with pytest.raises(ValueError, match="1 prompts are too few"):
        split_rows(["a"] * 4, (2, 1, 1), seed=0)
