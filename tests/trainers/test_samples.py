"""Completions of policy and reference during training, and TRL's callback for them."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig
from transformers import GenerationConfig
from trl import LogCompletionsCallback

from prefopt import RewardConfig, RewardTrainer, SampleCompletionsCallback
from prefopt.trainers.data_tables import as_html
from tests.tiny import tiny_model, tiny_tokenizer
from tests.trainers import comparisons
from tests.trainers.pairs import make_trainer, preference_rows

ROWS = preference_rows(12)
EVALUATION = {"trainer_options": {"eval_dataset": preference_rows(6, seed=1)}}


def sampled(trainer, **settings) -> SampleCompletionsCallback:
    callback = SampleCompletionsCallback(trainer, 3, max_new_tokens=6, **settings)
    trainer.add_callback(callback)
    return callback


def by_step(trainer) -> dict[int, list[dict]]:
    found: dict[int, list[dict]] = {}
    for line in open(f"{trainer.args.output_dir}/samples.jsonl"):
        row = json.loads(line)
        found.setdefault(row["step"], []).append(row)
    return found


def greedy(model, tokenizer, ids) -> str:
    """The completion by single forwards, without `generate`."""
    model.eval()
    whole = list(ids)
    for _ in range(6):
        with torch.no_grad():
            whole.append(int(model(input_ids=torch.tensor([whole])).logits[0, -1].argmax()))
        if whole[-1] in (tokenizer.eos_token_id, tokenizer.pad_token_id):
            break
    return tokenizer.decode(whole[len(ids) :], skip_special_tokens=True)


@pytest.mark.parametrize("adapter", [None, LoraConfig(target_modules=["q_proj", "v_proj"])])
def test_policy_and_reference_before_and_after(tmp_path, adapter, capsys):
    """At the start both are the policy's; at the end they are what single forwards of each model give."""
    options = {**EVALUATION["trainer_options"], **({} if adapter is None else {"peft_config": adapter})}
    trainer = make_trainer(
        tmp_path, "DPO", rows=ROWS, max_steps=3, learning_rate=3e-2, eval_strategy="steps", eval_steps=2,
        trainer_options=options,
    )  # fmt: skip
    callback = sampled(trainer)
    trainer.train()
    samples, tokenizer = by_step(trainer), trainer.processing_class
    assert sorted(samples) == [0, 2, 3] and all(len(rows) == 3 for rows in samples.values())
    assert [row["row_id"] for row in samples[3]] == trainer.eval_dataset["row_id"][:3]
    policy = [greedy(trainer.model, tokenizer, ids) for _, ids in callback.prompts]
    assert [row["policy"] for row in samples[3]] == policy
    assert [row["reference"] for row in samples[3]] == [row["reference"] for row in samples[0]]
    assert [row["reference"] for row in samples[0]] == [row["policy"] for row in samples[0]]
    assert callback._complete_reference() == [row["reference"] for row in samples[0]] != policy
    if adapter is None:
        reference = [greedy(trainer.ref_model, tokenizer, ids) for _, ids in callback.prompts]
        assert [row["reference"] for row in samples[3]] == reference != policy
    printed = capsys.readouterr().out
    assert "step 3, prompt:" in printed and "  policy:" in printed and "  reference:" in printed


def test_sampling_changes_no_number_of_the_run(tmp_path):
    """No random number is drawn, and dropout and packed attention go on as before."""
    weights = []
    for name in ("without", "with"):
        trainer = make_trainer(tmp_path / name, "WPO", rows=ROWS, max_steps=3, **EVALUATION)
        if name == "with":
            sampled(trainer)
        trainer.train()
        weights.append(torch.cat([p.flatten() for p in trainer.model.parameters()]))
    assert torch.equal(*weights)


def test_what_cannot_be_sampled_is_said_before_training(tmp_path):
    with pytest.raises(ValueError, match="give the trainer an `eval_dataset`"):
        SampleCompletionsCallback(make_trainer(tmp_path, "DPO", rows=ROWS))
    with pytest.raises(ValueError, match="must be at least 1"):
        SampleCompletionsCallback(make_trainer(tmp_path, "DPO", rows=ROWS, **EVALUATION), 0)
    rows = comparisons.dataset(comparisons.comparison_rows(8))
    config = RewardConfig(**comparisons.settings(tmp_path))
    reward = RewardTrainer(tiny_model(), config, rows, rows, tiny_tokenizer())
    with pytest.raises(ValueError, match="a reward or preference model writes none"):
        SampleCompletionsCallback(reward)


