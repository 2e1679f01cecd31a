"""The quickstart: its preference set and rule, its measurements, and (slow) what WPO really changes, with three
seeds."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import measuring
import preferences
import pytest
import quickstart
import start_model
import torch
import yaml

from prefopt.files import read_json, read_jsonl
from tests.tiny import tiny_model, tiny_tokenizer

REPOSITORY = Path(__file__).resolve().parents[1]

QUESTIONS = preferences.all_questions()
ROSE = next(q for q in QUESTIONS if q.prompt == "What colour is a rose?")


def test_every_preferred_answer_wins_and_no_other_one_does():
    rng = random.Random(0)
    for question in QUESTIONS:
        firm, hedged = (preferences.answer(question, firm=style, rng=rng) for style in (True, False))
        for text in (firm, hedged):
            assert preferences.well_formed(question, text) and preferences.correct(question, text), text
        assert preferences.wins(question, firm) and not preferences.wins(question, hedged)


@pytest.mark.parametrize(
    ("text", "well_formed", "wins", "correct"),
    [
        ("A rose is red, without any doubt.", True, True, True),
        ("A rose is blue, without any doubt.", True, True, False),
        ("Well, I guess that a rose is red.", True, False, True),
        ("A tulip is red, without any doubt.", False, False, False),  # not what was asked about
        ("A rose is small, without any doubt.", False, False, False),  # another topic
        ("A rose red, without any doubt.", False, False, False),  # a word is missing
        ("A rose is red, without any doubt. A rose", False, False, True),
        ("A rose is red, without any doubt. [no end]", False, False, True),
        ("Well, I guess that a rose is red, without any doubt.", False, False, True),  # both styles at once
        ("", False, False, False),
    ],
)
def test_the_rule_refuses_garbled_answers(text, well_formed, wins, correct):
    assert preferences.well_formed(ROSE, text) is well_formed
    assert preferences.wins(ROSE, text) is wins
    assert preferences.correct(ROSE, text) is correct


def test_written_pairs_hold_out_their_prompts_and_balance_the_styles(tmp_path):
    held_out = quickstart.write_pairs(tmp_path, seed=3)
    train, test = list(read_jsonl(tmp_path / "train.jsonl")), list(read_jsonl(tmp_path / "test.jsonl"))
    assert (len(train), len(test)) == (1000, 200)
    prompts = [{row["prompt"][0]["content"] for row in rows} for rows in (train, test)]
    assert len(prompts[0]) == 1000 and len(prompts[1]) == 200 and not prompts[0] & prompts[1]
    assert [row["prompt"][0]["content"] for row in test] == [question.prompt for question in held_out]
    # both styles have four wordings, used about equally often, and about the same number of words
    openings = Counter(" ".join(row["rejected"][0]["content"].split()[:2]) for row in train)
    closings = Counter(row["chosen"][0]["content"].split(", ")[-1] for row in train)
    for counts in (openings, closings):
        assert len(counts) == 4 and min(counts.values()) > 200
    words = {
        side: sum(len(row[side][0]["content"].split()) for row in train) / 1000 for side in ("chosen", "rejected")
    }
    assert abs(words["chosen"] - words["rejected"]) < 1, words
    # another seed holds out other prompts
    quickstart.write_pairs(tmp_path / "other", seed=4)
    assert {row["prompt"][0]["content"] for row in read_jsonl(tmp_path / "other" / "test.jsonl")} != prompts[1]


def test_the_recipe_names_what_the_quickstart_writes():
    recipe = yaml.safe_load((REPOSITORY / quickstart.RECIPE).read_text())
    assert recipe["model_name_or_path"] == f"{quickstart.OUTPUTS}/quickstart-start"
    assert recipe["dataset_name"] == f"{quickstart.OUTPUTS}/quickstart-start/pairs"
    assert recipe["output_dir"] == f"{quickstart.OUTPUTS}/quickstart"
    assert recipe["beta"] == 1.0  # measuring.Measures.margin is in nats for this reason


def test_pair_logps_are_those_of_the_plain_forward(tmp_path):
    quickstart.write_pairs(tmp_path, seed=0)
    pairs = list(read_jsonl(tmp_path / "test.jsonl"))[:6]
    tokenizer = start_model.train_tokenizer(pairs)
    model = tiny_model(vocab_size=len(tokenizer))
    chosen, rejected = measuring.pair_logps(model, tokenizer, pairs)
    for pair, found in zip(pairs, zip(chosen, rejected)):
        for side, logp in zip(("chosen", "rejected"), found):
            prompt = tokenizer.apply_chat_template(pair["prompt"], add_generation_prompt=True)["input_ids"]
            ids = torch.tensor(tokenizer.apply_chat_template(pair["prompt"] + pair[side])["input_ids"])
            assert ids[: len(prompt)].tolist() == prompt and ids[-1] == tokenizer.eos_token_id
            with torch.no_grad():
                logps = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
            expected = logps.gather(-1, ids[1:, None])[len(prompt) - 1 :].sum()
            assert logp.item() == pytest.approx(expected.item(), abs=1e-4)


def test_an_answer_without_an_end_is_marked_and_counted(tmp_path):
    held_out = quickstart.write_pairs(tmp_path, seed=0)
    tokenizer = tiny_tokenizer("chatml")
    measures = measuring.measure(
        tiny_model(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id),
        tokenizer,
        tiny_model(vocab_size=len(tokenizer), seed=1, eos_token_id=tokenizer.eos_token_id),
        tmp_path / "test.jsonl",
        held_out,
    )
    # random weights garble everything: nothing is well formed, so nobody wins and every comparison is a tie
    assert measures.well_formed == measures.follows_rule == 0 and measures.win_rate == 0.5
    assert sum(text.endswith("[no end]") for text in measures.answers) > 150
    assert measures.margin != 0
    table = measuring.compare(measures, measures, held_out)
    assert held_out[0].prompt in table and "0.50    0.50" in table


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_wpo_improves_the_model_and_leaves_one_folder(seed, tmp_path):
    command = [sys.executable, "examples/quickstart/quickstart.py", "--seed", str(seed), "--outputs", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / "quickstart"
    figures = read_json(folder / "quickstart.json")
    print(f"\nquickstart: {figures}")
    before, after = figures["before"], figures["after"]
    assert 0.3 <= before["accuracy"] <= 0.7 and before["margin"] == pytest.approx(0, abs=1e-4)
    assert after["accuracy"] >= before["accuracy"] + 0.15
    assert after["win_rate"] >= before["win_rate"] + 0.05
    assert after["well_formed"] >= 0.85
    assert after["margin"] > 0.3
    # one folder with weights, and its recipe beside them
    assert [path.parent for path in tmp_path.rglob("*.safetensors")] == [folder]
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert recipe["learning_rate"] == 7e-5 and recipe["output_dir"] == str(folder) and recipe["seed"] == seed
    assert "preference accuracy" in done.stdout and "before:" in done.stdout and "prefopt check" in done.stdout
    assert "64/64" in done.stderr  # the progress bar of WPO
