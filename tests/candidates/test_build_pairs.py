import gzip
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from prefopt.candidates.build_pairs import (
    ALL_TIED,
    GAP_TOO_SMALL,
    TOO_FEW,
    TOO_FEW_LEFT,
    BuildPairsArguments,
    length_bias,
    run,
    wilson_lower,
)
from prefopt.candidates.pairs import POLICIES, win_probabilities
from prefopt.candidates.records import make_candidate, make_record, off_policy_candidates, write_records
from prefopt.cli import main
from prefopt.data.loading import DataArguments, load_datasets
from prefopt.data.sources import DataSource

REAL = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "alpaca_candidates.jsonl.gz"


def candidate(text, score, k=0, **more):
    scores = {} if score is None else {"rm": score}
    return make_candidate(
        text, source=more.pop("source", "policy"), k=k, scores=scores, **{"finish_reason": "stop", **more}
    )


def save(path, *rows):
    write_records(path, [make_record(f"p{n}", prompt, candidates) for n, (prompt, candidates) in enumerate(rows)])
    return str(path)


def build(source, folder, **settings):
    return list(map(dict, Dataset.from_parquet(str(run(BuildPairsArguments(source, str(folder), **settings))))))


def report(folder):
    return json.loads((Path(folder) / "pairs_report.json").read_text())


@pytest.fixture
def source(tmp_path):
    """One good prompt, and one for each reason to give no pair."""
    return save(
        tmp_path / "in.jsonl",
        (
            "good",
            [candidate("short", 1.0), candidate("the best one", 3.0, source="dataset[gpt4]"), candidate("worst", 0.5)],
        ),
        ("tie", [candidate("a", 2.0), candidate("b", 2.0)]),
        ("alone", [candidate("a", 2.0)]),
        (
            "filtered",
            [
                candidate("a", 9.0),
                candidate(" \n", 2.0),
                candidate("a", 1.0),
                candidate("cut", 0.0, finish_reason="length"),
            ],
        ),
        ("close", [candidate("a", 2.0), candidate("b", 1.9)]),
    )


def test_rows_in_the_trainers_columns_and_every_loss_counted(source, tmp_path, capsys):
    (row,) = build(source, tmp_path / "out", min_gap=0.5)
    assert row == {
        "prompt_id": "p0",
        "prompt": "good",
        "chosen": "the best one",
        "rejected": "worst",
        "chosen_score": 3.0,
        "rejected_score": 0.5,
        "chosen_source": "dataset[gpt4]",
        "rejected_source": "policy",
    }
    found = report(tmp_path / "out")
    assert found["dropped_prompts"] == {ALL_TIED: 1, TOO_FEW: 1, TOO_FEW_LEFT: 1, GAP_TOO_SMALL: 1}
    assert found["filtered_candidates"] == {"empty": 1, "duplicate": 1, "length": 1}
    assert found["gap"]["mean"] == 2.5 and found["characters"]["chosen"]["mean"] == len("the best one")
    assert "1 pairs from 1 of 5 prompts" in capsys.readouterr().out
    page = (tmp_path / "out" / "pairs_report.md").read_text()
    assert ALL_TIED in page and "pairs_report.png" in page and "policy best_worst" in page
    assert (tmp_path / "out" / "pairs_report.png").read_bytes().startswith(b"\x89PNG")


def test_kept_candidates(source, tmp_path):
    rows = build(source, tmp_path / "out", keep=["empty", "length"], plots=False)
    assert [(row["chosen"], row["rejected"]) for row in rows] == [("the best one", "worst"), ("a", "cut"), ("a", "b")]
    assert report(tmp_path / "out")["filtered_candidates"] == {"duplicate": 1}
    assert not (tmp_path / "out" / "pairs_report.png").exists()


def test_passed_over_candidates_still_count_in_the_means(tmp_path):
    source = save(tmp_path / "in.jsonl", ("x", [candidate("a", 1.0), candidate("b", 0.0), candidate("", 5.0)]))
    (row,) = build(source, tmp_path / "out", policy="sppo")
    assert row["chosen_win_prob"] == pytest.approx(win_probabilities([1.0, 0.0, 5.0])[0].mean())
    (published,) = build(source, tmp_path / "paper", policy="sppo_paper")
    assert published["chosen"] == ""  # the published pipeline passes over nothing


