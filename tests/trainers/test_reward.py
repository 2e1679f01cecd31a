"""The reward trainer: what it optimises, whatever the batches; what it reports; what it saves; what it refuses."""

import math

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForSequenceClassification

from prefopt import RewardConfig, RewardTrainer
from prefopt.evaluation.calibration import calibration_errors
from prefopt.losses import bradley_terry_loss
from prefopt.models.reward import RewardModel
from tests.trainers.comparisons import TOKENIZER, backbone, comparison_rows, dataset, losses, pairs, settings
from tests.trainers.pairs import logged_names

ROWS = comparison_rows(24)


def make(tmp_path, rows=ROWS, *, model=None, pooling="last", peft_config=None, evaluation=None, **changes):
    if model is None:
        torch.manual_seed(0)
        model = RewardModel.from_module(backbone(), pooling=pooling)
    return RewardTrainer(
        model,
        args=RewardConfig(**settings(tmp_path, **changes)),
        train_dataset=dataset(rows),
        eval_dataset=evaluation,
        processing_class=TOKENIZER,
        peft_config=peft_config,
    )


def rewards_by_hand(model, row):
    """One forward per response, nothing padded or packed."""
    return [
        model.rewards(torch.tensor([TOKENIZER(row["prompt"] + text)["input_ids"] + [TOKENIZER.eos_token_id]]))[0]
        for text in row["responses"]
    ]


def ranking_by_hand(model, rows):
    """-log sigmoid(r_i - r_j) over all pairs with s_i > s_j of all rows, and their mean."""
    terms = []
    for row in rows:
        rewards = rewards_by_hand(model.eval(), row)
        for i, first in enumerate(row["scores"]):
            for j, second in enumerate(row["scores"]):
                if first > second:
                    terms.append(math.log1p(math.exp(-(rewards[i] - rewards[j]).item())))
    return sum(terms) / len(terms), len(terms)


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("pooling", ["last", "eos"])
def test_the_logged_loss_is_the_ranking_loss_of_the_step(tmp_path, layout, pooling):
    trainer = make(tmp_path, pooling=pooling, batch_layout=layout, per_device_train_batch_size=24, max_steps=1)
    expected, _ = ranking_by_hand(trainer.model, ROWS)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_poolings_that_read_every_token_are_padded_and_right(tmp_path, pooling):
    trainer = make(tmp_path, pooling=pooling, per_device_train_batch_size=24, max_steps=1)
    assert trainer.layout.name == "padded"
    expected, _ = ranking_by_hand(trainer.model, ROWS)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(expected, abs=2e-5)
    with pytest.raises(ValueError, match="reads whole rows"):
        make(tmp_path, pooling=pooling, batch_layout="packed")


