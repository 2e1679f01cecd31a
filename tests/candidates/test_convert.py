"""Formats of other projects, in and out."""

import json
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, load_dataset

import prefopt.candidates.convert as convert_module
from prefopt.candidates.convert import FORMATS, ConvertArguments, run
from prefopt.candidates.formats import clean_response, from_dialogue, to_dialogue
from prefopt.candidates.generate import GenerateArguments
from prefopt.candidates.records import make_candidate, make_record, read_records, write_records
from prefopt.candidates.split import SplitArguments
from prefopt.candidates.split import run as split
from prefopt.data.loading import DataArguments, load_datasets
from prefopt.data.sources import DataSource, load_source
from prefopt.files import read_jsonl, write_json, write_jsonl

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def convert(tmp_path, rows, from_format, to_format, *, ending=".jsonl", **settings):
    source = tmp_path / "input.jsonl"
    write_jsonl(source, rows)
    output = tmp_path / f"output{ending}"
    run(ConvertArguments(str(source), str(output), from_format, to_format, **settings))
    return read_jsonl(output) if ending == ".jsonl" else output


def talk(prompt, answer):
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def generated_rows(num_scores=3):
    """Three responses with the scores 0.5, -1 and 2; further scores stand before them."""
    scores = [9.0] * (num_scores - 3) + [0.5, -1.0, 2.0]
    return [
        {
            "prompt": "Is None null?",
            "prompt_id": "a",
            **{f"generate_{k}": talk("Is None null?", f"answer {k} 你") for k in range(3)},
            "probability": [[0.5] * 3] * 3,
            "rm_scores": scores,
        }
    ]


def test_sppo_generated_columns_become_records_and_come_back(tmp_path, capsys):
    records = convert(tmp_path, generated_rows(5), "sppo_generated", "records")
    assert [(c["text"], c["scores"]) for c in records[0]["candidates"]] == [
        ("answer 0 你", {"rm_scores": 0.5}),
        ("answer 1 你", {"rm_scores": -1.0}),
        ("answer 2 你", {"rm_scores": 2.0}),
    ]
    assert records[0]["prompt"] == "Is None null?"
    assert "1 rows with rm_scores of responses that they do not hold" in capsys.readouterr().out
    (back,) = convert(tmp_path, records, "records", "sppo_generated")
    assert back["generate_2"] == talk("Is None null?", "answer 2 你")
    assert back["rm_scores"] == [0.5, -1.0, 2.0]
    for i, si in enumerate(back["rm_scores"]):
        for j, sj in enumerate(back["rm_scores"]):
            assert back["probability"][i][j] == pytest.approx(1 / (1 + np.exp(sj - si)), abs=1e-12)


def test_the_folder_that_a_command_wrote_is_an_input_of_every_tool(tmp_path):
    folder = tmp_path / "ranked"
    rows = [
        make_record(f"p{n}", f"q{n}", [make_candidate(t, source="m", scores={"rm": 1 / 3}) for t in "xy"])
        for n in range(20)
    ]
    write_records(folder / "candidates.parquet", rows)
    write_json(folder / "report.json", {"counts": {}})
    write_jsonl(folder / "rank_shards" / "00000.jsonl", [{"prompt_id": "p0", "values": [1.0]}])
    run(ConvertArguments(str(folder), str(tmp_path / "out.jsonl"), "records", "sppo_generated"))
    assert [row["rm_scores"] for row in read_jsonl(tmp_path / "out.jsonl")] == [[1 / 3, 1 / 3]] * 20
    split(SplitArguments(str(folder), str(tmp_path / "split"), reward_model=0, policy=0.5, test=0.5))
    assert [len(read_jsonl(tmp_path / "split" / f"{name}.jsonl")) for name in ("policy", "test")] == [10, 10]
    assert load_source(GenerateArguments("m", str(folder), "o").source)["prompt"] == [row["prompt"] for row in rows]


def test_a_prompt_that_comes_again_is_a_record_of_its_own(tmp_path):
    first = generated_rows()[0]
    again = {**first, "generate_0": talk("Is None null?", "another answer")}
    convert(tmp_path, [first, again, again], "sppo_generated", "records")
    records = read_records(tmp_path / "output.jsonl")
    assert [record["candidates"][0]["text"] for record in records] == ["answer 0 你", *["another answer"] * 2]


