"""Win rates, preference accuracy, reports and AlpacaEval's files: by hand, by an independent route, and bad input."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset

from prefopt import cli
from prefopt.candidates.records import make_candidate, make_record, write_records
from prefopt.data import tokenize_pairs
from prefopt.evaluation.alpaca_eval import export, model_config, model_outputs
from prefopt.evaluation.evaluate import EvaluateArguments, run, stop_reason
from prefopt.evaluation.preference import preference_accuracy
from prefopt.evaluation.win_rate import interval, join_answers, length_statistics, win_rate
from prefopt.files import read_json, write_json, write_jsonl
from prefopt.references.filling import ReferenceModel
from prefopt.reports import command as report
from prefopt.scoring.layouts import Group
from tests.candidates.launching import free_port
from tests.scoring.helpers import plain_logps
from tests.tiny import tiny_model, tiny_tokenizer
from tests.trainers.pairs import preference_rows


def scored(mine, theirs, *, table=None):
    """One record with these scores of candidates of `a` and of `b`."""
    candidates = [
        make_candidate(f"{source}{k}", source=source, k=k, scores={"r": score})
        for source, scores in (("a", mine), ("b", theirs))
        for k, score in enumerate(scores)
    ]
    record = make_record(f"p{mine}{theirs}", "q", candidates)
    return {**record, "tables": {"r": table} if table is not None else {}}


# ---- win rates
# ---------------------------------------------------------------------------------------------------------------------


def test_a_win_rate_by_hand():
    """Prompt 1: 2 > 1, 2 = 2, 0 < 1, 0 < 2: (1 + 1/2) / 4 = 0.375. Prompt 2: 3 > 1: 1. Mean 0.6875; sigmoids of the
    differences."""
    found = win_rate([scored([2.0, 0.0], [1.0, 2.0]), scored([3.0], [1.0])], "r", "a", "b")
    assert (found.win_rate, found.wins, found.ties, found.losses, found.prompts) == (0.6875, 2, 1, 2, 2)
    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    first = (sigmoid(1) + sigmoid(0) + sigmoid(-1) + sigmoid(-2)) / 4
    assert found.win_prob == pytest.approx((first + sigmoid(2)) / 2) and found.interval == "bootstrap"


def test_mine_and_theirs_add_up_to_one():
    records = [scored([float(i % 3), 1.0], [float(i % 2), 2.0]) for i in range(20)]
    there, back = win_rate(records, "r", "a", "b"), win_rate(records, "r", "b", "a")
    assert there.win_rate + back.win_rate == pytest.approx(1) and there.win_prob + back.win_prob == pytest.approx(1)
    assert (there.wins, there.ties, there.losses) == (back.losses, back.ties, back.wins)


def test_a_table_is_averaged_over_both_orders():
    """c_ab = 3 (a first) and c_ba = 1 (b first): a leads by (3 - 1) / 2 = 1, against the scores."""
    found = win_rate([scored([0.0], [9.0], table=[[0.0, 3.0], [1.0, 0.0]])], "r", "a", "b")
    assert found.win_rate == 1 and found.win_prob == pytest.approx(1 / (1 + math.exp(-1)))


def test_wilsons_interval_where_every_prompt_is_won_or_lost():
    """8 of 10: the 95 % Wilson interval is [0.4902, 0.9433] (Newcombe 1998, method 3)."""
    low, high, kind = interval([1.0] * 8 + [0.0] * 2)
    assert kind == "wilson" and (low, high) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert interval([1.0] * 5)[1] == 1.0 and interval([1.0] * 5)[0] > 0.5


def test_the_bootstrap_covers_the_mean_as_often_as_it_says():
    """Means of 60 shares from {0, 0.5, 1}: 95 % intervals hold the true mean in about 95 % of 200 draws."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        low, high, kind = interval(rng.choice([0.0, 0.5, 1.0], p=[0.2, 0.3, 0.5], size=60).tolist())
        held += low <= 0.65 <= high and kind == "bootstrap"
    assert 0.89 <= held / 200 <= 0.99
    assert interval([0.5, 0.25, 1.0, 0.75]) == interval([0.5, 0.25, 1.0, 0.75])


