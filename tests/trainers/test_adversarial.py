"""The adversarial reward trainer: weights of the two kinds of pair, whatever the batches; what it says; what it
refuses."""

import math

import pytest
import torch

from prefopt import AdversarialRewardConfig, AdversarialRewardTrainer
from prefopt.losses import adversarial_reward_loss
from prefopt.models.reward import RewardModel
from tests.trainers.comparisons import TOKENIZER, backbone, comparison_rows, dataset, losses, settings
from tests.trainers.test_reward import rewards_by_hand

HUMAN = [{**row, "type": None} for row in comparison_rows(12)]
ADVERSARIAL = [
    {
        "prompt": f"Ask {n // 4}: ",
        "responses": [f"the golden answer {n // 4}", f"sample {n} bad"],
        "scores": [1.0, 0.0],
        "type": "apo",
    }
    for n in range(8)
]
ROWS = [row for pair in zip(HUMAN, ADVERSARIAL) for row in pair] + HUMAN[8:]
HUMAN_PAIRS = sum(s > t for row in HUMAN for s in row["scores"] for t in row["scores"])


def make(tmp_path, rows=ROWS, *, evaluation=None, **changes):
    torch.manual_seed(0)
    return AdversarialRewardTrainer(
        RewardModel.from_module(backbone(), pooling="last"),
        args=AdversarialRewardConfig(**settings(tmp_path, **changes)),
        train_dataset=dataset(rows),
        eval_dataset=evaluation,
        processing_class=TOKENIZER,
    )


def loss_by_hand(model, rows, *, human, adversarial, kind):
    """Weighted terms over the count of all ranked pairs of both kinds."""
    total, count = 0.0, 0
    for row in rows:
        rewards = rewards_by_hand(model.eval(), row)
        for i, s in enumerate(row["scores"]):
            for j, t in enumerate(row["scores"]):
                if s > t:
                    gap = (rewards[i] - rewards[j]).item()
                    ranking = math.log1p(math.exp(-gap))
                    against = ranking if kind == "logistic" else -gap
                    total += adversarial * against if row["type"] else human * ranking
                    count += 1
    return total / count


@pytest.mark.parametrize(
    ("kind", "human", "coeff", "samples"),
    [("logistic", 1.0, 0.1, 4), ("difference", 1.0, 0.1, 4), ("logistic", 0.5, 2.0, 1), ("difference", 0.0, 1.0, 2)],
)
def test_the_logged_loss_weighs_each_pair(tmp_path, kind, human, coeff, samples):
    trainer = make(
        tmp_path,
        per_device_train_batch_size=20,
        max_steps=1,
        human_coeff=human,
        adversarial_coeff=coeff,
        num_samples=samples,
        adversarial_loss=kind,
    )
    expected = loss_by_hand(trainer.model, ROWS, human=human, adversarial=coeff / samples, kind=kind)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(expected, abs=2e-5)


def test_the_worked_example():
    """One human row with a gap of 1, one adversarial row with a gap of -1, weights 1 and 0.1 / 4:
    (0.3132617 + 0.025 * 1.3132617) / 2 = 0.1730466."""
    loss = adversarial_reward_loss(
        torch.tensor([[2.0, 1.0], [0.0, 1.0]]),
        torch.tensor([[1, 0], [1, 0]]),
        torch.tensor([False, True]),
        adversarial_coeff=0.1,
        num_samples=4,
    )
    assert loss.item() == pytest.approx(0.1730466, abs=1e-6)


def test_any_micro_batch_size_gives_the_same_model(tmp_path):
    """At micro-batch 1 each micro-batch is of one kind; the step still averages over all pairs of both."""
    runs = []
    for size, accumulation in ((20, 1), (1, 20)):
        trainer = make(
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            max_steps=2,
            adversarial_coeff=3.0,
            num_samples=1,
        )
        trainer.train()
        runs.append((losses(trainer), [p.detach().clone() for p in trainer.model.parameters()]))
    for each, weights in runs[1:]:
        assert each == pytest.approx(runs[0][0], abs=1e-5)
        for weight, reference in zip(weights, runs[0][1]):
            torch.testing.assert_close(weight, reference, atol=5e-5, rtol=0)