def test_a_pairwise_table_is_aggregated_as_published(tmp_path):
    """c = [[0, 1], [-3, 0]]: s_0 = (1 - -3) / 2 = 2, s_1 = (-3 - 1) / 2 = -2, P_01 = 1 / (1 + e^-4)."""
    record = make_record("a", "q", [make_candidate(t, source="m") for t in "xy"])
    record["tables"] = {"pairrm": [[0.0, 1.0], [-3.0, 0.0]]}
    (row,) = convert(tmp_path, [record], "records", "sppo_generated")
    assert row["rm_scores"] == [2.0, -2.0]
    assert row["probability"][0][1] == pytest.approx(1 / (1 + np.exp(-4)))


def test_sppo_tables_need_one_number_of_candidates_and_one_kind_of_scores(tmp_path):
    first = make_record("a", "q", [make_candidate(t, source="m", scores={"x": 1.0, "y": 2.0}) for t in "xy"])
    second = make_record("b", "r", [make_candidate("x", source="m")])
    with pytest.raises(ValueError, match=r"records have \[1, 2\] candidates"):
        convert(tmp_path, [first, second], "records", "sppo_generated")
    with pytest.raises(ValueError, match=r"several kinds of scores, \['x', 'y'\]; choose one with `score`"):
        convert(tmp_path, [first], "records", "sppo_generated")
    assert convert(tmp_path, [first], "records", "sppo_generated", score="y")[0]["rm_scores"] == [2.0, 2.0]
    with pytest.raises(ValueError, match="3 responses but 2 rm_scores"):
        convert(tmp_path, [{**generated_rows()[0], "rm_scores": [1.0, 2.0]}], "sppo_generated", "records")
    with pytest.raises(ValueError, match="generate_0, generate_1"):
        convert(tmp_path, [{"prompt": "q", "generate_1": "x"}], "sppo_generated", "records")


def test_sppo_pairs_come_in_and_go_out(tmp_path):
    probabilities = {"chosen_probs": 0.9, "chosen_probs_win": 0.8, "chosen_probs_lose": 0.3}
    row = {"chosen": talk("q", "good"), "rejected": talk("q", "bad"), **probabilities}
    (pair,) = convert(tmp_path, [row], "sppo", "pairs")
    assert pair["prompt"] == [{"role": "user", "content": "q"}]
    assert pair["chosen"] == [{"role": "assistant", "content": "good"}]
    assert (pair["chosen_over_rejected_prob"], pair["chosen_win_prob"], pair["rejected_win_prob"]) == (0.9, 0.8, 0.3)
    (back,) = convert(tmp_path, [pair], "pairs", "sppo")
    assert back == {"prompt": "q", **row}
    with pytest.raises(ValueError, match="Pair 0 has no chosen_over_rejected_prob"):
        convert(tmp_path, [{"prompt": "q", "chosen": "a", "rejected": "b"}], "pairs", "sppo")


QUERY = "\n\nHuman: Hi\n\nAssistant:"
GOLDEN = [
    {"query_id": 1, "golden": " Best."},
    {"query_id": "2", "golden": " Fine.\n\nHuman: more?\n\nAssistant: yes"},
    {"query_id": "3", "golden": " unused"},
]
SAMPLES = [
    {"query_id": "1", "query": QUERY, "sample_0": " a\nHumans are odd", "sample_1": " b\nHuman: c", "sample_2": "  "},
    {"query_id": "2", "instruction": QUERY, "sample_0": "Fine. ", "sample_1": " x<sep>y", "sample_2": " d 你"},
    {"query_id": "4", "query": QUERY, "sample_0": " e", "sample_1": None, "sample_2": " f"},
]


def apo_pairs(tmp_path, samples=SAMPLES, **settings):
    golden = tmp_path / "golden.jsonl"
    write_jsonl(golden, [{**row, "query_id": str(row["query_id"])} for row in GOLDEN])
    rows = [{**row, "query_id": str(row["query_id"])} for row in samples]
    return convert(tmp_path, rows, "apo_samples", "apo_pairs", golden=str(golden), **settings)


def test_golden_answers_and_samples_become_adversarial_pairs(tmp_path, capsys):
    pairs = apo_pairs(tmp_path)
    common = {"scores": [1.0, 0.0], "type": "apo"}
    assert pairs == [
        {"text": [QUERY + "<sep> Best.", QUERY + "<sep> a\nHumans are odd"], "query_id": "1", **common},
        {"text": [QUERY + "<sep> Best.", QUERY + "<sep>b"], "query_id": "1", **common},
        {"text": [QUERY + "<sep>Fine.", QUERY + "<sep> d 你"], "query_id": "2", **common},
    ]
    told = capsys.readouterr().out
    for line in (
        "1 queries dropped: no golden answer",
        "1 golden answers without samples",
        "1 pairs dropped: empty answer",
        "1 pairs dropped: the sample is the golden answer",
        "1 pairs dropped: a text holds <sep>",
    ):
        assert line in told