def test_no_prompt_in_common(tmp_path):
    with pytest.raises(ValueError, match="No prompt has answers of both 'a' and 'c'"):
        win_rate([scored([1.0], [2.0])], "r", "a", "c")
    records = {"x": [make_record("1", "q", [])], "y": [make_record("2", "q", [])]}
    with pytest.raises(ValueError, match="No prompt was answered by all of x, y"):
        join_answers(records)


def test_answers_are_joined_by_prompt_under_their_policies_names():
    def answers(texts, source):
        return [
            make_record(i, f"q{i}", [make_candidate(t, source=source, num_tokens=len(t), scores={"old": 1.0})])
            for i, t in texts.items()
        ]

    joined, lacking = join_answers(
        {
            "policy": answers({"1": "aa", "2": "b", "3": "c"}, "m1"),
            "base": answers({"2": "bbb", "1": "", "4": "d"}, "m0"),
        }
    )
    assert lacking == 2 and [record["prompt_id"] for record in joined] == ["1", "2"]
    assert [(c["source"], c["text"], c["scores"]) for c in joined[0]["candidates"]] == [
        ("policy", "aa", {}),
        ("base", "", {}),
    ]
    assert length_statistics(joined, "base") == {
        "answers": 2.0,
        "mean_characters": 1.5,
        "median_characters": 1.5,
        "empty": 0.5,
        "cut_off": 0.0,
        "mean_tokens": 1.5,
    }


# ---- preference accuracy
# -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])  # packed, padded
def test_preference_accuracy_is_that_of_plain_forwards(architecture):
    model, tokenizer, rows = tiny_model(architecture, seed=3), tiny_tokenizer("llama3"), preference_rows(20)
    found = preference_accuracy(ReferenceModel("tiny", model, tokenizer), rows, dtype="float32", max_tokens=200)

    tokenised, _ = tokenize_pairs(rows, tokenizer, max_length=None)
    groups = [Group(row["prompt_ids"], [row["chosen_ids"], row["rejected_ids"]]) for row in tokenised]
    with torch.no_grad():
        logps = plain_logps(tiny_model(architecture, seed=3), groups).double()
    counts = torch.tensor([len(c) for group in groups for c in group.completions], dtype=torch.float64)
    margins, per_token = logps[0::2] - logps[1::2], logps[0::2] / counts[0::2] - logps[1::2] / counts[1::2]
    assert found.pairs == 20 and 0 < found.accuracy < 1
    assert found.accuracy == float((margins > 0).double().mean())
    assert found.margin == pytest.approx(float(margins.mean()), rel=1e-4)
    assert found.accuracy_per_token == float((per_token > 0).double().mean())
    assert found.margin_per_token == pytest.approx(float(per_token.mean()), rel=1e-3, abs=1e-6)


# ---- the command
# -------------------------------------------------------------------------------------------------------------------


def answer_folder(path, texts):
    records = [
        make_record(str(i), f"question {i}", [make_candidate(text, source="m", num_tokens=len(text.split()))])
        for i, text in enumerate(texts)
    ]
    write_records(path / "candidates.jsonl", records)
    return str(path)


@pytest.fixture
def players(tmp_path):
    (tmp_path / "rule.py").write_text(
        "def words(prompt, candidates):\n    return [float(len(c.split())) for c in candidates]\n"
    )
    folders = {
        name: answer_folder(tmp_path / name, texts)
        for name, texts in (("new", ["a b c", "a", "a b"]), ("old", ["a", "a", "a b c"]), ("base", ["", "a b", "a"]))
    }
    return {**folders, "rule": f"{tmp_path / 'rule.py'}:words"}