def test_conversations_stay_conversations_and_tools_come_along(tmp_path):
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "None?"}]
    tools = [{"type": "function", "function": {"name": "f"}}]
    rows = [make_record("a", turns, [candidate("x", 1.0), candidate("y", 0.0)], tools=tools)]
    rows.append(make_record("b", "plain", [candidate("x", 1.0), candidate("y", 0.0)]))
    write_records(tmp_path / "in.parquet", rows)
    first, second = build(str(tmp_path / "in.parquet"), tmp_path / "out", output_format="parquet")
    assert first["prompt"] == turns and first["chosen"] == [{"role": "assistant", "content": "x"}]
    assert second["prompt"] == [{"role": "user", "content": "plain"}]
    assert json.loads(first["tools"]) == tools and second["tools"] is None
    train, _ = load_datasets(DataArguments(train=[DataSource(str(tmp_path / "out"))]))
    assert train[0]["tools"] == tools and not any(row.get("fault") for row in train)


@pytest.mark.parametrize("output_format", ["parquet", "jsonl"])
def test_tool_calls_of_any_arguments_reach_the_trainer(tmp_path, output_format):
    def turns(arguments):
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        asked = {"role": "assistant", "content": "", "tool_calls": [call]}
        return [{"role": "user", "content": "Look."}, asked, {"role": "tool", "content": "42"}]

    prompts = [turns(arguments) for arguments in ({"a": 1}, {"a": "x"}, {"b": [1]})]
    source = save(tmp_path / "in.parquet", *((p, [candidate("a", 1.0), candidate("b", 0.0)]) for p in prompts))
    path = run(BuildPairsArguments(source, str(tmp_path / "out"), plots=False, output_format=output_format))
    train, _ = load_datasets(DataArguments(train=[DataSource(str(path))]))
    assert train["prompt"][:] == prompts


def test_each_prompt_draws_with_its_own_seed(tmp_path):
    rows = [(f"q{n}", [candidate("best", 9.0), *(candidate(f"c{k}", k, k=k) for k in range(4))]) for n in range(30)]
    source = save(tmp_path / "in.jsonl", *rows)
    one = build(source, tmp_path / "one", policy="best_random")
    again = build(source, tmp_path / "two", policy="best_random")
    other = build(source, tmp_path / "three", policy="best_random", seed=7)
    assert one == again != other
    assert set(Counter(row["rejected"] for row in one)) == {"c0", "c1", "c2", "c3"}


def test_tables_are_preferred_to_their_means(tmp_path):
    record = make_record("p", "x", [candidate("a", 0.0), candidate("b", 0.0), candidate("c", 0.0)])
    record["tables"] = {"rm": [[0.0, 1.0, 1.0], [-1.0, 0.0, 9.0], [-1.0, -9.0, 0.0]]}
    write_records(tmp_path / "in.jsonl", [record])
    (row,) = build(str(tmp_path / "in.jsonl"), tmp_path / "out", policy="sppo")
    assert row["chosen"] == "a"
    (row,) = build(str(tmp_path / "in.jsonl"), tmp_path / "aggregate", policy="sppo", probabilities="aggregate")
    assert row["chosen"] == "b"


def test_which_scores(tmp_path):
    both = [
        make_candidate(text, source="s", scores={"one": score, "two": -score})
        for text, score in (("a", 1.0), ("b", 0.0))
    ]
    source = save(tmp_path / "both.jsonl", ("x", both))
    with pytest.raises(ValueError, match="choose one with --score: one, two"):
        build(source, tmp_path / "out")
    assert build(source, tmp_path / "out", score="two")[0]["chosen"] == "b"
    with pytest.raises(ValueError, match="no scores named 'three'"):
        build(source, tmp_path / "out2", score="three")
    bare = save(tmp_path / "bare.jsonl", ("x", [candidate("a", None), candidate("b", None)]))
    with pytest.raises(ValueError, match="run `prefopt rank` first"):
        build(bare, tmp_path / "out3")
    half = save(tmp_path / "half.jsonl", ("x", [candidate("a", 1.0), candidate("b", None)]))
    with pytest.raises(ValueError, match="'p0': candidate 1 has no score 'rm'"):
        build(half, tmp_path / "out4")