def test_missing_samples_are_counted_and_any_number_is_read(tmp_path, capsys):
    samples = [SAMPLES[0], {"query_id": "2", "query": QUERY, "sample_0": "g", "sample_7": "h"}]
    records = convert(tmp_path, samples, "apo_samples", "records")
    assert [len(record["candidates"]) for record in records] == [3, 2]
    assert [c["k"] for c in records[1]["candidates"]] == [0, 7]
    assert "1 samples missing" in capsys.readouterr().out


def test_one_sample_a_query_is_drawn_by_seed(tmp_path):
    samples = [
        {"query_id": "1", "query": f"\n\nHuman: {n}\n\nAssistant:", **{f"sample_{k}": f"s{k}" for k in range(4)}}
        for n in range(40)
    ]
    samples = [{**row, "query_id": str(n)} for n, row in enumerate(samples)]
    golden = tmp_path / "golden.json"
    write_json(golden, [{"query_id": str(n), "golden": "best"} for n in range(40)])
    first, again, other = (
        convert(tmp_path, samples, "apo_samples", "apo_pairs", golden=str(golden), one_sample=True, seed=seed)
        for seed in (1, 1, 2)
    )
    assert len(first) == 40
    assert first == again != other
    assert len({row["text"][1][-2:] for row in first}) == 4


def test_further_human_turns_are_cut_and_words_that_begin_alike_are_not():
    assert clean_response("d\nHumans are") == "d\nHumans are"
    assert clean_response(" d\n\nHuman: and?\n\nAssistant: e") == "d"
    assert clean_response(" d \nHuman : x") == "d"
    assert clean_response(" untouched ") == " untouched "


def test_comparisons_are_read_by_the_reward_models_loader(tmp_path):
    folder = apo_pairs(tmp_path, ending=".json")
    rows, _ = load_datasets(DataArguments([DataSource(str(folder))]), "comparisons")
    assert len(rows) == 3
    assert set(rows["is_adversarial"]) == {True}
    assert json.loads(folder.read_text())[0]["scores"] == [1.0, 0.0]


def test_comparisons_of_any_size_come_in_and_go_out(tmp_path):
    rows = [
        {"text": [f"{QUERY}<sep> {t}" for t in "abc"], "scores": [0.1, 0.9, 0.5], "query_id": "1"},
        {"text": [f"{QUERY}<sep> only"], "scores": [-1], "query_id": "2"},
    ]
    records = convert(tmp_path, rows, "apo_comparisons", "records")
    assert [c["scores"]["score"] for c in records[0]["candidates"]] == [0.1, 0.9, 0.5]
    back = convert(tmp_path, records, "records", "apo_comparisons")
    assert [(row["text"], row["scores"]) for row in back] == [(row["text"], row["scores"]) for row in rows]
    for bad, reason in (
        ({"text": ["q a"], "scores": [1]}, "exactly one '<sep>'"),
        ({"text": ["q<sep>a", "r<sep>b"], "scores": [1, 0]}, "2 different queries"),
        ({"text": ["q<sep>a"], "scores": [1, 0]}, "lists of one length"),
    ):
        with pytest.raises(ValueError, match=reason):
            convert(tmp_path, [bad], "apo_comparisons", "records")
    with pytest.raises(ValueError, match="no scores; run `prefopt rank`"):
        convert(tmp_path, [make_record("a", QUERY, [make_candidate("x", source="m")])], "records", "apo_comparisons")


def test_samples_with_conflicts_or_without_queries_are_refused(tmp_path):
    twice = [{"query_id": "1", "query": QUERY, "sample_0": text} for text in "ab"]
    with pytest.raises(ValueError, match="'1' comes a second time"):
        convert(tmp_path, twice, "apo_samples", "records")
    with pytest.raises(ValueError, match="`query_id` and `query` are needed"):
        convert(tmp_path, [{"query_id": "1", "sample_0": "x"}], "apo_samples", "records")
    write_jsonl(tmp_path / "g.jsonl", [{"query_id": "1", "golden": "x"}, {"query_id": "1", "golden": "y"}])
    with pytest.raises(ValueError, match="second, different answer"):
        convert(tmp_path, SAMPLES[:1], "apo_samples", "apo_pairs", golden=str(tmp_path / "g.jsonl"))
    with pytest.raises(ValueError, match="no golden answer"):
        convert(tmp_path, SAMPLES[:1], "apo_samples", "apo_pairs")