def test_evaluate_compares_policies_and_writes_what_it_found(players, tmp_path, capsys):
    words = [
        "evaluate",
        f"--output_dir={tmp_path / 'out'}",
        f"--answers={players['new']}",
        f"--opponents={{previous: {players['old']}, base: {players['base']}}}",
    ]
    words += [
        "--ranker=function",
        f"--ranker_model={players['rule']}",
        "--alpaca_eval=me",
        "--alpaca_eval_family=llama3",
        "--min_win_rate=0.6",
    ]
    assert cli.main(words) == 0
    found = read_json(tmp_path / "out" / "evaluation.json")
    # longer wins: against previous 1, 1/2, 0; against base 1, 0, 1
    assert found["win_rates"]["previous"]["win_rate"] == 0.5 and found["win_rates"]["base"][
        "win_rate"
    ] == pytest.approx(2 / 3)
    assert (
        found["win_rates"]["base"]["interval"] == "wilson"
        and found["win_rates"]["previous"]["interval"] == "bootstrap"
    )
    assert found["lengths"]["policy"]["mean_tokens"] == 2 and found["prompts"] == 3
    assert found["stop"] == "the win rate against previous is 0.500, below 0.6"
    assert found["samples"][0]["answers"]["policy"] == {"text": "a b c", "score": 3.0}
    assert "win rate against base: 0.667" in capsys.readouterr().out
    outputs = read_json(tmp_path / "out" / "alpaca_eval" / "model_outputs.json")
    assert outputs[0] == {"dataset": "alpaca_eval", "instruction": "question 0", "output": "a b c", "generator": "me"}
    config = yaml.safe_load((tmp_path / "out" / "alpaca_eval" / "configs.yaml").read_text())["me"]
    assert config["completions_kwargs"]["model_name"] == "m"  # the answers say which model wrote them


def test_evaluate_scores_a_model_on_pairs(tmp_path):
    tiny_model(seed=1).save_pretrained(tmp_path / "model")
    tiny_tokenizer("llama3").save_pretrained(tmp_path / "model")
    write_jsonl(tmp_path / "pairs.jsonl", preference_rows(8).to_list())
    args = EvaluateArguments(
        output_dir=str(tmp_path / "out"),
        model_name_or_path=str(tmp_path / "model"),
        pairs=str(tmp_path / "pairs.jsonl"),
        dtype="float32",
    )
    found = run(args)["preference"]
    direct = preference_accuracy(
        ReferenceModel("m", tiny_model(seed=1), tiny_tokenizer("llama3")),
        Dataset.from_list(preference_rows(8).to_list()),
        dtype="float32",
    )
    assert found["accuracy"] == direct.accuracy and found["margin"] == pytest.approx(direct.margin, rel=1e-5)


@pytest.mark.slow
def test_two_processes_find_what_one_finds(players, tmp_path):
    """Win rates and preference accuracy, with 7 pairs for two ranks."""
    tiny_model(seed=1).save_pretrained(tmp_path / "model")
    tiny_tokenizer("llama3").save_pretrained(tmp_path / "model")
    write_jsonl(tmp_path / "pairs.jsonl", preference_rows(7).to_list())
    words = [
        f"--answers={players['new']}",
        f"--opponents={{base: {players['base']}}}",
        "--ranker=function",
        f"--ranker_model={players['rule']}",
    ]
    words += [f"--model_name_or_path={tmp_path / 'model'}", f"--pairs={tmp_path / 'pairs.jsonl'}", "--dtype=float32"]
    two = ["--accelerate_config=cpu_ddp_2ranks", f"--main_process_port={free_port()}"]
    found = []
    for name, more in (("one", []), ("two", two)):
        command = [sys.executable, "-m", "prefopt", "evaluate", f"--output_dir={tmp_path / name}", *words, *more]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        found.append(read_json(tmp_path / name / "evaluation.json"))
    assert found[1]["preference"].pop("margin") == pytest.approx(found[0]["preference"].pop("margin"), rel=1e-5)
    assert found[1]["preference"].pop("margin_per_token") == pytest.approx(
        found[0]["preference"].pop("margin_per_token"), rel=1e-4
    )
    assert found[0] == found[1] and found[0]["preference"]["pairs"] == 7


def result(rate=0.6, lengths=(10.0, 10.0)):
    sides = {
        name: {"mean_characters": 1.0, "mean_tokens": tokens} for name, tokens in zip(("policy", "base"), lengths)
    }
    return {"win_rates": {"base": {"win_rate": rate}}, "lengths": sides}