def test_division_into_micro_batches_and_layout_change_nothing(tmp_path):
    """Rows have 1 to 6 ranked pairs, so that means of micro-batch means would differ; every split gives the same
    weights."""
    runs = {}
    for layout in ("packed", "padded"):
        for size, accumulation in ((8, 1), (2, 4)):
            trainer = make(
                tmp_path,
                batch_layout=layout,
                max_steps=2,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=accumulation,
            )
            trainer.train()
            runs[layout, size] = losses(trainer), {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    reference_losses, reference = runs["padded", 8]
    start = dict(RewardModel.from_module(backbone()).named_parameters())["model.layers.0.mlp.up_proj.weight"]
    assert (reference["model.layers.0.mlp.up_proj.weight"] - start).abs().max() > 1e-4
    for each, weights in runs.values():
        assert each == pytest.approx(reference_losses, abs=1e-5)
        for name, weight in weights.items():
            torch.testing.assert_close(weight, reference[name], atol=5e-5, rtol=0)


def test_a_last_step_with_fewer_rows_than_micro_batches_uses_each_row_once(tmp_path):
    rows = ROWS[:9]  # steps of 8 and of 1 row: three of four micro-batches are fillers
    trainer = make(
        tmp_path,
        rows,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        max_steps=-1,
        num_train_epochs=1,
        learning_rate=0.0,
    )
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    expected, count = ranking_by_hand(trainer.model, rows)
    sizes = [8, 1]
    plan = trainer.get_train_dataloader().batch_sampler
    counts = [plan.step(0, step)[0][0].step_ranked_pairs for step in (0, 1)]
    assert len(logged) == len(sizes) and sum(counts) == count
    total = sum(entry["loss"] * number for entry, number in zip(logged, counts)) / count
    assert total == pytest.approx(expected, abs=2e-5)


def test_pairs_with_margins_are_bradley_terry_with_a_margin(tmp_path):
    rows = [{**row, "margin": 0.1 * number} for number, row in enumerate(pairs(ROWS))]
    trainer = make(tmp_path, rows, per_device_train_batch_size=24, max_steps=1)
    table = [{**row, "responses": [row["chosen"], row["rejected"]]} for row in rows]
    rewards = torch.tensor([rewards_by_hand(trainer.model.eval(), row) for row in table])
    margin = torch.tensor([row["margin"] for row in rows])
    expected = bradley_terry_loss(rewards[:, 0], rewards[:, 1], margin=margin).mean()
    without = bradley_terry_loss(rewards[:, 0], rewards[:, 1]).mean()
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(expected.item(), abs=2e-5)
    assert abs(expected - without) > 0.1
    with pytest.raises(ValueError, match="have no margin; give all of them one, or none"):
        make(tmp_path, [*rows[:3], {**rows[3], "margin": None}])
    with pytest.raises(ValueError, match="a margin belongs to one pair"):
        make(tmp_path, [{**row, "margin": 1.0} for row in ROWS])


def test_metric_names_and_values(tmp_path):
    sets = {"first": dataset(ROWS[:10]), "second": dataset(ROWS[10:])}
    trainer = make(
        tmp_path,
        evaluation=sets,
        calibration_bins=[5, 10],
        reliability_diagram=True,
        eval_strategy="steps",
        eval_steps=3,
    )
    trainer.train()
    step = trainer.state.log_history[0]
    assert logged_names(step) == {
        "loss", "grad_norm", "learning_rate", "epoch", "step", "accuracy", "margin",
        "mean_reward", "min_reward", "max_reward", "num_tokens", "perf/peak_memory_gib", "perf/tokens_per_second",
        "perf/updates_lost",
    }  # fmt: skip
    evaluated = next(entry for entry in trainer.state.log_history if "eval_first_loss" in entry)
    names = {
        "loss",
        "accuracy",
        "margin",
        "mean_reward",
        "min_reward",
        "max_reward",
        "ranked_pairs",
        "score_length_correlation",
    }
    names |= {f"{error}_bin{bins}" for error in ("ece", "ace", "mce") for bins in (5, 10)}
    assert {name.removeprefix("eval_first_") for name in evaluated} >= names

    rewards = [rewards_by_hand(trainer.model.eval(), row) for row in ROWS[:10]]
    expected, count = ranking_by_hand(trainer.model, ROWS[:10])
    gaps = [
        (r[i] - r[j]).item()
        for r, row in zip(rewards, ROWS)
        for i, s in enumerate(row["scores"])
        for j, t in enumerate(row["scores"])
        if s > t
    ]
    everything = [value.item() for r in rewards for value in r]
    lengths = [len(ids) for row in trainer.eval_dataset["first"] for ids in row["response_ids"]]
    p = 1 / (1 + np.exp(-np.array(gaps + [-gap for gap in gaps])))
    errors = calibration_errors(p, [1] * count + [0] * count, num_bins=5)
    assert evaluated["eval_first_ranked_pairs"] == count
    assert evaluated["eval_first_loss"] == pytest.approx(expected, abs=1e-4)
    assert evaluated["eval_first_accuracy"] == pytest.approx(np.mean(np.array(gaps) > 0))
    assert evaluated["eval_first_mean_reward"] == pytest.approx(np.mean(everything), abs=1e-5)
    assert evaluated["eval_first_max_reward"] == pytest.approx(max(everything), abs=1e-5)
    assert evaluated["eval_first_score_length_correlation"] == pytest.approx(
        np.corrcoef(everything, lengths)[0, 1], abs=1e-4
    )
    assert evaluated["eval_first_ece_bin5"] == pytest.approx(errors.ece, abs=1e-4)
    assert (tmp_path / "reliability_first.png").is_file() and (tmp_path / "reliability_second.png").is_file()


def test_evaluation_does_not_depend_on_the_batch_size(tmp_path):
    results = [make(tmp_path, per_device_eval_batch_size=size).evaluate(dataset(ROWS)) for size in (1, 5, 24)]
    for name in ("eval_loss", "eval_accuracy", "eval_mean_reward", "eval_ece_bin10", "eval_score_length_correlation"):
        assert results[1][name] == pytest.approx(results[0][name], abs=1e-5)
        assert results[2][name] == pytest.approx(results[0][name], abs=1e-5)


def test_compute_metrics_sees_best_and_worst(tmp_path):
    seen = {}
    trainer = make(tmp_path, evaluation=dataset(ROWS))
    trainer.compute_metrics = lambda prediction: seen.update(p=prediction.predictions) or {"mine": 1.0}
    assert trainer.evaluate()["eval_mine"] == 1.0
    expected = {
        (
            round(r[row["scores"].index(max(row["scores"]))].item(), 4),
            round(r[row["scores"].index(min(row["scores"]))].item(), 4),
        )
        for row in ROWS
        for r in [rewards_by_hand(trainer.model.eval(), row)]
    }
    assert seen["p"].shape == (24, 2) and {tuple(round(float(x), 4) for x in row) for row in seen["p"]} == expected


def test_resuming_equals_not_stopping(tmp_path):
    whole = make(tmp_path / "whole", max_steps=6)
    whole.train()
    make(tmp_path / "part", max_steps=6, save_strategy="steps", save_steps=3).train()
    resumed = make(tmp_path / "part", max_steps=6, save_strategy="steps", save_steps=3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-3"))
    assert losses(resumed)[-3:] == pytest.approx(losses(whole)[-3:], abs=1e-6)
    again = RewardModel.from_pretrained(tmp_path / "part" / "checkpoint-6")
    torch.testing.assert_close(again.score.weight, whole.model.score.weight, atol=1e-6, rtol=0)


def test_the_saved_model_loads_as_a_sequence_classifier(tmp_path):
    trainer = make(tmp_path, pooling="eos")
    trainer.train()
    trainer.save_model()
    ours = RewardModel.from_pretrained(tmp_path).eval()
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    ids = torch.tensor([TOKENIZER("a question and its answer")["input_ids"] + [TOKENIZER.eos_token_id]])
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits[:, 0], ours.rewards(ids), atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.rewards(ids), trainer.model.eval().rewards(ids), atol=1e-6, rtol=1e-5)


def test_lora_trains_adapter_and_head_and_loads_merged(tmp_path):
    folder = tmp_path / "base"
    backbone().save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    trainer = RewardTrainer(
        str(folder),
        args=RewardConfig(**settings(tmp_path / "lora", pooling="last", gradient_checkpointing=True)),
        train_dataset=dataset(ROWS),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS"),
    )
    trainable = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or "modules_to_save" in name for name in trainable)
    assert sum("score.modules_to_save" in name for name in trainable) == 1
    expected, _ = ranking_by_hand(trainer.model.get_base_model(), ROWS)
    trainer.train()
    assert losses(trainer)[-1] != pytest.approx(expected, abs=1e-3)
    trainer.save_model()
    assert isinstance(trainer.model, PeftModel)
    merged = RewardModel.from_pretrained(tmp_path / "lora").eval()
    assert merged.head_record["pooling"] == "last" and not isinstance(merged, PeftModel)
    for row in ROWS[:3]:
        ours, theirs = rewards_by_hand(trainer.model.eval().get_base_model(), row), rewards_by_hand(merged, row)
        torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), atol=1e-5, rtol=0)