def test_ultrafeedback_in_and_out(tmp_path):
    row = {
        "prompt": "q",
        "prompt_id": "p",
        "chosen": talk("q", "good"),
        "rejected": talk("q", "bad"),
        "messages": talk("q", "good"),
        "score_chosen": 8.5,
        "score_rejected": 4.0,
    }
    (pair,) = convert(tmp_path, [row], "ultrafeedback", "pairs")
    assert (pair["chosen_score"], pair["rejected_score"]) == (8.5, 4.0)
    (back,) = convert(tmp_path, [pair], "pairs", "ultrafeedback")
    assert back == row
    (record,) = convert(tmp_path, [row], "ultrafeedback", "records")
    assert [(c["source"], c["text"]) for c in record["candidates"]] == [
        ("dataset[chosen]", "good"),
        ("dataset[rejected]", "bad"),
    ]


def test_ultrafeedback_completions_in_and_out(tmp_path):
    completions = [{"model": m, "response": f"by {m}", "overall_score": s} for m, s in (("a", 7.5), ("b", 3.0))]
    row = {"instruction": "q", "models": ["a", "b"], "completions": completions}
    records = convert(tmp_path, [row, row], "ultrafeedback_completions", "records")
    assert len(records) == 1
    assert records[0]["candidates"][0]["scores"] == {"overall_score": 7.5}
    assert convert(tmp_path, records, "records", "ultrafeedback_completions") == [row]


def test_hh_dialogues_in_and_out(tmp_path):
    begin = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Why?\n\nHumans wonder.\n\nAssistant:"
    row = {"chosen": begin + " Because.", "rejected": begin + " Because not."}
    (pair,) = convert(tmp_path, [row], "hh", "pairs")
    assert (pair["prompt"], pair["chosen"], pair["rejected"]) == (begin, " Because.", " Because not.")
    assert convert(tmp_path, [pair], "pairs", "hh") == [row]
    (pair,) = convert(tmp_path, [row], "hh", "pairs", as_messages=True)
    assert pair["prompt"] == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Why?\n\nHumans wonder."},
    ]
    assert pair["rejected"] == [{"role": "assistant", "content": "Because not."}]
    assert convert(tmp_path, [pair], "pairs", "hh") == [row]


def test_dialogues_refuse_what_they_cannot_hold():
    with pytest.raises(ValueError, match="Not a dialogue"):
        from_dialogue("Hi there")
    with pytest.raises(ValueError, match="role 'tool'"):
        to_dialogue([{"role": "tool", "content": "x"}])
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert from_dialogue(to_dialogue(turns)) == turns


def test_bad_rows_are_counted(tmp_path, capsys):
    rows = [{"prompt": "q", "chosen": "a", "rejected": "b"}, {"prompt": "q", "chosen": "a", "rejected": "a"}]
    assert len(convert(tmp_path, rows, "pairs", "ultrafeedback")) == 1
    assert "1 rows dropped: identical completions" in capsys.readouterr().out
    with pytest.raises(ValueError, match="none of 1 rows is left to write"):
        convert(tmp_path, rows[1:], "pairs", "ultrafeedback")


@pytest.mark.parametrize("score", [None, "high", True, float("nan"), float("-inf"), 10**400, [1.0]])
@pytest.mark.parametrize("form", ["sppo_generated", "apo_comparisons", "ultrafeedback_completions", "responses"])
def test_a_score_that_is_no_number_is_one_line_that_names_the_row(tmp_path, form, score, monkeypatch):
    good = {
        "sppo_generated": generated_rows()[0],
        "apo_comparisons": {"text": [f"{QUERY}<sep>a", f"{QUERY}<sep>b"], "scores": [1.0, 0.5]},
        "ultrafeedback_completions": {"instruction": "q", "completions": [{"response": "a", "scores": {"rm": 1.0}}]},
        "responses": {"prompt": "q", "answers": [{"text": "a", "scores": {"rm": 1.0}}]},
    }[form]
    bad = json.loads(json.dumps(good).replace('"q"', '"r"'))
    if form == "sppo_generated":
        bad["rm_scores"][1] = score
    elif form == "apo_comparisons":
        bad["scores"][1] = score
    else:
        bad["completions" if "completions" in bad else "answers"][0]["scores"] = score if score is not None else [None]
    monkeypatch.setattr(convert_module, "open_rows", lambda source: [good, bad])
    settings = {"columns": ["answers"]} if form == "responses" else {}
    with pytest.raises(ValueError, match=r"Row 1.*(number|mapping)"):
        convert(tmp_path, [good], form, "records", **settings)
    assert not (tmp_path / "output.jsonl").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("ending", [".jsonl", ".json", ".parquet"])
