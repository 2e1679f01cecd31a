"""Figures of pairs and generations, and suites: by hand, by an independent route, and bad input."""

from __future__ import annotations

import csv
import math

import numpy as np
import pytest
import yaml

from prefopt import cli
from prefopt.candidates.records import make_candidate, make_record, write_records
from prefopt.evaluation.figures import as_json, correlation, mean, resampled, share
from prefopt.evaluation.preference import PairScores, pair_figures
from prefopt.evaluation.suite import SuiteArguments, suite_entries
from prefopt.evaluation.win_rate import length_controlled_win_rate, order_consistency, without_length
from prefopt.files import read_json, write_jsonl
from tests.tiny import tiny_model, tiny_tokenizer
from tests.trainers.pairs import preference_rows

# ---- intervals


def test_intervals_of_figures():
    """8 of 10 is Newcombe's [0.4902, 0.9433]; 1, 2, 3 has the t interval 2 -+ 4.3027 / sqrt 3; r = 0.5 of 28 pairs."""
    eight = share([True] * 8 + [False] * 2, confidence=0.95)
    assert (eight.low, eight.high) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    three = mean([1.0, 2.0, 3.0], confidence=0.95)
    assert (three.value, three.low) == pytest.approx((2, 2 - 4.302653 / math.sqrt(3)), abs=1e-5)
    assert mean([1.0], confidence=0.95).interval == "none" and math.isnan(share([], confidence=0.95).value)
    rng = np.random.default_rng(0)
    x = rng.normal(size=28)
    found = correlation(x, x + rng.normal(size=28), confidence=0.95)
    assert math.atanh(found.high) - math.atanh(found.value) == pytest.approx(1.959964 / 5)
    assert as_json({"a": [math.nan, np.float64(2.0)]}) == {"a": [None, 2.0]}


def test_the_bootstrap_of_a_mean_is_about_students_interval():
    values = np.random.default_rng(0).normal(size=400)
    found = resampled(lambda rows: float(values[rows].mean()), 400, confidence=0.95)
    exact = mean(values, confidence=0.95)
    assert found.value == pytest.approx(exact.value)
    assert (found.low, found.high) == pytest.approx((exact.low, exact.high), abs=0.02)


# ---- pairs


def test_figures_of_pairs_by_hand():
    """Three pairs, log-probs -2 > -3, -8 < -4, -6 > -9; of tokens (1, 3), (4, 1), (2, 2), bytes twice as many."""
    scores = PairScores(
        np.array([-2.0, -8.0, -6.0]),
        np.array([-3.0, -4.0, -9.0]),
        np.array([[1.0, 3.0], [4.0, 1.0], [2.0, 2.0]]),
        np.array([[2.0, 6.0], [8.0, 2.0], [4.0, 4.0]]),
        np.array(["x", "x", "y"], dtype=object),
    )
    found = {name: figure.value for name, figure in pair_figures(scores, beta=1.0, confidence=0.95).items()}
    # per token: -2 against -1, -2 against -4, -3 against -4.5
    assert found["accuracy"] == pytest.approx(2 / 3) and found["margin"] == pytest.approx((1 - 4 + 3) / 3)
    assert found["accuracy_per_token"] == pytest.approx(2 / 3)
    assert found["margin_per_token"] == pytest.approx((-1 + 2 + 1.5) / 3)
    assert found["margin_per_byte"] == pytest.approx(found["margin_per_token"] / 2)
    assert found["chosen_longer"] == 0.5  # of the two pairs of unequal length
    assert found["accuracy_chosen_longer"] == 0 and found["accuracy_chosen_shorter"] == 1
    assert found["length_correlation"] == pytest.approx(np.corrcoef([1, -4, 3], [-2, 3, 0])[0, 1])
    p = 1 / (1 + np.exp(-np.array([1.0, -4, 3])))
    # each pair from both sides: 0.73 alone in its bin, and so 0.27; 0.018 of a win shares one with 0.047 of a loss
    assert found["ece"] == pytest.approx((2 * (1 - p[0]) + 2 * (1 - p[1] - (1 - p[2]))) / 6)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folders = {}
    for name, seed in (("one", 1), ("two", 2)):
        folders[name] = tmp_path_factory.mktemp(name)
        tiny_model(seed=seed).save_pretrained(folders[name])
        tiny_tokenizer("llama3").save_pretrained(folders[name])
    return folders