def test_the_stop_rules():
    assert stop_reason(result(), min_win_rate=None, max_length_ratio=None) is None
    assert stop_reason(result(0.5), min_win_rate=0.5, max_length_ratio=None) is None
    assert "against base is 0.490, below 0.5" in stop_reason(result(0.49), min_win_rate=0.5, max_length_ratio=None)
    assert stop_reason(result(lengths=(15.0, 10.0)), min_win_rate=None, max_length_ratio=1.5) is None
    assert "1.60 times as long" in stop_reason(result(lengths=(16.0, 10.0)), min_win_rate=None, max_length_ratio=1.5)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "nothing to evaluate"),
        ({"pairs": "x"}, "pairs and model_name_or_path belong together"),
        ({"answers": "x", "opponents": {"base": "y"}}, "opponents and ranker belong together"),
        (
            {"answers": "x", "opponents": {"policy": "y"}, "ranker": "function", "ranker_model": "a:b"},
            "choose another name than 'policy'",
        ),
        (
            {
                "answers": "x",
                "opponents": {"old": "y"},
                "ranker": "function",
                "ranker_model": "a:b",
                "max_length_ratio": 2.0,
            },
            "the opponent `base`",
        ),
        ({"answers": "x", "opponents": {"old": "y"}, "ranker": "function"}, "model_name_or_path is missing"),
        (
            {
                "answers": "x",
                "opponents": {"o": "y"},
                "ranker": "function",
                "ranker_model": "a:b",
                "ranker_settings": {"sze": 1},
            },
            "`ranker_settings`: .*'sze'",
        ),
        ({"answers": "x", "min_win_rate": 0.5}, "`min_win_rate` needs `opponents`"),
        (
            {
                "answers": "x",
                "opponents": {"base": "y"},
                "ranker": "function",
                "ranker_model": "a:b",
                "min_win_rate": 55.0,
            },
            "min_win_rate is 55.0; it must be at most 1",
        ),
        (
            {
                "answers": "x",
                "opponents": {"base": "y"},
                "ranker": "function",
                "ranker_model": "a:b",
                "max_length_ratio": 0.0,
            },
            "it must be above 0",
        ),
        ({"pairs": "x", "model_name_or_path": "m", "alpaca_eval": "me"}, "which are not given"),
    ],
)
def test_what_evaluate_refuses(settings, said):
    with pytest.raises(ValueError, match=said):
        EvaluateArguments(output_dir="out", **settings)


# ---- the report
# --------------------------------------------------------------------------------------------------------------------


def write_iteration(run_dir, number, rate, *, stop=None):
    rates = {
        "base": {
            "win_rate": rate,
            "low": rate - 0.05,
            "high": rate + 0.05,
            "interval": "bootstrap",
            "win_prob": rate,
            "wins": 5,
            "ties": 1,
            "losses": 2,
            "prompts": 8,
        }
    }
    if number > 1:
        rates["previous"] = {**rates["base"], "win_rate": 0.55, "low": 0.5}
    length = {
        "answers": 8.0,
        "mean_characters": 40.0 + number,
        "median_characters": 40.0,
        "empty": 0.0,
        "cut_off": 0.0,
        "mean_tokens": 10.0 + number,
    }
    samples = [
        {"prompt": "What | is this?", "answers": {"policy": {"text": f"answer {number}\n" + "x" * 900, "score": 1.5}}}
    ]
    evaluation = {
        "win_rates": rates,
        "scores": {},
        "lengths": {"policy": length, "base": {**length, "mean_tokens": 10.0}},
        "preference": {"accuracy": 0.7},
        "samples": samples,
        "stop": stop,
    }
    folder = run_dir / f"iteration-{number}"
    write_json(folder / "evaluate" / "evaluation.json", evaluation)
    log = [{"loss": 9.0, "loss_normalized": 0.1, "step": 1.0}, {"loss": 4.0, "loss_normalized": 0.05, "step": 2.0}]
    write_json(folder / "train" / "trainer_state.json", {"log_history": log})