# ---- TRL's callback


def test_trls_callback_logs_completions_of_the_prompts_as_they_were_given(tmp_path):
    trainer = make_trainer(tmp_path, "DPO", rows=ROWS, max_steps=2, **EVALUATION)
    generation = GenerationConfig(max_new_tokens=3, do_sample=False)
    callback = LogCompletionsCallback(trainer, generation_config=generation, num_prompts=2, freq=1)
    trainer.add_callback(callback)
    trainer.train()
    assert [step for step, _, _ in callback.table] == ["1", "1", "2", "2"]
    given = EVALUATION["trainer_options"]["eval_dataset"]["prompt"][0][0]["content"]
    assert given in callback.table[0][1]


def test_trls_callback_fails_before_training_where_it_would_fail_in_it(tmp_path):
    rows = ROWS.map(lambda row: {side: row["prompt"] + row[side] for side in ("chosen", "rejected")})
    trainer = make_trainer(tmp_path, "DPO", rows=ROWS, trainer_options={"eval_dataset": rows.remove_columns("prompt")})
    with pytest.raises(ValueError, match=r"reads the column `prompt`.*SampleCompletionsCallback"):
        trainer.add_callback(LogCompletionsCallback(trainer, freq=1))
    trainer = make_trainer(tmp_path, "DPO", rows=ROWS, **EVALUATION)
    with pytest.raises(ValueError, match="needs `freq`"):
        trainer.add_callback(LogCompletionsCallback(trainer))


# ---- rows


def test_dropped_rows_have_reasons_and_the_others_stay_reachable(tmp_path, capsys):
    bad = {**ROWS[0], "chosen": [{"role": "assistant", "content": " "}]}
    rows = ROWS.from_list([ROWS[0], bad, *ROWS])
    trainer = make_trainer(tmp_path, "DPO", rows=rows)
    (row,) = trainer.dropped_rows("train")
    assert row["row"] == 1 and row["reason"] and row["row_id"]
    assert trainer.raw_rows("train")["chosen"] == [rows[n]["chosen"] for n in range(len(rows)) if n != 1]
    with pytest.raises(ValueError, match="There is no data set 'evil' here; there is 'train'"):
        trainer.dropped_rows("evil")
    shown = capsys.readouterr()
    assert shown.out.count("train: 14 rows read, 13 kept, 1 dropped") == 1
    assert "Warning: train: 1 of 14 rows are dropped" in shown.err
    again = make_trainer(tmp_path, "DPO", rows=trainer.train_dataset)
    assert "rows read" not in capsys.readouterr().out, "the table is shown once"
    assert again.dropped_rows("train") == [row] and len(again.raw_rows("train")) == 13
    html = as_html(trainer.tokenization_reports["train"], 64)
    assert html.startswith("<pre>train: 14 rows read") and "<strong>Warning:</strong> train: 1 of 14" in html


def test_a_default_beta_that_is_not_trls_is_said_once(tmp_path, capsys):
    import prefopt
    from prefopt.trainers import preference

    sentence = "beta is 0.01, the default of WPOConfig; TRL's DPOConfig has 0.1"
    preference._print_once.cache_clear()
    for beta, times in (({"beta": float("0.01")}, 0), ({}, 1), ({}, 0)):
        config = prefopt.WPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", **beta)
        prefopt.WPOTrainer(tiny_model(), args=config, train_dataset=ROWS, processing_class=tiny_tokenizer())
        assert capsys.readouterr().err.count(sentence) == times


@pytest.mark.parametrize("name", ["DPO", "Reward"])
def test_no_model_is_one_sentence(tmp_path, name):
    import prefopt

    config = getattr(prefopt, f"{name}Config")(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    with pytest.raises(ValueError, match="`model` is None"):
        getattr(prefopt, f"{name}Trainer")(None, args=config, train_dataset=ROWS, processing_class=tiny_tokenizer())