def test_a_policy_against_its_reference_and_by_source(models, tmp_path):
    rows = [{**row, "origin": "ab"[n % 2]} for n, row in enumerate(preference_rows(9).to_list())]
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    words = ["evaluate", f"--pairs={tmp_path / 'pairs.jsonl'}", "--source_column=origin", "--dtype=float32"]
    words += [f"--model_name_or_path={models['one']}"]
    assert cli.main([*words, f"--ref_model_name_or_path={models['two']}", f"--output_dir={tmp_path / 'a'}"]) == 0
    found = read_json(tmp_path / "a" / "evaluation.json")
    assert [found["by_source"][name]["accuracy"]["count"] for name in "ab"] == [5, 4]
    alone = found["figures"]
    swapped = [word.replace(str(models["one"]), str(models["two"])) for word in words]
    assert cli.main([*swapped, f"--output_dir={tmp_path / 'b'}"]) == 0
    other = read_json(tmp_path / "b" / "evaluation.json")["figures"]
    for name in ("margin", "margin_per_token", "margin_per_byte"):
        difference = alone[name]["value"] - other[name]["value"]
        assert alone[f"reference/{name}"]["value"] == pytest.approx(difference, abs=1e-4)
    assert "| source |" in (tmp_path / "a" / "evaluation.md").read_text()


# ---- generations


def met(shares_and_lengths, tables=None):
    """Records in which `a` wins (1), ties (0.5) or loses (0) against `b`, with answers of these lengths."""
    records = []
    for number, (won, mine, theirs) in enumerate(shares_and_lengths):
        candidates = [
            make_candidate("x" * mine, source="a", scores={"r": won}),
            make_candidate("x" * theirs, source="b", scores={"r": 1 - won}),
        ]
        record = make_record(str(number), "q", candidates)
        records.append({**record, "tables": {"r": tables[number]} if tables else {}})
    return records


