"""Sources of every kind, mixtures in the three meanings of a fraction, and disjoint hold-outs."""

import gzip
import json

import datasets
import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prefopt.data import DataArguments, DataSource, hold_out, load_datasets, tokenize_pairs
from prefopt.files import write_jsonl
from tests.tiny import tiny_tokenizer

ROWS = [{"prompt": f"p{number}", "chosen": f"c{number}", "rejected": f"r{number}"} for number in range(10)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """A data cache of the test's own, no network, no progress bars."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


def messages(number):
    question = [{"role": "user", "content": f"p{number}"}]
    return [*question, {"role": "assistant", "content": "a"}], [*question, {"role": "assistant", "content": "b"}]


def load(path, **source):
    return load_datasets(DataArguments([DataSource(str(path), **source)]))[0]


def numbers(dataset):
    return [int(prompt[1:]) for prompt in dataset["prompt"]]


def write_csv(path, separator=","):
    path.write_text(
        "\n".join(separator.join(row) for row in [("prompt", "chosen", "rejected"), *(r.values() for r in ROWS)])
        + "\n"
    )


WRITERS = {
    "rows.jsonl": lambda path: write_jsonl(path, ROWS),
    "rows.jsonl.gz": lambda path: write_jsonl(path, ROWS),
    "rows.json": lambda path: path.write_text(json.dumps(ROWS)),
    "rows.json.gz": lambda path: path.write_bytes(gzip.compress(json.dumps(ROWS).encode())),
    "rows.parquet": lambda path: Dataset.from_list(ROWS).to_parquet(str(path)),
    "rows.csv": write_csv,
    "rows.tsv": lambda path: write_csv(path, "\t"),
    "rows.arrow": lambda path: _write_arrow(path),
    "saved": lambda path: Dataset.from_list(ROWS).save_to_disk(str(path)),
    "saved_splits": lambda path: DatasetDict(
        {"train": Dataset.from_list(ROWS), "test": Dataset.from_list(ROWS[:1])}
    ).save_to_disk(str(path)),
    "split_folders": lambda path: Dataset.from_list(ROWS).save_to_disk(str(path / "train")),
    "folder": lambda path: write_jsonl(path / "train.jsonl", ROWS),
    "folder_gz": lambda path: write_jsonl(path / "train.jsonl.gz", ROWS),
    "shards": lambda path: [
        write_jsonl(path / "data" / f"train-{k:05}-of-00002.jsonl", ROWS[5 * k : 5 * k + 5]) for k in range(2)
    ],
    "unnamed": lambda path: write_jsonl(path / "whatever.jsonl", ROWS),
}


def _write_arrow(path):
    from datasets.arrow_writer import ArrowWriter

    with ArrowWriter(path=str(path), features=Dataset.from_list(ROWS).features) as writer:
        for row in ROWS:
            writer.write(row)
        writer.finalize()


@pytest.mark.parametrize("name", WRITERS)
def test_local_sources(name, tmp_path):
    WRITERS[name](tmp_path / name)
    dataset = load(tmp_path / name)
    assert [{key: row[key] for key in ROWS[0]} for row in dataset] == ROWS
    assert "fault" not in dataset.column_names
    assert numbers(load(tmp_path / name, split="train[2:4]")) == [2, 3]


@pytest.mark.parametrize("name", ["folder", "saved_splits", "split_folders"])
def test_other_splits(name, tmp_path):
    if name == "folder":
        write_jsonl(tmp_path / "train_prefs.jsonl", ROWS)
        write_jsonl(tmp_path / "test_prefs.jsonl", ROWS[:2])
    elif name == "saved_splits":
        DatasetDict({"train_prefs": Dataset.from_list(ROWS), "test_prefs": Dataset.from_list(ROWS[:2])}).save_to_disk(
            str(tmp_path)
        )
    else:
        Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "train_prefs"))
        Dataset.from_list(ROWS[:2]).save_to_disk(str(tmp_path / "test_prefs"))
    args = DataArguments(
        [DataSource(str(tmp_path), split="train_prefs")], [DataSource(str(tmp_path), split="test_prefs")]
    )
    train, test = load_datasets(args)
    assert (len(train), len(test)) == (10, 2)
    with pytest.raises(ValueError, match=r"has no split 'train'; it has \['test_prefs', 'train_prefs'\]"):
        load(tmp_path)


def test_data_files_and_columns(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{**row, "note": 5, "margin": 1.5} for row in ROWS])
    assert numbers(load("json", data_files=str(tmp_path / "a.jsonl"))) == list(range(10))
    dataset = load(tmp_path / "a.jsonl", columns=["prompt", "chosen", "rejected"])
    assert "margin" not in dataset.column_names and "margin" in load(tmp_path / "a.jsonl").column_names


def test_csv_text_stays_text(tmp_path):
    """Cells that a CSV reader would take for missing values or numbers."""
    (tmp_path / "a.csv").write_text('prompt,chosen,rejected,margin\n42,None,NA,0.5\n7,"1,5",null,\n')
    assert [
        tuple(row[name] for name in ("prompt", "chosen", "rejected", "margin")) for row in load(tmp_path / "a.csv")
    ] == [
        ("42", "None", "NA", 0.5),
        ("7", "1,5", "null", None),
    ]


def test_strings_that_look_like_json_stay_strings(tmp_path):
    rows = [{"prompt": text, "chosen": "null", "rejected": "[1]"} for text in ("42", "null", '"x"', "{}")]
    write_jsonl(tmp_path / "a.jsonl", rows)
    assert [{key: row[key] for key in rows[0]} for row in load(tmp_path / "a.jsonl")] == rows


def test_messages_are_read_back_as_messages(tmp_path):
    chosen, rejected = messages(1)
    tools = [{"type": "function", "function": {"name": "f"}}]
    rows = [
        {"prompt": "p1", "chosen": chosen, "rejected": rejected, "tools": None},
        {
            "prompt": "p1",
            "chosen": [*chosen[:1], {**chosen[1], "name": "x"}],
            "rejected": rejected,
            "tools": json.dumps(tools),
        },
    ]
    write_jsonl(tmp_path / "a.jsonl", rows)
    first, second = load(tmp_path / "a.jsonl")
    assert first["prompt"] == [{"role": "user", "content": "p1"}] and first["chosen"] == [
        {"role": "assistant", "content": "a"}
    ]
    assert second["chosen"] == [{"role": "assistant", "content": "a", "name": "x"}]
    assert (first["tools"], second["tools"]) == (None, tools)


def test_faulty_rows_are_kept_for_the_count(tmp_path):
    write_jsonl(
        tmp_path / "a.jsonl",
        [*ROWS, {"prompt": "p", "chosen": None, "rejected": "x"}, {"prompt": "p", "chosen": "", "rejected": "x"}],
    )
    dataset = load(tmp_path / "a.jsonl")
    assert dataset["fault"][9:] == [None, "missing field", "empty completion"]
    _, report = tokenize_pairs(dataset, tiny_tokenizer(None), max_length=64)
    assert report.dropped == {"missing field": 1, "empty completion": 1} and report.rows_kept == 10


@pytest.fixture
def two(tmp_path):
    """Ten rows p0..p9 and five rows p100..p104."""
    write_jsonl(tmp_path / "ten.jsonl", ROWS)
    write_jsonl(tmp_path / "five.jsonl", [{**row, "prompt": f"p10{number}"} for number, row in enumerate(ROWS[:5])])
    return str(tmp_path / "ten.jsonl"), str(tmp_path / "five.jsonl")


def mixed(two, fractions, **options):
    sources = [DataSource(path, fraction=fraction) for path, fraction in zip(two, fractions)]
    return numbers(load_datasets(DataArguments(sources, **options))[0])


def test_head_takes_the_first_rows(two):
    assert mixed(two, (0.5, 1.0)) == [0, 1, 2, 3, 4, 100, 101, 102, 103, 104]
    assert mixed(two, (0.39, 0.2)) == [0, 1, 2, 100]  # 3.9 rows are 3, as the mixers of that time count
    assert mixed(two, (None, 0.2)) == [*range(10), 100]


def test_sample_is_seeded(two):
    drawn = mixed(two, (0.5, 1.0), mixing="sample", seed=7)
    assert drawn[5:] == [100, 101, 102, 103, 104] and len(drawn) == 10
    assert drawn == mixed(two, (0.5, 1.0), mixing="sample", seed=7)
    assert any(drawn != mixed(two, (0.5, 1.0), mixing="sample", seed=seed) for seed in range(5))
    # the rows that `shuffle(seed).select(...)` takes
    shuffled = Dataset.from_list(ROWS).shuffle(seed=7).select(range(5))
    assert set(drawn[:5]) == set(numbers(shuffled))


def test_share_never_oversamples(two):
    # equal shares: five of each; 0.8 and 0.2: ten is 0.8 of 12.5, so 10 and 2.5, rounded to even
    assert mixed(two, (0.5, 0.5), mixing="share") == [0, 1, 2, 3, 4, 100, 101, 102, 103, 104]
    assert mixed(two, (0.8, 0.2), mixing="share") == [*range(10), 100, 101]
    assert mixed(two, (None, None), mixing="share") == [*range(10), 100, 101, 102, 103, 104]


def test_share_is_trls(two):
    from trl import DatasetMixtureConfig, get_dataset

    for fractions in ((0.5, 0.5), (0.8, 0.2), (0.3, 0.9), (1.0, 0.1)):
        parts = [{"path": "json", "data_files": path, "fraction": part} for path, part in zip(two, fractions)]
        assert mixed(two, fractions, mixing="share") == numbers(get_dataset(DatasetMixtureConfig(parts))["train"])


def test_sources_of_different_shapes_mix(tmp_path):
    chosen, rejected = messages(1)
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": "p1", "chosen": chosen, "rejected": rejected, "margin": 0.5}])
    write_jsonl(tmp_path / "b.jsonl", [{"messages": messages(2)[0], "rejected_response": "b", "source": "x"}])
    dataset, _ = load_datasets(DataArguments([DataSource(str(tmp_path / name)) for name in ("a.jsonl", "b.jsonl")]))
    assert [row["prompt"][0]["content"] for row in dataset] == ["p1", "p2"]
    assert [row["rejected"][0]["content"] for row in dataset] == ["b", "b"]
    assert list(dataset["margin"]) == [0.5, None] and "source" not in dataset.column_names
    write_jsonl(tmp_path / "c.jsonl", ROWS)
    with pytest.raises(
        ValueError, match=r"do not mix: their 'prompt' columns have different types, string and messages"
    ):
        load_datasets(DataArguments([DataSource(str(tmp_path / name)) for name in ("a.jsonl", "c.jsonl")]))


def test_other_kinds(tmp_path):
    write_jsonl(
        tmp_path / "c.jsonl",
        [
            {"prompt": "p1", "responses": ["a", "b"], "scores": [1, 0]},
            {"prompt": "p2", "responses": ["a"], "scores": [1]},
        ],
    )
    write_jsonl(tmp_path / "s.jsonl", [{"text": ["p3<sep>a", "p3<sep>b"], "scores": [1.0, 0.0], "type": "apo"}])
    args = DataArguments([DataSource(str(tmp_path / name)) for name in ("c.jsonl", "s.jsonl")])
    dataset, _ = load_datasets(args, "comparisons")
    assert list(dataset["is_adversarial"]) == [False, None, True]
    assert list(dataset["fault"]) == [None, "fewer than two responses", None]
    prompts, _ = load_datasets(DataArguments([DataSource(str(tmp_path / "c.jsonl"))]), "prompts")
    assert list(prompts["prompt"]) == ["p1", "p2"] and prompts["scores"][0] == [1, 0]
    raw, _ = load_datasets(DataArguments([DataSource(str(tmp_path / "s.jsonl"))]), "any")
    assert raw.column_names == ["text", "scores", "type"]


def test_a_held_out_part_shares_no_prompt(tmp_path):
    rows = [
        {**row, "prompt": f"p{place // 3}"} for place, row in enumerate(ROWS)
    ]  # 3 + 3 + 3 + 1 rows of four prompts
    write_jsonl(tmp_path / "a.jsonl", rows)
    args = DataArguments([DataSource(str(tmp_path / "a.jsonl"))], test_split_size=0.3)
    train, test = load_datasets(args)
    assert len(train) + len(test) == 10 and not set(train["prompt"]) & set(test["prompt"])
    assert 3 <= len(test) <= 5
    again = load_datasets(args)[1]
    assert again.to_list() == test.to_list()
    with pytest.raises(
        ValueError, match="Cannot hold out 10 of 10 rows with 4 different prompts: no row would be left"
    ):
        load_datasets(DataArguments([DataSource(str(tmp_path / "a.jsonl"))], test_split_size=10))


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(st.integers(0, 9), min_size=2, max_size=20).filter(lambda p: len(set(p)) > 1),
    st.integers(0, 99),
    st.data(),
)
def test_hold_outs_are_disjoint_whole_and_independent_of_order(prompts, seed, data):
    rows = [{"prompt": str(prompt), "place": place} for place, prompt in enumerate(prompts)]
    size = data.draw(st.integers(1, len(rows) - max(prompts.count(p) for p in prompts)))
    kept, held = hold_out(Dataset.from_list(rows), size, seed=seed)
    assert sorted([*kept["place"], *held["place"]]) == list(range(len(rows)))
    assert not set(kept["prompt"]) & set(held["prompt"])
    assert len(held) >= size
    shuffled = [rows[place] for place in np.random.default_rng(seed).permutation(len(rows))]
    assert set(hold_out(Dataset.from_list(shuffled), size, seed=seed)[1]["place"]) == set(held["place"])


def test_hold_outs_follow_the_seed():
    dataset = Dataset.from_list(ROWS)
    assert len({tuple(hold_out(dataset, 3, seed=seed)[1]["prompt"]) for seed in range(5)}) > 1


def test_strings_among_messages_are_counted(tmp_path):
    chosen, rejected = messages(1)
    write_jsonl(
        tmp_path / "a.jsonl", [{"chosen": chosen, "rejected": rejected}, {"chosen": "x yes", "rejected": "x no"}]
    )
    dataset = load(tmp_path / "a.jsonl")
    assert list(dataset["fault"]) == [None, "wrong type"]
    assert dataset["fault_detail"][1] == "`prompt` is a string, unlike the rows before"


def test_tokenised_sources(tmp_path):
    dataset, _ = tokenize_pairs(Dataset.from_list(ROWS), tiny_tokenizer(None), max_length=64)
    dataset.save_to_disk(str(tmp_path / "ids"))
    loaded = load(tmp_path / "ids")
    assert loaded.to_list() == dataset.to_list()
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(ValueError, match="do not mix: one of them is tokenised already"):
        load_datasets(DataArguments([DataSource(str(tmp_path / "a.jsonl")), DataSource(str(tmp_path / "ids"))]))
    train, test = load_datasets(DataArguments([DataSource(str(tmp_path / "ids"))], test_split_size=3))
    assert (len(train), len(test)) == (7, 3)


def test_mistakes_in_sources(tmp_path):
    write_jsonl(tmp_path / "good.jsonl", ROWS)
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a"\n{"x"')
    (tmp_path / "rows.xml").write_text("<a/>")
    (tmp_path / "nothing").mkdir()
    Dataset.from_list(ROWS).select([]).save_to_disk(str(tmp_path / "norows"))
    cases = [
        ({"path": str(tmp_path / "absent.jsonl")}, "absent.jsonl': no such file or folder"),
        ({"path": "./absent"}, "'./absent': no such file or folder"),
        ({"path": "absent.parquet"}, "'absent.parquet': no such file or folder"),
        ({"path": "nobody/nothing-of-this-name"}, "'nobody/nothing-of-this-name' .*hub"),
        ({"path": str(tmp_path / "empty.jsonl")}, "empty.jsonl is empty"),
        ({"path": str(tmp_path / "broken.jsonl")}, "broken.jsonl' could not be read: "),
        (
            {"path": str(tmp_path / "rows.xml")},
            "unknown kind of file; known are .jsonl, .json, .parquet, .csv, .tsv, .arrow",
        ),
        ({"path": str(tmp_path / "nothing")}, "the folder holds no json"),
        ({"path": str(tmp_path / "norows")}, r"norows' \(split 'train'\) has no rows"),
        (
            {"path": str(tmp_path / "good.jsonl"), "split": "test"},
            r"good.jsonl' has no split 'test'; it has \['train'\]",
        ),
        ({"path": str(tmp_path / "norows"), "split": "dev"}, r"norows' has no split 'dev'; it has \['train'\]"),
        (
            {"path": str(tmp_path), "split": "dev"},
            r"has no split 'dev'; it has \['broken', 'empty', 'good', 'norows'\]",
        ),
        (
            {"path": str(tmp_path / "good.jsonl"), "columns": ["prompt", "answer"]},
            r"has no column 'answer'; it has \['chosen'",
        ),
        (
            {"path": str(tmp_path / "good.jsonl"), "columns": ["prompt"]},
            r"has the columns \['prompt'\]\. Rows of pairs need one of",
        ),
        ({"path": str(tmp_path / "good.jsonl"), "fraction": 0.05}, "fraction 0.05 of 10 rows leaves none"),
    ]
    for source, message in cases:
        with pytest.raises(ValueError, match=message) as caught:
            load_datasets(DataArguments([DataSource(**source)]))
        assert len(str(caught.value).splitlines()) == 1, source


def test_mistakes_in_arguments():
    source = DataSource("x")
    for fraction in (0, -0.5, 1.01, 2):
        with pytest.raises(ValueError, match=rf"Dataset 'x': fraction {fraction} is outside \(0, 1\]"):
            DataSource("x", fraction=fraction)
    cases = [
        (lambda: DataSource(""), "A dataset needs a path"),
        (lambda: DataSource("x", split=None), "split must be a name"),
        (lambda: DataArguments([]), "No training data"),
        (lambda: DataArguments([source], mixing="blend"), "mixing must be one of head, sample, share, not 'blend'"),
        (lambda: DataArguments([source], [source], test_split_size=0.1), "Both a test dataset and test_split_size"),
        (
            lambda: DataArguments([source], [DataSource("y", fraction=0.5)]),
            "Test dataset 'y': test sets are used whole",
        ),
        (
            lambda: DataArguments([source, DataSource("y", fraction=0.5)], mixing="share"),
            "for every dataset of the mixture, or for none",
        ),
        *(
            (lambda size=size: DataArguments([source], test_split_size=size), f"not {size!r}")
            for size in (0, 1.0, 1.5, -1, True)
        ),
    ]
    for make, message in cases:
        with pytest.raises(ValueError, match=message):
            make()


def test_sources_from_mappings():
    args = DataArguments([{"path": "x", "fraction": 0.5}], test_split_size=7)
    assert args.train == [DataSource("x", fraction=0.5)]