def test_nothing_that_is_not_finite_is_written(tmp_path, value, ending):
    records = [make_record(f"p{n}", "q", [make_candidate("a", source="m")], extra=[1.0, 2.0]) for n in range(2)]
    records[1]["extra"][1] = value
    with pytest.raises(ValueError, match=r"Row 1 to write: `extra` holds (nan|inf), not a finite number"):
        convert(tmp_path, records, "records", "records", ending=ending)
    assert not (tmp_path / f"output{ending}").exists()


def test_hh_rows_that_are_messages_already_stay_messages(tmp_path):
    row = {"chosen": talk("Colour?", "Blue."), "rejected": talk("Colour?", " Red. ")}
    (pair,) = convert(tmp_path, [row], "hh", "pairs", as_messages=True)
    assert pair["prompt"] == [{"role": "user", "content": "Colour?"}]
    assert (pair["chosen"], pair["rejected"]) == (row["chosen"][1:], row["rejected"][1:])


def test_a_dialogue_without_text_is_one_line(tmp_path):
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}
    row = {"prompt": [{"role": "user", "content": "q"}], "chosen": [call], "rejected": talk("q", "b")[1:]}
    with pytest.raises(ValueError, match="which has no text"):
        convert(tmp_path, [row], "pairs", "hh")


@pytest.mark.parametrize("ending", [".parquet", ".json", ".jsonl"])
def test_every_kind_of_file_is_read_by_datasets(tmp_path, ending):
    output = tmp_path / f"output{ending}"
    convert(tmp_path, generated_rows(), "sppo_generated", "sppo_generated", ending=ending)
    reader = "parquet" if ending == ".parquet" else "json"
    rows = load_dataset(reader, data_files=str(output), split="train", cache_dir=str(tmp_path / "cache"))
    assert isinstance(rows, Dataset)
    assert rows[0]["generate_1"] == talk("Is None null?", "answer 1 你")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"input": ""}, "input is missing"),
        ({"from_format": "csv"}, "from_format must be one of"),
        ({"to_format": "responses"}, "to_format must be one of"),
        ({"output": "x.txt"}, "output must end in one of"),
        ({"to_format": "sppo"}, "`prefopt build-pairs`"),
        ({"golden": "g"}, "golden is only read with from_format apo_samples"),
        ({"as_messages": True}, "as_messages is only read with from_format hh"),
        ({"one_sample": True}, "one_sample is only read with to_format apo_pairs"),
        ({"columns": ["x"]}, "columns is only read with from_format responses"),
    ],
)
def test_mistakes_are_told(changes, reason):
    settings = {"input": "i", "output": "o.jsonl", "from_format": "records", "to_format": "sppo_generated", **changes}
    with pytest.raises(ValueError, match=reason):
        ConvertArguments(**settings)


def test_each_format_that_is_written_can_be_read_unless_said():
    assert [name for name, form in FORMATS.items() if form.write and not form.read] == ["apo_pairs"]
    assert [name for name, form in FORMATS.items() if form.read and not form.write] == ["responses"]


@pytest.mark.skipif(not SHARED.exists(), reason="the real data are not here")
def test_real_candidates_and_dialogues(tmp_path):
    source = SHARED / "alpaca_candidates.jsonl.gz"
    output = tmp_path / "records.parquet"
    run(ConvertArguments(str(source), str(output), "responses", "records", columns=["candidates", "baseline"]))
    records = read_records(output)
    assert len(records) == 603
    assert {len(record["candidates"]) for record in records} == {16}
    original = read_jsonl(source)[17]
    assert [c["text"] for c in records[17]["candidates"]] == [
        c["text"] for c in [*original["candidates"], original["baseline"]]
    ]
    assert records[17]["candidates"][3]["scores"] == {"win_prob": original["candidates"][3]["win_prob"]}
    write_records(tmp_path / "again.jsonl", records)
    assert read_records(tmp_path / "again.jsonl") == records

    hh = SHARED / "hh_helpful_test.jsonl.gz"
    dialogues = tmp_path / "hh.jsonl"
    run(ConvertArguments(str(hh), str(dialogues), "hh", "hh", as_messages=True))
    expected = [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in read_jsonl(hh)]
    found = read_jsonl(dialogues)
    assert len(found) >= 0.99 * len(expected)
    squeezed = {json.dumps(row).replace(" ", "") for row in expected}
    assert sum(json.dumps(row).replace(" ", "") in squeezed for row in found) > 0.9 * len(found)