def test_the_report_names_the_best_iteration_and_grows(tmp_path):
    for number, rate in ((1, 0.6), (2, 0.8), (10, 0.7)):
        write_iteration(tmp_path, number, rate, stop="the rule" if number == 10 else None)
        report.run(
            report.ReportArguments(
                run_dir=[str(tmp_path)], iterations=number, output_dir=str(tmp_path / f"iteration-{number}" / "report")
            )
        )
    text = (tmp_path / "report.md").read_text()
    assert "Best so far: **iteration 2**, win rate against the base 0.800 [0.750, 0.850]." in text
    assert [text.index(f"## Iteration {n}") for n in (1, 2, 10)] == sorted(
        text.index(f"## Iteration {n}") for n in (1, 2, 10)
    )
    assert "**Ended early** after iteration 10: the rule." in text
    assert "| 2 | 0.800 [0.750, 0.850] | 0.550 [0.500, 0.850] | 0.700 | 12.0 tokens | 1.20 | – |" in text
    assert "| loss_normalized | 0.1 | 0.05 |" in text and "What \\| is this?" in text and "x" * 500 not in text
    assert (
        "](iteration-10/report/progress.svg)" in text
        and (tmp_path / "iteration-10" / "report" / "progress.svg").read_text().count('<path class="line"') == 6
    )
    html = (tmp_path / "report.html").read_text()
    assert html.count("<figure>") == 3 and ">Length drift</text>" in html and "<strong>iteration 2</strong>" in html
    assert "Iteration 2" not in (tmp_path / "iteration-1" / "report" / "report.md").read_text()


def test_a_run_without_evaluations(tmp_path, capsys):
    assert cli.main(["report", f"--run_dir={tmp_path}"]) == 2
    assert "holds no training run" in capsys.readouterr().err


# ---- AlpacaEval
# --------------------------------------------------------------------------------------------------------------------


def test_alpaca_evals_config_has_the_published_sampling(tmp_path):
    llama = model_config("llama3", "runs/x", "SPPO-Llama-3")["SPPO-Llama-3"]
    assert llama["fn_completions"] == "vllm_local_completions"
    wanted = {
        "temperature": 0.9,
        "top_p": 1.0,
        "max_new_tokens": 4096,
        "batch_size": 900,
        "stop_token_ids": [128001, 128009],
        "model_kwargs": {"dtype": "bfloat16"},  # arguments of vLLM's LLM: it refuses torch_dtype
    }
    assert wanted.items() <= llama["completions_kwargs"].items()
    for family in ("mistral", "gemma2"):
        settings = model_config(family, "x", "g")["g"]["completions_kwargs"]
        assert {
            "temperature": 0.7,
            "top_p": 0.9,
            "max_new_tokens": 2048,
            "batch_size": 900,
        }.items() <= settings.items()
    export(
        tmp_path,
        [make_record("1", "hi", [make_candidate("yes", source="m")])],
        generator="g",
        model="x",
        family="mistral",
    )
    assert yaml.safe_load((tmp_path / "configs.yaml").read_text())["g"]["prompt_template"] == "g/prompt.txt"
    assert (tmp_path / "prompt.txt").read_text() == "<s>[INST] {instruction} [/INST]"


def test_what_alpaca_eval_cannot_take():
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    with pytest.raises(ValueError, match="Row '1': AlpacaEval's instructions are single turns"):
        model_outputs([make_record("1", turns, [make_candidate("x", source="m")])], "g")
    with pytest.raises(ValueError, match="Row '2' has no answer"):
        model_outputs([make_record("2", "q", [])], "g")
    with pytest.raises(ValueError, match="known for mistral, gemma2, llama3, not 'qwen'"):
        model_config("qwen", "x", "g")


HOSTILE = "<img src=https://evil/x.png> ![x](https://evil/y.png) | cell \x1b[2J\u202e"


def test_reports_show_data_literally(tmp_path, capsys):
    """Names, answers, prompts and reasons come from data and models: no tag, image, cell or escape of theirs acts."""
    write_iteration(tmp_path, 1, 0.6, stop=HOSTILE)
    place = tmp_path / "iteration-1" / "evaluate" / "evaluation.json"
    found = read_json(place)
    found["win_rates"][HOSTILE] = found["win_rates"]["base"]
    found["lengths"][HOSTILE] = found["lengths"]["base"]
    found["samples"] = [{"prompt": HOSTILE, "answers": {HOSTILE: {"text": HOSTILE, "score": None}}}]
    write_json(place, found)
    write_json(tmp_path / "iteration-1" / "reward-train" / "eval_results.json", {f"eval_{HOSTILE}_loss": 1.0})
    report.run(report.ReportArguments(run_dir=[str(tmp_path)], plots=False))
    text = (tmp_path / "report.md").read_text() + capsys.readouterr().out
    assert "<img" not in text and "![" not in text and "https://evil" not in text
    assert "\x1b" not in text and "\u202e" not in text
    assert text.count("&lt;img src=https&#58;//evil/x.png&gt; !\\[x\\]") == 7