def test_an_adapter_on_top_of_an_adapter_keeps_both(tmp_path):
    """A model with an adapter is trained on with another: what is loaded is what was trained, pooling included."""
    backbone().save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    previous, pooling = tmp_path / "base", "last"
    for name in ("first", "second"):
        args = RewardConfig(**settings(tmp_path / name, pooling=pooling, learning_rate=1e-2))
        trainer = RewardTrainer(str(previous), args=args, train_dataset=dataset(ROWS), peft_config=adapter)
        assert trainer.headed.head_record["pooling"] == "last"
        trainer.train()
        trainer.save_model()
        loaded = RewardModel.from_pretrained(tmp_path / name).eval()
        for row in ROWS[:3]:
            ours, theirs = (rewards_by_hand(model.eval(), row) for model in (trainer.headed, loaded))
            torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), atol=1e-5, rtol=0)
        previous, pooling = tmp_path / name, None
    with pytest.raises(ValueError, match="was trained with pooling='last', but pooling='mean' was asked for"):
        RewardModel.from_pretrained(tmp_path / "second", pooling="mean")


def test_an_adapter_of_a_model_in_memory_says_so_when_it_is_loaded(tmp_path):
    trainer = make(tmp_path, peft_config=LoraConfig(r=4, target_modules=["q_proj"]))
    trainer.save_model()
    with pytest.raises(ValueError, match="does not say which model its adapter belongs to"):
        RewardModel.from_pretrained(tmp_path)