def test_it_says_the_effective_ratio(tmp_path, capsys):
    trainer = make(tmp_path, max_steps=1, adversarial_coeff=0.2, num_samples=4)
    assert trainer.effective_ratio == pytest.approx(0.05 * 8 / HUMAN_PAIRS)
    trainer.train()
    said = capsys.readouterr().out
    assert (
        f"{HUMAN_PAIRS} human pairs of weight 1, 8 adversarial pairs of weight 0.05 (0.2 / 4): adversarial to human = "
        in said
    )
    assert f"{0.4 / HUMAN_PAIRS:.3g}" in said


def test_metrics_of_each_kind(tmp_path):
    trainer = make(tmp_path, per_device_train_batch_size=20, max_steps=1)
    gaps = {"human": [], "adversarial": []}
    for row in ROWS:
        rewards = rewards_by_hand(trainer.model.eval(), row)
        for i, s in enumerate(row["scores"]):
            for j, t in enumerate(row["scores"]):
                if s > t:
                    gaps["adversarial" if row["type"] else "human"].append((rewards[i] - rewards[j]).item())
    trainer.train()
    step = trainer.state.log_history[0]
    for kind, values in gaps.items():
        assert step[f"accuracy/{kind}"] == pytest.approx(sum(value > 0 for value in values) / len(values))
        assert step[f"margin/{kind}"] == pytest.approx(sum(values) / len(values), abs=1e-5)
    assert step["adversarial_fraction"] == pytest.approx(8 / (8 + HUMAN_PAIRS))


def test_adversarial_pairs_are_learnt(tmp_path):
    """With a large weight the golden answers win within 20 steps."""
    trainer = make(
        tmp_path,
        per_device_train_batch_size=20,
        max_steps=20,
        learning_rate=1e-2,
        adversarial_coeff=8.0,
        num_samples=1,
        evaluation={"human": dataset(HUMAN), "adversarial": dataset(ADVERSARIAL)},
    )
    trainer.train()
    assert trainer.evaluate()["eval_adversarial_accuracy"] == 1.0


def test_what_is_refused(tmp_path):
    with pytest.raises(ValueError, match="No training row is adversarial"):
        make(tmp_path, HUMAN)
    with pytest.raises(ValueError, match="Every training row is adversarial; add human comparisons"):
        make(tmp_path, ADVERSARIAL)
    assert make(tmp_path, ADVERSARIAL, human_coeff=0.0).effective_ratio == math.inf
    with pytest.raises(ValueError, match="the adversarial loss does not read"):
        make(tmp_path, [{**row, "margin": 1.0} for row in ADVERSARIAL])
    for changes, message in (
        ({"num_samples": 0}, "num_samples is 0; it must be at least 1"),
        ({"adversarial_coeff": -1.0}, "adversarial_coeff is -1.0; it must be at least 0"),
        ({"human_coeff": -1.0}, "human_coeff is -1.0; it must be at least 0"),
        ({"adversarial_loss": "hinge"}, "adversarial_loss must be one of logistic, difference"),
    ):
        with pytest.raises(ValueError, match=message):
            AdversarialRewardConfig(**settings(tmp_path, **changes))


def test_an_evaluation_set_named_train_is_not_the_training_set(tmp_path):
    """Human rows alone may be evaluated under any name, and the training rows and their report stay as they are."""
    trainer = make(tmp_path, evaluation={"train": dataset(HUMAN), "test": dataset(ADVERSARIAL)}, max_steps=1)
    assert len(trainer.train_dataset) == len(ROWS) and trainer.data.reports["train"].rows_in == len(ROWS)
    assert trainer.data.reports["eval/train"].rows_in == len(HUMAN)
    trainer.train()
    metrics = trainer.evaluate(dataset(HUMAN), metric_key_prefix="train")
    assert metrics["train_ranked_pairs"] == HUMAN_PAIRS and len(trainer.train_dataset) == len(ROWS)
    assert trainer.evaluate()["eval_train_ranked_pairs"] == HUMAN_PAIRS
