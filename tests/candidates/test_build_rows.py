"""Training rows that are no pairs: each form, what is left out, and what is refused."""

from __future__ import annotations

import json

import pytest

from prefopt.candidates.build_rows import BuildRowsArguments, run
from prefopt.candidates.convert import ConvertArguments
from prefopt.candidates.convert import run as convert
from prefopt.candidates.records import make_candidate, make_record, write_records
from prefopt.cli import main
from prefopt.data.rows import normalise_comparison
from prefopt.files import read_json, read_jsonl, write_jsonl


def write_candidates(folder, prompts, *, scored=True):
    """`prompts`: prompt_id -> the texts and scores of its answers."""
    records = [
        make_record(
            name,
            [{"role": "user", "content": f"about {name}"}],
            [
                make_candidate(text, source="policy", k=k, scores={"rm": score} if scored else None)
                for k, (text, score) in enumerate(answers)
            ],
        )
        for name, answers in prompts.items()
    ]
    write_records(folder / "candidates.jsonl", records)
    return str(folder)


ANSWERS = {
    "a": [("fair", 0.5), ("best", 2.0), (" ", 3.0)],
    "b": [("one", 1.0), ("two", 1.0)],
    "c": [("only", 1.0), ("", 0.0)],
}


def build(tmp_path, form, prompts=ANSWERS, scored=True, **settings):
    candidates = write_candidates(tmp_path / "candidates", prompts, scored=scored)
    path = run(BuildRowsArguments(candidates, str(tmp_path / "rows"), form, **settings))
    return list(read_jsonl(path)), read_json(path.parent / "rows_report.json")["left out"]


def test_the_best_answer_of_each_prompt(tmp_path):
    rows, left_out = build(tmp_path, "sft")
    assert [row["completion"][0]["content"] for row in rows] == ["best", "one", "only"]
    assert rows[0]["prompt"] == [{"role": "user", "content": "about a"}]
    assert left_out == {}


def test_all_scored_answers_of_a_prompt_in_a_row(tmp_path):
    rows, left_out = build(tmp_path, "comparisons")
    assert len(rows) == 1
    clean = normalise_comparison(rows[0])
    assert [response[0]["content"] for response in clean["responses"]] == ["fair", "best"]
    assert clean["scores"] == [0.5, 2.0]
    assert left_out == {"blank responses": 2, "all scores tied": 1, "fewer than two responses": 1}


@pytest.mark.parametrize("form", ["sft", "comparisons", "adversarial"])
def test_tools_and_template_settings_stay_with_their_prompt(tmp_path, form):
    """Without them, training would see another prompt than the one that was answered."""
    context = {"tools": [{"name": "search", "parameters": {}}], "chat_template_kwargs": {"enable_thinking": False}}
    answers = [make_candidate(text, source="policy", scores={"rm": n}) for n, text in enumerate(("bad", "good"))]
    prompt = [{"role": "user", "content": "find it"}]
    write_records(tmp_path / "c" / "candidates.jsonl", [make_record("a", prompt, answers, **context)])
    write_jsonl(tmp_path / "golden.jsonl", [{"prompt_id": "a", "golden": "best"}])
    golden = {"golden": str(tmp_path / "golden.jsonl")} if form == "adversarial" else {}
    path = run(BuildRowsArguments(str(tmp_path / "c"), str(tmp_path / "rows"), form, **golden))
    row = read_jsonl(path)[0]
    if form == "sft":  # for TRL's trainer
        assert (json.loads(row["tools"]), row["chat_template_kwargs"]) == tuple(context.values())
    else:
        clean = normalise_comparison(row)
        assert {name: clean[name] for name in context} == context


