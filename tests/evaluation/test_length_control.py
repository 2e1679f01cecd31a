"""AlpacaEval 2's numbers: equal to the package's, by hand, and what they need."""

from __future__ import annotations

import csv
import json
import math
import sys

import numpy as np
import pytest

from prefopt import cli
from prefopt.evaluation import alpaca_eval
from prefopt.evaluation.alpaca_eval import RELEASED
from prefopt.evaluation.length_control import alpaca_eval_score, read_gamed_baselines
from prefopt.files import read_json, write_json, write_jsonl
from tests.tiny import tiny_model, tiny_tokenizer

COUNT = 60
# what alpaca-eval 0.6.6 computes from `annotations()` and `gamed_file`, with scikit-learn 1.9.1
PACKAGE = {
    "win_rate": 53.49979830508475,
    "standard_error": 3.3947204352998988,
    "n_wins": 30,
    "n_wins_base": 27,
    "n_draws": 2,
    "n_total": 59,
    "discrete_win_rate": 52.54237288135594,
    "length_controlled_winrate": 53.146369949356355,
    "lc_standard_error": 0.0,
}


def annotations(count=COUNT, *, seed=0):
    """Rows as the package writes them: longer answers win more often; a tie written as 0, one as 1.5, one missing."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        lengths = rng.integers(20, 400, size=2)
        wins = 1 / (1 + math.exp(-(lengths[1] - lengths[0]) / 150 - rng.normal()))
        rows.append(
            {
                "instruction": f"question {number}",
                "output_1": "a" * int(lengths[0]),
                "output_2": "b" * int(lengths[1]),
                "generator_1": "baseline",
                "generator_2": "model",
                "annotator": "judge",
                "preference": 1 + round(wins, 6),
            }
        )
    for row, preference in zip(rows[3:6], (0, 1.5, None)):
        row["preference"] = preference
    return rows


def gamed_file(path, count=COUNT, *, seed=1):
    """A file with the columns of df_gamed.csv: each instruction once for each of two gamed baselines."""
    rng = np.random.default_rng(seed)
    difficulty = rng.normal(size=count)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ("model", "index", "preference", "std_delta_len", "instruction_difficulty", "not_gamed_baseline")
        )
        for name, shift in (("concise", 1.0), ("verbose", -1.0)):
            for number in range(count):
                length = shift + rng.normal() / 4
                preference = 1 / (1 + math.exp(length - difficulty[number] / 2))
                writer.writerow((name, number, repr(preference), repr(length), repr(float(difficulty[number])), False))
    return str(path)


def test_the_numbers_are_the_packages(tmp_path):
    pytest.importorskip("sklearn", reason="the length-controlled win rate needs scikit-learn (extra eval)")
    gamed = read_gamed_baselines(gamed_file(tmp_path / "df_gamed.csv"))
    found = alpaca_eval_score(annotations(), gamed)
    for name, value in PACKAGE.items():
        assert getattr(found, name) == pytest.approx(value, abs=1e-6), name
    controlled = found.figures["length_controlled_win_rate"]
    assert controlled.low < controlled.value < controlled.high and controlled.interval == "bootstrap"
    assert controlled.value == pytest.approx(found.length_controlled_winrate / 100)
    # the model's answers are as long as the baseline's, and longer ones win: control moves the number towards a half
    assert found.win_rate != pytest.approx(found.length_controlled_winrate, abs=0.1)


def test_the_numbers_beside_the_package_itself(tmp_path, monkeypatch):
    pytest.importorskip("alpaca_eval", reason="alpaca-eval is not installed (extra eval)")
    import pandas as pd
    from alpaca_eval.metrics import glm_winrate

    path = gamed_file(tmp_path / "df_gamed.csv")
    monkeypatch.setattr(glm_winrate, "hf_hub_download", lambda **settings: path)
    for seed in range(3):
        rows = annotations(seed=seed)
        theirs = glm_winrate.get_length_controlled_winrate(pd.DataFrame(rows), save_weights_dir=None)
        ours = alpaca_eval_score(rows, read_gamed_baselines(path))
        for name, value in theirs.items():
            assert getattr(ours, name) == pytest.approx(value, abs=1e-6), (seed, name)


def test_win_rates_by_hand():
    """1.25, 1.75, 2, a tie, none: shares 0.25, 0.75, 1, 0.5; mean 0.625; discrete 0, 1, 1, 0.5."""
    rows = annotations(5)
    for row, preference in zip(rows, (1.25, 1.75, 2, 0, None), strict=True):
        row["preference"] = preference
    found = alpaca_eval_score(rows, None)
    assert (found.win_rate, found.discrete_win_rate) == (62.5, 62.5)
    assert (found.n_wins, found.n_wins_base, found.n_draws, found.n_total) == (2, 1, 1, 4)
    assert found.length_controlled_winrate is None and "length_controlled_win_rate" not in found.figures
    assert found.standard_error == pytest.approx(100 * np.std([0.25, 0.75, 1, 0.5], ddof=1) / 2)


def test_a_model_against_itself_is_a_half_at_equal_lengths(tmp_path):
    rows = [{**row, "generator_2": "baseline"} for row in annotations()]
    found = alpaca_eval_score(rows, read_gamed_baselines(gamed_file(tmp_path / "df_gamed.csv")))
    assert found.length_controlled_winrate == 50


def test_what_it_needs(tmp_path, monkeypatch):
    gamed = read_gamed_baselines(gamed_file(tmp_path / "df_gamed.csv", 10))
    with pytest.raises(ValueError, match=r"no difficulty for instruction 10: .*10 instructions"):
        alpaca_eval_score(annotations(12), gamed)
    with pytest.raises(ValueError, match="generator_2 is"):
        alpaca_eval_score([*annotations(3), {**annotations(1)[0], "generator_2": "other"}], None)
    with pytest.raises(ValueError, match="hold no preference"):
        alpaca_eval_score([{**annotations(1)[0], "preference": None}], None)
    (tmp_path / "bad.csv").write_text("index,preference\n0,0.5\n")
    with pytest.raises(ValueError, match=r"is not AlpacaEval's df_gamed\.csv"):
        read_gamed_baselines(str(tmp_path / "bad.csv"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(
        ValueError, match=r"df_gamed\.csv of the hub's data set tatsu-lab/alpaca_eval, which cannot be"
    ):
        read_gamed_baselines(None)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ValueError, match=r"pip install 'prefopt\[eval\]'"):
        alpaca_eval_score(annotations(10), gamed)


# ---- the command


def test_annotations_from_the_command_line(tmp_path, capsys):
    write_json(tmp_path / "annotations.json", annotations())
    words = ["evaluate", "--kind=alpaca-eval", f"--output_dir={tmp_path / 'out'}", "--length_control=false"]
    assert cli.main([*words, f"--annotations={tmp_path / 'annotations.json'}"]) == 0
    found = read_json(tmp_path / "out" / "evaluation.json")
    assert found["kind"] == "alpaca-eval" and found["model"] == "model" and found["baseline"] == "baseline"
    assert found["leaderboard"]["win_rate"] == pytest.approx(PACKAGE["win_rate"], abs=1e-6)
    assert found["figures"]["win_rate"]["value"] == pytest.approx(PACKAGE["win_rate"] / 100)
    assert "evaluate: win_rate: " in capsys.readouterr().out
    assert "| win_rate | 0.535 [" in (tmp_path / "out" / "evaluation.md").read_text()


def test_answers_are_generated_and_annotated(tmp_path):
    """A tiny model answers; a rule prefers the shorter text, so the baseline's long answers lose on every question."""
    tiny_model(seed=1).save_pretrained(tmp_path / "model")
    tiny_tokenizer("llama3").save_pretrained(tmp_path / "model")
    questions = [{"instruction": f"Say {word}", "dataset": "d"} for word in ("one", "two", "three")]
    write_json(tmp_path / "questions.json", questions)
    baseline = [{**row, "output": "long " * 100, "generator": "base"} for row in questions]
    write_json(tmp_path / "baseline.json", baseline)
    (tmp_path / "rule.py").write_text(
        "def short(prompt, candidates):\n    return [-float(len(c)) for c in candidates]\n"
    )
    words = [
        "evaluate",
        "--kind=alpaca-eval",
        f"--output_dir={tmp_path / 'out'}",
        f"--model_name_or_path={tmp_path / 'model'}",
        f"--questions={tmp_path / 'questions.json'}",
        f"--reference_outputs={tmp_path / 'baseline.json'}",
        "--generation={max_new_tokens: 4, temperature: 0}",
        "--dtype=float32",
        "--ranker=function",
        f"--ranker_model={tmp_path / 'rule.py'}:short",
        "--length_control=false",
        "--model_name=tiny",
    ]
    assert cli.main(words) == 0
    outputs = read_json(tmp_path / "out" / "model_outputs.json")
    assert [row["instruction"] for row in outputs] == [row["instruction"] for row in questions]
    assert {row["generator"] for row in outputs} == {"tiny"} and set(outputs[0]) == {
        "dataset",
        "instruction",
        "output",
        "generator",
    }
    made = read_json(tmp_path / "out" / "annotations.json")
    assert [row["output_1"] for row in made] == [row["output"] for row in baseline]
    assert read_json(tmp_path / "out" / "evaluation.json")["leaderboard"]["n_wins"] == 3
    write_json(tmp_path / "baseline.json", [*baseline, {**baseline[0], "instruction": "another"}])
    assert cli.main([*words[:-1], "--model_name=tiny"]) == 2