def test_no_pair_at_all_writes_nothing(tmp_path):
    source = save(
        tmp_path / "in.jsonl", ("tie", [candidate("a", 2.0), candidate("b", 2.0)]), ("alone", [candidate("a", 2.0)])
    )
    with pytest.raises(ValueError, match=f"none of 2 prompts gives a pair .*1 x {ALL_TIED}"):
        build(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pairs_of_another_format_are_not_left_beside(source, tmp_path):
    build(source, tmp_path / "out")
    with pytest.raises(ValueError, match=r"train\.parquet is there already"):
        run(BuildPairsArguments(source, str(tmp_path / "out"), output_format="jsonl"))


def test_a_score_that_is_not_finite_is_refused(tmp_path):
    row = {
        "prompt_id": "p7",
        "prompt": "x",
        "candidates": [{"text": "a", "scores": {"rm": 1e999}}, {"text": "b", "scores": {"rm": 1.0}}],
    }
    (tmp_path / "in.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match="a score is inf, not a finite number"):
        build(str(tmp_path / "in.jsonl"), tmp_path / "out")


def test_arguments_are_checked():
    for settings, message in (
        ({"policy": "best"}, "policy must be one of"),
        ({"candidates": ""}, "candidates is missing"),
        ({"keep": ["short"]}, "keep takes empty, duplicate, length"),
        (
            {"policy": "wpo_v2", "temperature": 2.0},
            "temperature is only read with policy best_worst or sppo or sppo_mean_logit or gpo",
        ),
        ({"seed": 1}, "seed is only read with policy best_random"),
        (
            {"policy": "sppo_paper", "include_self": False},
            "include_self is only read with policy sppo or sppo_mean_logit or gpo",
        ),
        ({"policy": "sppo", "temperature": 0.0}, "above 0"),
        ({"min_gap": -1.0}, "at least 0"),
        ({"hub_dataset_id": "me/pairs"}, "belong together"),
    ):
        with pytest.raises(ValueError, match=message):
            BuildPairsArguments(**{"candidates": "in", "output_dir": "out", **settings})


# --- the length-bias test
# ---------------------------------------------------------------------------------------------------------


def test_wilson_bound_by_hand():
    """p = 0.8, n = 100, z = 2: (0.8 + 0.02 - 2 sqrt(0.0016 + 0.0001)) / 1.04 = (0.82 - 0.0824621) / 1.04."""
    assert wilson_lower(80, 100, z=2.0) == pytest.approx((0.82 - 2 * 0.0017**0.5) / 1.04)
    assert wilson_lower(0, 0) == 0.0


def test_length_bias_needs_many_prompts_and_a_clear_share():
    assert length_bias(80, 100)["biased"]
    assert not length_bias(56, 100)["biased"]
    assert not length_bias(4, 4)["biased"]
    assert not length_bias(20, 100)["biased"]
    assert length_bias(0, 0)["share"] is None and not length_bias(0, 0)["biased"]


def test_pairs_of_one_prompt_are_one_observation_of_length(tmp_path):
    """Four answers make six pairs of one prompt; in the second, differences cancel; in the third, lengths agree."""
    rows = [
        ("q", [candidate("c" * (10 - k), -float(k)) for k in range(4)]),
        ("r", [candidate("aaaa", 2.0), candidate("bb", 1.0), candidate("cccc", 0.0)]),
        ("s", [candidate("aa", 1.0), candidate("bb", 0.0)]),
    ]
    pairs = build(save(tmp_path / "in.jsonl", *rows), tmp_path / "out", policy="all_pairs", plots=False)
    bias = report(tmp_path / "out")["length_bias"]
    assert len(pairs) == 10 and (bias["prompts"], bias["chosen_longer"], bias["share"]) == (1, 1, 1.0)


def test_the_warning_is_told(tmp_path, capsys):
    rows = [(f"q{n}", [candidate("longer answer", 1.0), candidate("short", 0.0)]) for n in range(40)]
    build(save(tmp_path / "in.jsonl", *rows), tmp_path / "out", plots=False)
    assert "warning: chosen is the longer answer for 100 % of 40 prompts (sign test" in capsys.readouterr().err
    assert "**Warning:**" in (tmp_path / "out" / "pairs_report.md").read_text()


# --- the command, and real data
# ---------------------------------------------------------------------------------------------------


def test_command_line(source, tmp_path, capsys):
    recipe = tmp_path / "pairs.yaml"
    recipe.write_text(f"candidates: {source}\noutput_dir: {tmp_path}/out\npolicy: sppo\nplots: false\n")
    assert main(["build-pairs", str(recipe), "--temperature", "2.0"]) == 0
    assert report(tmp_path / "out")["settings"]["temperature"] == 2.0
    without = [
        "build-pairs",
        "--candidates",
        source,
        "--output_dir",
        f"{tmp_path}/bare",
        "--keep",
        "length",
        "duplicate",
        "--plots",
        "false",
    ]
    assert main(without) == 0
    assert report(tmp_path / "bare")["settings"]["filters"] == ["empty"]
    assert main(["build-pairs", "--candidates", f"{tmp_path}/nothing", "--output_dir", f"{tmp_path}/x"]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("prefopt: error:") and not (tmp_path / "x").exists()


@pytest.mark.skipif(not REAL.exists(), reason="the candidate set is not there")
@pytest.mark.parametrize("size", [2, *(pytest.param(size, marks=pytest.mark.slow) for size in (3, 5, 7, 15))])
def test_real_candidates_by_every_policy(tmp_path, size):
    with gzip.open(REAL, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    records = [
        make_record(row["prompt_id"], row["prompt"], off_policy_candidates(row, ["candidates"])[:size]) for row in rows
    ]
    write_records(tmp_path / "in.parquet", records)
    texts = {r["prompt_id"]: {c["text"]: c["scores"]["win_prob"] for c in reversed(r["candidates"])} for r in records}
    for policy in POLICIES:
        folder = tmp_path / policy
        pairs = build(str(tmp_path / "in.parquet"), folder, policy=policy, plots=policy == "sppo")
        found = report(folder)
        assert len(pairs) == found["pairs"]
        assert found["prompts_with_pairs"] + sum(found["dropped_prompts"].values()) == found["prompts"] == 603
        for pair in pairs:
            scores = texts[pair["prompt_id"]]
            assert pair["chosen"] != pair["rejected"] and scores[pair["chosen"]] > scores[pair["rejected"]]
            if "chosen_win_prob" in pair:
                assert 0.5 / size <= pair["rejected_win_prob"] < pair["chosen_win_prob"] <= 1 - 0.5 / size
        train, _ = load_datasets(DataArguments(train=[DataSource(str(folder))]))
        blank = sum(not (pair["chosen"].strip() and pair["rejected"].strip()) for pair in pairs)
        # sppo_paper passes over nothing, so that the trainers count blank answers instead
        assert blank == 0 or policy == "sppo_paper"
        faults = Counter(row["fault"] for row in train if row.get("fault"))
        # both answers to one of the real prompts begin with its words, as answers that repeat a whole dialogue do
        assert faults.pop("completion repeats the prompt", 0) <= (policy == "all_pairs")
        assert len(train) == len(pairs) and sum(faults.values()) == blank
    kept = report(tmp_path / "wpo_v2")
    v1 = report(tmp_path / "best_worst")
    assert kept["pairs"] == v1["pairs"] and kept["characters"]["chosen"]["mean"] <= v1["characters"]["chosen"]["mean"]
    assert np.isfinite(list(v1["gap"].values())).all()


@pytest.mark.slow
@pytest.mark.skipif(not REAL.exists(), reason="the candidate set is not there")
@pytest.mark.parametrize("policy", ["wpo_v2", "best_random"])
def test_wpo_trains_on_the_pairs(tmp_path, policy):
    from prefopt import WPOConfig, WPOTrainer
    from tests.tiny import tiny_model, tiny_tokenizer

    with gzip.open(REAL, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file][:200]
    records = [
        make_record(row["prompt_id"], row["prompt"], off_policy_candidates(row, ["candidates"])[:5]) for row in rows
    ]
    write_records(tmp_path / "in.parquet", records)
    built = build(str(tmp_path / "in.parquet"), tmp_path / "pairs", policy=policy, plots=False)
    train, _ = load_datasets(DataArguments(train=[DataSource(str(tmp_path / "pairs"))]))
    tokenizer = tiny_tokenizer("llama3")
    args = WPOConfig(
        str(tmp_path / "out"),
        max_steps=4,
        per_device_train_batch_size=4,
        max_length=128,
        learning_rate=1e-3,
        report_to="none",
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        bf16=False,
    )
    trainer = WPOTrainer(
        tiny_model("llama", vocab_size=len(tokenizer)), args=args, train_dataset=train, processing_class=tokenizer
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    weights = [entry["wpo/weight_mean"] for entry in trainer.state.log_history if "wpo/weight_mean" in entry]
    assert len(losses) == 4 and np.isfinite(losses).all() and all(0 < weight <= 1 for weight in weights)
    # with both answers scored alike by policy and reference, each pair costs its weight times ln 2
    assert losses[0] == pytest.approx(weights[0] * np.log(2), rel=1e-3)
    print(f"WPO on {len(built)} pairs by {policy}: losses {[round(loss, 4) for loss in losses]}")