def test_training_orders_the_responses(tmp_path):
    """ "good" answers beat "bad" ones: learnt within 30 steps, also for prompts that were not trained on."""
    rows = [
        {"prompt": f"Question {n}: ", "chosen": f"{a} good {b}", "rejected": f"{a} bad {b}"}
        for n, (a, b) in enumerate(
            (a, b) for a in ("red", "blue", "old", "new") for b in ("small", "green", "fine", "awful")
        )
    ]
    held_out = [
        {"prompt": "Something else: ", "chosen": f"{a} good", "rejected": f"{a} bad"} for a in ("red", "old", "small")
    ]
    trainer = make(tmp_path, rows, pooling="eos", max_steps=30, learning_rate=5e-3, per_device_train_batch_size=8)
    trainer.train()
    assert trainer.evaluate(dataset(held_out))["eval_accuracy"] == 1.0


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ({"prompt": "p", "responses": ["a"], "scores": [1.0]}, "fewer than two responses"),
        ({"prompt": "p", "responses": ["a", "b"], "scores": [1.0, 1.0]}, "all scores tied"),
        ({"prompt": "p", "responses": ["a", "b"], "scores": [1.0]}, "unequal numbers of responses and scores"),
        ({"prompt": "p", "responses": ["a", " "], "scores": [1.0, 0.0]}, "empty response"),
    ],
)
def test_rows_that_rank_nothing_are_dropped_and_counted_or_refused(tmp_path, rows, reason):
    trainer = make(tmp_path, [*ROWS, rows])
    assert trainer.data.reports["train"].dropped == {reason: 1} and len(trainer.train_dataset) == len(ROWS)
    with pytest.raises(ValueError, match=f"Row 24 of the train set: {reason}"):
        make(tmp_path, [*ROWS, rows], on_bad_row="raise")


def test_rows_with_a_separator(tmp_path):
    rows = [{"text": [f"{r['prompt']}<sep>{text}" for text in r["responses"]], "scores": r["scores"]} for r in ROWS]
    broken = {"text": ["no separator", "p<sep>b"], "scores": [1.0, 0.0]}
    trainer = make(tmp_path, [*rows, broken], per_device_train_batch_size=24, max_steps=1)
    assert trainer.data.reports["train"].dropped == {"not exactly one <sep>": 1}
    expected, _ = ranking_by_hand(trainer.model, ROWS)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(expected, abs=2e-5)


def test_adversarial_rows_are_refused(tmp_path):
    marked = {**ROWS[0], "type": "apo"}
    plain = [{**row, "type": None} for row in ROWS]
    with pytest.raises(
        ValueError, match=r"1 of 25 rows of the train set are adversarial .* use AdversarialRewardTrainer"
    ):
        make(tmp_path, [*plain, marked])
    with pytest.raises(ValueError, match="2 of 2 rows of the eval set are adversarial"):
        make(tmp_path, evaluation=dataset([marked, marked]))


def test_settings_that_cannot_work_are_refused(tmp_path):
    model = RewardModel.from_module(backbone(), pooling="last")
    with pytest.raises(ValueError, match="`pooling='mean'` contradicts the given model, which has 'last'"):
        RewardTrainer(
            model,
            args=RewardConfig(**settings(tmp_path, pooling="mean")),
            train_dataset=dataset(ROWS),
            processing_class=TOKENIZER,
        )
    for changes, message in (
        ({"pooling": "median"}, "Unknown pooling 'median'"),
        ({"calibration_bins": [0]}, "`calibration_bins` must be positive"),
        ({"calibration_bins": [], "reliability_diagram": True}, "needs `calibration_bins`"),
        ({"center_rewards_coefficient": 0.01}, "`center_rewards_coefficient=0.01` is not supported"),
    ):
        with pytest.raises(ValueError, match=message):
            RewardTrainer(
                backbone(),
                args=RewardConfig(**settings(tmp_path, **changes)),
                train_dataset=dataset(ROWS),
                processing_class=TOKENIZER,
            )


def test_a_sequence_classifier_in_memory_keeps_its_head(tmp_path):
    config = backbone().config
    config.num_labels = 1
    torch.manual_seed(5)
    theirs = AutoModelForSequenceClassification.from_config(config, attn_implementation="sdpa")
    trainer = make(tmp_path, model=theirs)
    torch.testing.assert_close(trainer.model.score.weight, theirs.score.weight)
    assert trainer.model.model is theirs.model and trainer.model.head_record["pooling"] == "eos"


def test_the_row_of_a_margin_that_is_not_finite_is_named(tmp_path):
    rows = [{**row, "margin": 0.5} for row in pairs(ROWS)]
    trainer = make(tmp_path, rows, per_device_train_batch_size=24)
    spoilt = trainer.train_dataset[5]["row_id"]
    margins = [math.nan if row == spoilt else 0.5 for row in trainer.train_dataset["row_id"]]
    trainer.train_dataset = trainer.train_dataset.remove_columns("margin").add_column("margin", margins)
    with pytest.raises(FloatingPointError, match=rf"row\(s\) {spoilt} \(row_id\)"):
        trainer.train()