def test_configs_of_the_released_policies(tmp_path, capsys):
    words = ["evaluate", "--kind=alpaca-eval", f"--output_dir={tmp_path}"]
    assert cli.main([*words, "--write_configs", "all"]) == 0
    import yaml

    for name, released in RELEASED.items():
        config = yaml.safe_load((tmp_path / "models_configs" / name / "configs.yaml").read_text())[name]
        assert config["completions_kwargs"]["model_name"] == released.model
        prompt = (tmp_path / "models_configs" / config["prompt_template"]).read_text()
        assert prompt.count("{instruction}") == 1
    llama = yaml.safe_load((tmp_path / "models_configs/GPO-Llama-3-8B-Instruct-GPM-2B/configs.yaml").read_text())
    assert llama["GPO-Llama-3-8B-Instruct-GPM-2B"]["completions_kwargs"]["stop_token_ids"] == [128001, 128009]
    assert cli.main([*words, "--write_configs", "Mistral7B"]) == 2
    assert "'Mistral7B' is not one of Mistral7B-PairRM-SPPO-Iter1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "needs one of annotations, model_outputs, answers and questions"),
        ({"annotations": "a", "questions": "q"}, "given: annotations, questions"),
        ({"answers": "a"}, "the model has no name"),
        ({"model_outputs": "a", "reference_outputs": "b"}, "reference_outputs and ranker belong together"),
        ({"annotations": "a", "opponents": {"base": "b"}}, "`opponents` is not read with kind alpaca-eval"),
    ],
)
def test_what_alpaca_eval_rejects(settings, said):
    from prefopt.evaluation.evaluate import EvaluateArguments

    with pytest.raises(ValueError, match=said):
        EvaluateArguments(output_dir="out", kind=alpaca_eval.KIND, **settings)


def test_questions_as_lines(tmp_path):
    from prefopt.evaluation.settings import read_rows

    write_jsonl(tmp_path / "rows.jsonl", [{"a": 1}, {"b": 2}])
    with pytest.raises(ValueError, match=r"rows.jsonl, row 1: no 'a'"):
        read_rows(str(tmp_path / "rows.jsonl"), ("a",))
    (tmp_path / "rows.json").write_text(json.dumps({"a": 1}))
    with pytest.raises(ValueError, match="must hold a list of rows"):
        read_rows(str(tmp_path / "rows.json"), ("a",))
