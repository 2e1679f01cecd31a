"""Rows of files in pieces: every way of reading gives the same rows, and every way of writing the same files."""

import gzip
import json
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, Json, List, Value

from prefopt.candidates import tables
from prefopt.candidates.build_pairs import BuildPairsArguments
from prefopt.candidates.build_pairs import run as build_pairs
from prefopt.candidates.convert import ConvertArguments
from prefopt.candidates.convert import run as convert
from prefopt.candidates.formats import pairs_to_records
from prefopt.candidates.records import Records, make_candidate, make_record, read_records, write_records
from prefopt.candidates.tables import Again, infer_features, open_rows, pieces, write_parquet
from prefopt.data.sources import DataSource
from prefopt.files import read_jsonl, write_json, write_jsonl

ROWS = [{"n": n, "text": f"Köln {n}\u2028", "list": [n] * (n % 3)} for n in range(25)]


def saved(path):
    """ROWS in a file of any kind; parquet in row groups of 7 rows."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=7)
    elif path.suffix == ".csv":
        Dataset.from_list([{"n": row["n"], "text": row["text"]} for row in ROWS]).to_csv(str(path))
    elif path.suffix == ".json":
        write_json(path, ROWS)
    else:
        write_jsonl(path, ROWS)
    return open_rows(DataSource(str(path)))


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.parquet", "x.json"])
def test_rows_and_slices_of_any_file_are_those_of_the_list(tmp_path, name, monkeypatch):
    monkeypatch.setattr(tables, "CHUNK", 4)
    rows = saved(tmp_path / name)
    assert len(rows) == 25 and list(rows) == list(rows) == ROWS
    for start, stop in ((0, 25), (3, 5), (6, 8), (20, 99), (24, 25), (0, 0), (2, 17), (5, 6)):
        assert rows[start:stop] == ROWS[start:stop]
    assert [rows[n] for n in (24, 0, 13)] == [ROWS[n] for n in (24, 0, 13)]


def test_blank_lines_and_splits_are_read_as_before(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('\n{"a": 1}\n\n  \n{"a": 2}\n')
    assert list(open_rows(DataSource(str(path)))) == [{"a": 1}, {"a": 2}] == open_rows(DataSource(str(path)))[0:2]
    assert list(open_rows(DataSource(str(path), split="train[1:]"))) == [{"a": 2}]
    with pytest.raises(ValueError, match="has no split 'test'"):
        open_rows(DataSource(str(path), split="test"))
    path.write_text("\n")
    with pytest.raises(ValueError):
        open_rows(DataSource(str(path)))
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match=r"bad\.parquet"):
        open_rows(DataSource(str(tmp_path / "bad.parquet")))


def test_columns_of_json_are_decoded(tmp_path):
    features = Features({"tools": Json(), "ids": List(Value("int32"))})
    rows = [{"tools": [{"name": f"f{n}", "arguments": {str(n): n}}], "ids": [n]} for n in range(9)]
    write_parquet(tmp_path / "x.parquet", rows, features)
    assert list(open_rows(DataSource(str(tmp_path / "x.parquet")))) == rows
    assert Dataset.from_parquet(str(tmp_path / "x.parquet"), cache_dir=str(tmp_path)).features == features


def test_types_are_inferred_from_all_rows(monkeypatch):
    monkeypatch.setattr(tables, "pieces", lambda rows: pieces(rows, 2))
    rows = [{"a": None, "b": 1, "c": []}, {"a": None, "b": 2, "c": []}, {"a": "x", "b": 0.5, "c": ["y"]}, {"a": None}]
    expected = {"a": Value("string"), "b": Value("float64"), "c": List(Value("string"))}
    assert infer_features(Again(lambda: rows), ["a", "b", "c"]) == Features(expected)
    with pytest.raises(ValueError, match="different types"):
        infer_features([{"a": 1}, {"a": 1}, {"a": "x"}], ["a"])


def record(n, **more):
    candidates = [make_candidate(f"answer {n} {k}", source="m", k=k, scores={"rm": k - n / 10}) for k in range(3)]
    return make_record(f"p{n}", f"prompt {n}", candidates, **more)


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.parquet"])
def test_records_are_checked_once_and_read_again_and_again(tmp_path, name):
    expected = [record(n) for n in range(30)]
    write_records(tmp_path / name, Again(lambda: map(record, range(30))))
    found = Records(tmp_path / name)
    assert len(found) == 30 and list(found) == expected == found[0:30] == read_records(tmp_path / name)
    assert found[7:9] == expected[7:9] and found[29] == expected[29]
    assert found.score_names == {"rm": "p0"}
    opener = gzip.open if name.endswith(".gz") else open
    if not name.endswith(".parquet"):
        with opener(tmp_path / name, "at", encoding="utf-8") as file:
            file.write(json.dumps(record(3)) + "\n")
        with pytest.raises(ValueError, match="row 30: a second record of the prompt_id 'p3'"):
            Records(tmp_path / name)


def test_pairs_of_one_prompt_share_a_record_wherever_they_stand():
    pairs = [{"prompt": p, "chosen": f"c{n}", "rejected": f"r{n}"} for n, p in enumerate("abacb")]
    found = list(pairs_to_records(pairs))
    assert [(each["prompt"], [c["text"] for c in each["candidates"]]) for each in found] == [
        ("a", ["c0", "r0", "c2", "r2"]),
        ("b", ["c1", "r1", "c4", "r4"]),
        ("c", ["c3", "r3"]),
    ]
    assert [c["k"] for c in found[0]["candidates"]] == [0, 0, 1, 1]


def test_an_array_is_written_as_json_writes_it(tmp_path):
    write_records(tmp_path / "in.jsonl", [record(n) for n in range(4)])
    settings = {"from_format": "records", "to_format": "apo_samples"}
    convert(ConvertArguments(str(tmp_path / "in.jsonl"), str(tmp_path / "out.json"), **settings))
    convert(ConvertArguments(str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), **settings))
    write_json(tmp_path / "whole.json", read_jsonl(tmp_path / "out.jsonl"))
    assert (tmp_path / "out.json").read_bytes() == (tmp_path / "whole.json").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_memory_does_not_grow_with_the_file(tmp_path, form):
    """Eight times the records need less than twice the memory of Python (records in memory would need eight times)."""
    peaks = []
    for number in (1000, 8000):
        source = tmp_path / f"{number}.{form}"
        write_records(source, Again(lambda n=number: map(record, range(n))))
        tracemalloc.start()
        build_pairs(BuildPairsArguments(str(source), str(tmp_path / f"{number}_{form}"), plots=False))
        convert(ConvertArguments(str(source), str(tmp_path / f"{number}_{form}.jsonl"), "records", "apo_comparisons"))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 2 * peaks[0], peaks