def test_the_length_controlled_win_rate_is_that_of_equal_lengths():
    """Answers that win by their length alone, and twice as long: the plain rate is high, the controlled one a half."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(600):
        mine, theirs = int(rng.integers(100, 300)), int(rng.integers(50, 150))
        rows.append((float(rng.random() < 1 / (1 + math.exp(-(mine - theirs) / 60))), mine, theirs))
    found = length_controlled_win_rate(met(rows), "r", "a", "b")
    assert np.mean([won for won, _, _ in rows]) > 0.7
    assert found.low < 0.5 < found.high and abs(found.value - 0.5) < 0.15
    from scipy.optimize import minimize

    y, d = np.array([row[0] for row in rows]), np.array([row[1] - row[2] for row in rows], dtype=float)
    x = np.tanh(d / d.std(ddof=1))
    loss = lambda w: np.sum(np.logaddexp(0, w[0] + w[1] * x) - y * (w[0] + w[1] * x)) + w[1] ** 2 / 2  # noqa: E731
    theta = minimize(loss, [0.0, 0.0], tol=1e-12).x[0]
    assert found.value == pytest.approx(1 / (1 + math.exp(-theta)), abs=1e-5)


def test_lengths_that_are_equal_change_nothing():
    assert without_length(np.array([1.0, 0.0, 0.5]), np.zeros(3)) == 0.5
    assert without_length(np.ones(4), np.array([1.0, 2, 3, 4])) == 1.0
    separated = without_length(np.array([1.0, 1, 0, 0]), np.array([5.0, 4, -5, -4]))
    assert separated == pytest.approx(0.5, abs=1e-6)  # lengths explain it all, and the penalty keeps it finite


def test_verdicts_that_follow_the_order_are_counted():
    first = math.log(9)
    rows = [(1.0, 5, 5), (0.5, 5, 5)]
    tables = [[[0, first], [-first, 0]], [[0, first], [first, 0]]]
    found = order_consistency(met(rows, tables), "r", "a", "b")
    assert found.value == 0.5 and order_consistency(met(rows), "r", "a", "b") is None


# ---- suites


def answers(path, texts):
    write_records(
        path / "candidates.jsonl",
        [make_record(str(i), f"q{i}", [make_candidate(text, source="m")]) for i, text in enumerate(texts)],
    )
    return str(path)


def test_a_suite_makes_one_table_of_several_models(models, tmp_path, capsys):
    write_jsonl(tmp_path / "pairs.jsonl", preference_rows(6).to_list())
    for name in ("one", "two"):
        answers(tmp_path / "answers" / name, ["a b", "a"] if name == "one" else ["a", "a"])
    (tmp_path / "rule.py").write_text("def words(prompt, candidates):\n    return [len(c) for c in candidates]\n")
    suite = {
        "output_dir": str(tmp_path / "out"),
        "models": {"one": str(models["one"]), "two": {"model_name_or_path": str(models["two"]), "folder": "two"}},
        "evaluation": [
            {"kind": "pairs", "pairs": str(tmp_path / "pairs.jsonl"), "dtype": "float32"},
            {
                "label": "longer",
                "answers": str(tmp_path / "answers" / "{model}"),
                "opponents": {"base": answers(tmp_path / "base", ["a", "a"])},
                "ranker": "function",
                "ranker_model": f"{tmp_path / 'rule.py'}:words",
            },
        ],
    }
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite, sort_keys=False))
    assert cli.main(["evaluate", str(tmp_path / "suite.yaml")]) == 0
    found = read_json(tmp_path / "out" / "suite.json")
    assert set(found) == {"pairs", "longer"} and set(found["pairs"]) == {"one", "two"}
    values = {model: found["longer"][model]["figures"]["win_rate/base"]["value"] for model in ("one", "two")}
    assert values == {"one": 0.75, "two": 0.5}
    single = read_json(tmp_path / "out" / "two" / "pairs" / "evaluation.json")
    assert single["model"] == "two" and single["figures"] == found["pairs"]["two"]["figures"]
    page = (tmp_path / "out" / "suite.md").read_text()
    assert "| evaluation | figure | one | two |" in page and "| longer | win_rate/base | 0.75 [" in page
    with open(tmp_path / "out" / "suite.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["model"] for row in rows} == {"one", "two"} and len(rows) == page.count("| pairs |") * 2 + 4
    assert "suite -> " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"evaluation": [{"kind": "pairs"}]}, r"entry 1 \(pairs\): nothing to evaluate"),
        ({"evaluation": ["pairs"]}, "entry 1: expected a mapping of keys"),
        (
            {"evaluation": [{"pairs": "x", "model_name_or_path": "m"}] * 2},
            r"entry 2 \(pairs\): an earlier entry has this name too",
        ),
        ({"evaluation": [{"pairs": "x", "pair": 1}]}, "unknown key 'pair'"),
        ({"evaluation": [{"pairs": "x", "models": {}}]}, "a suite holds no suites and no studies"),
        ({"evaluation": [{"pairs": "x", "beta": "much"}]}, "expected a number"),
        ({"evaluation": [{"pairs": "{data}"}], "models": {"m": "folder"}}, r"\{data\} is no key of models: m"),
        ({"evaluation": [{"pairs": "x"}], "pairs": "y"}, "`pairs` stands beside `evaluation`"),
        ({"models": {"m": "folder"}}, "list what is evaluated under `evaluation`"),
    ],
)
def test_what_a_suite_rejects(settings, said):
    with pytest.raises(ValueError, match=said):
        SuiteArguments(output_dir="out", **settings)


def test_every_benchmark_can_stand_in_a_suite():
    args = SuiteArguments(
        output_dir="out",
        models={"m": "folder"},
        evaluation=[
            {"kind": "alpaca-eval", "annotations": "{model}/annotations.json"},
            {"kind": "reward-bench", "questions": "bench.jsonl"},
            {"kind": "mt-bench", "judgments": "{model}/judgments.jsonl"},
            {"kind": "arena-hard", "judgments": "{model}.jsonl", "style_control": False},
        ],
    )
    entries = suite_entries(args)
    assert [entry.label for entry in entries] == ["alpaca-eval", "reward-bench", "mt-bench", "arena-hard"]
    assert entries[0].settings.annotations == "m/annotations.json"
    assert entries[1].settings.model_name_or_path == "folder" and entries[3].settings.judgments == "m.jsonl"


def test_a_recipe_evaluates_what_it_has_trained(models, tmp_path, capsys):
    write_jsonl(tmp_path / "pairs.jsonl", preference_rows(6).to_list())
    entry = f"{{pairs: {tmp_path / 'pairs.jsonl'}, dtype: float32}}"
    words = ["dpo", f"--model_name_or_path={models['one']}", f"--dataset_name={tmp_path / 'pairs.jsonl'}"]
    words += ["--max_steps=1", "--per_device_train_batch_size=2", "--use_cpu=true", "--report_to=none", "--bf16=false"]
    words += [f"--output_dir={tmp_path / 'run'}", "--beta=0.1"]
    assert cli.main([*words, "--evaluation=[{pairs: x, beta: much}]"]) == 2
    assert "evaluation, entry 1 (pairs): beta: expected a number" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()  # nothing has been trained
    assert cli.main([*words, f"--evaluation=[{entry}]"]) == 0
    found = read_json(tmp_path / "run" / "evaluation" / "suite.json")["pairs"]["run"]
    assert found["figures"]["accuracy"]["count"] == 6
    again = read_json(tmp_path / "run" / "evaluation" / "run" / "pairs" / "evaluation.json")
    assert again["figures"] == found["figures"]
    # what was left can be run by itself
    assert cli.main(["evaluate", str(tmp_path / "run" / "evaluation" / "suite.yaml")]) == 0
    assert read_json(tmp_path / "run" / "evaluation" / "suite.json")["pairs"]["run"] == found