def test_golden_answers_against_samples(tmp_path):
    golden = [
        {"prompt_id": "a", "golden": "best"},
        {"prompt_id": "b", "golden": "gold"},
        {"prompt_id": "z", "golden": "gold"},
    ]
    write_jsonl(tmp_path / "golden.jsonl", golden)
    rows, left_out = build(tmp_path, "adversarial", scored=False, golden=str(tmp_path / "golden.jsonl"))
    assert [[response[0]["content"] for response in row["responses"]] for row in rows] == [
        ["best", "fair"],
        ["gold", "one"],
        ["gold", "two"],
    ]
    assert all(normalise_comparison(row)["is_adversarial"] and row["scores"] == [1.0, 0.0] for row in rows)
    assert left_out == {
        "golden answer without samples": 1,
        "samples without a golden answer": 1,
        "blank sample": 1,
        "sample equals the golden answer": 1,
    }
    with pytest.raises(ValueError, match="1 ids with golden answer without samples"):
        build(tmp_path, "adversarial", golden=str(tmp_path / "golden.jsonl"), on_unmatched="raise")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"form": "pairs"}, "form must be one of sft, comparisons, adversarial"),
        ({"form": ""}, "form is missing"),
        ({"form": "adversarial"}, "golden is missing"),
        ({"form": "sft", "golden": "g"}, "golden is only read with form adversarial"),
        ({"form": "adversarial", "golden": "g", "score": "rm"}, "score is only read with form sft or comparisons"),
    ],
)
def test_bad_settings(settings, said):
    with pytest.raises(ValueError, match=said):
        BuildRowsArguments("candidates", "rows", **settings)


def test_unscored_candidates_and_nothing_left_are_refused(tmp_path):
    with pytest.raises(ValueError, match="have no scores; run `prefopt rank` first"):
        build(tmp_path, "sft", scored=False)
    with pytest.raises(ValueError, match=r"none of 1 prompts gives a row \(1 x all scores tied\)"):
        build(tmp_path, "comparisons", prompts={"b": ANSWERS["b"]})


def test_the_command(tmp_path, capsys):
    candidates = write_candidates(tmp_path / "candidates", ANSWERS)
    words = ["build-rows", f"--candidates={candidates}", f"--output_dir={tmp_path / 'rows'}", "--form=sft"]
    assert main(words) == 0
    assert "3 sft rows from 3 prompts" in capsys.readouterr().out


def test_build_rows_and_convert_cut_answers_at_the_same_place(tmp_path):
    """Whatever white space stands around the next human turn; words that begin alike are no turn."""
    texts = [
        "It is blue.\n Human : and then?",
        "It is red.\n\nHuman: and?\n\nAssistant: so",
        " It is green.\n\t\nHuman\t: x",
        "Humans are odd\nHumans: no turn",
        "\nHuman: nothing before",
    ]
    write_jsonl(tmp_path / "golden.jsonl", [{"query_id": "1", "golden": "Best.\n Human : more?"}])
    samples = {"query_id": "1", "query": "\n\nHuman: colour?\n\nAssistant:"}
    write_jsonl(tmp_path / "samples.jsonl", [{**samples, **{f"sample_{k}": text for k, text in enumerate(texts)}}])
    convert(
        ConvertArguments(
            str(tmp_path / "samples.jsonl"),
            str(tmp_path / "converted.jsonl"),
            "apo_samples",
            "apo_pairs",
            golden=str(tmp_path / "golden.jsonl"),
        )
    )
    converted = [[text.split("<sep>")[1] for text in row["text"]] for row in read_jsonl(tmp_path / "converted.jsonl")]
    candidates = [make_candidate(text, source="m", k=k) for k, text in enumerate(texts)]
    write_records(tmp_path / "candidates.jsonl", [make_record("1", samples["query"], candidates)])
    settings = {"form": "adversarial", "golden": str(tmp_path / "golden.jsonl")}
    built = read_jsonl(run(BuildRowsArguments(str(tmp_path / "candidates.jsonl"), str(tmp_path / "out"), **settings)))
    assert [row["responses"] for row in built] == converted
    assert converted == [["Best.", answer] for answer in ("It is blue.", "It is red.", "It is green.", texts[3])]
