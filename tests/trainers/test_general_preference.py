"""The general preference trainer: its loss, its terms, cyclic preferences, transitivity, and what it refuses."""

import itertools
import math

import numpy as np
import pytest
import torch

from prefopt import GeneralPreferenceConfig, GeneralPreferenceTrainer
from prefopt.evaluation.preference_metrics import transitivity
from prefopt.models.general_preference import GeneralPreferenceModel
from prefopt.models.reward import RewardModel
from tests.trainers.comparisons import TOKENIZER, backbone, comparison_rows, dataset, losses, pairs, settings

ROWS = comparison_rows(16)
PAIRS = pairs(ROWS)


def make(tmp_path, rows=ROWS, *, model=None, evaluation=None, seed=0, **changes):
    torch.manual_seed(seed)
    return GeneralPreferenceTrainer(
        model or backbone(),
        args=GeneralPreferenceConfig(**settings(tmp_path, **changes)),
        train_dataset=dataset(rows),
        eval_dataset=evaluation,
        processing_class=TOKENIZER,
    )


def ids_of(row, text):
    return TOKENIZER(row["prompt"] + text)["input_ids"] + [TOKENIZER.eos_token_id]


def loss_by_hand(trainer, rows, *, margins=None):
    """-log sigmoid((s - m) / tau), s by the 2x2 blocks, from one forward per response."""
    model, tau = trainer.headed.eval(), trainer.temperature
    terms = []
    for number, (row, tokenised) in enumerate(zip(rows, trainer.train_dataset)):
        vectors, scales = [], None
        for text in row["responses"]:
            sequence = torch.tensor([ids_of(row, text)])
            embedding, gate = model.embeddings(sequence, None, torch.tensor([len(tokenised["prompt_ids"])]))
            vectors.append(embedding[0].double())
            scales = torch.ones(len(embedding[0]) // 2).double() if gate is None else gate[0].double()
        for (v, s), (w, t) in itertools.permutations(zip(vectors, row["scores"]), 2):
            if s > t:
                score = sum(
                    scales[k] * (v[2 * k] * w[2 * k + 1] - v[2 * k + 1] * w[2 * k]) for k in range(len(v) // 2)
                )
                terms.append(math.log1p(math.exp(-(score.item() - (margins[number] if margins else 0)) / tau)))
    return sum(terms) / len(terms)


@pytest.mark.parametrize(
    ("layout", "head"),
    [
        ("packed", {"dim": 2}),
        ("packed", {"dim": 4, "normalize": True, "temperature": 0.5}),
        ("packed", {"dim": 6, "scale_gate": "softmax"}),
        ("padded", {"dim": 4, "scale_gate": "scaled_softmax", "normalize": True, "pooling": "last"}),
    ],
)
def test_the_logged_loss_is_the_preference_loss_of_the_step(tmp_path, layout, head):
    trainer = make(tmp_path, batch_layout=layout, per_device_train_batch_size=16, max_steps=1, **head)
    for name, weight in trainer.model.named_parameters():
        if "head" in name:
            torch.nn.init.normal_(weight, std=0.3)  # the heads start near zero
    expected = loss_by_hand(trainer, ROWS)
    assert abs(expected - math.log(2)) > 1e-3
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(expected, rel=1e-4)
    saved = {"dim": 2, "normalize": False, "scale_gate": None, "temperature": 0.1, "pooling": "eos", **head}
    trainer.save_model()
    assert GeneralPreferenceModel.from_pretrained(tmp_path).head_record.items() >= saved.items()


def test_margins(tmp_path):
    rows = [{**row, "responses": [row["chosen"], row["rejected"]], "scores": [1.0, 0.0]} for row in PAIRS]
    margins = [0.01 * number for number in range(16)]
    trainer = make(
        tmp_path, [{**row, "margin": m} for row, m in zip(PAIRS, margins)], per_device_train_batch_size=16, max_steps=1
    )
    expected = loss_by_hand(trainer, rows, margins=margins)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(expected, rel=1e-4)
    assert abs(expected - loss_by_hand(trainer, rows)) > 0.1


def test_any_micro_batch_size_gives_the_same_model(tmp_path):
    runs = []
    for size, accumulation, layout in ((16, 1, "packed"), (2, 8, "padded")):
        trainer = make(
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            batch_layout=layout,
            dim=4,
            scale_gate="softmax",
            sft_coeff=0.1,
        )
        trainer.train()
        runs.append((losses(trainer), {name: p.detach().clone() for name, p in trainer.model.named_parameters()}))
    for each, weights in runs[1:]:
        assert each == pytest.approx(runs[0][0], rel=1e-4)
        for name, weight in weights.items():
            torch.testing.assert_close(weight, runs[0][1][name], atol=1e-4, rtol=0)


def test_the_supervised_term(tmp_path):
    """(1 - c) * L + c * mean over rows of -log sigmoid(b * log pi(prompt and best response))."""
    lm = backbone()
    with torch.no_grad():
        lm.lm_head.weight.mul_(20)  # far from uniform
    expected_sft = []
    for row in ROWS:
        sequence = torch.tensor([ids_of(row, row["responses"][row["scores"].index(max(row["scores"]))])])
        with torch.no_grad():
            tokens = lm(sequence).logits[0, :-1].log_softmax(-1).gather(1, sequence[0, 1:, None])
        expected_sft.append(math.log1p(math.exp(-0.01 * tokens.sum().item())))
    trainer = make(tmp_path, model=lm, per_device_train_batch_size=16, max_steps=1, sft_coeff=0.25, sft_beta=0.01)
    preference = loss_by_hand(trainer, ROWS)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(0.75 * preference + 0.25 * np.mean(expected_sft), rel=1e-4)
    assert trainer.state.log_history[0]["sft_loss"] == pytest.approx(np.mean(expected_sft), rel=1e-4)


def test_bradley_terry_is_the_scalar_model_on_the_same_data(tmp_path):
    model = RewardModel.from_module(backbone(), pooling="eos")
    trainer = make(
        tmp_path,
        PAIRS,
        model=model,
        loss_type="bradley_terry",
        temperature=0.5,
        per_device_train_batch_size=16,
        max_steps=1,
    )
    terms = []
    for row in PAIRS:
        good, bad = (
            model.eval().rewards(torch.tensor([ids_of(row, row[side])])).item() for side in ("chosen", "rejected")
        )
        terms.append(math.log1p(math.exp(-(good - bad) / 0.5)))
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(np.mean(terms), rel=1e-4)
    metrics = trainer.evaluate(dataset(PAIRS))
    assert {"eval_mean_reward", "eval_score_length_correlation", "eval_ece_bin10"} <= set(metrics)


def cyclic_rows(prompts):
    """For each prompt three answers, each of which beats the next and loses to the one before: a > b > c > a."""
    answers = ["red", "green", "blue"]
    return [
        {"prompt": f"Question {n}: ", "chosen": answers[k], "rejected": answers[(k + 1) % 3]}
        for n in range(prompts)
        for k in range(3)
    ]


CYCLE = {
    "max_steps": 120,
    "per_device_train_batch_size": 24,
    "learning_rate": 1e-2,
    "pooling": "last",
    "logging_steps": 10,
}


def test_cyclic_preferences_are_learnt_by_gpm_and_not_by_bradley_terry(tmp_path):
    """No scalar orders more than two of the three pairs of a cycle, so Bradley-Terry is right in at most 2/3 of
    them, whatever it learns."""
    rows = cyclic_rows(8)
    gpm = make(tmp_path / "gpm", rows, dim=2, **CYCLE)
    gpm.train()
    general = gpm.evaluate(dataset(rows))
    bt = make(tmp_path / "bt", rows, loss_type="bradley_terry", **{**CYCLE, "max_steps": 15})
    bt.train()
    scalar = bt.evaluate(dataset(rows))
    assert general["eval_accuracy"] >= 0.99
    assert scalar["eval_accuracy"] <= 2 / 3 + 1e-9
    assert general["eval_transitivity/cyclic_triads"] == 1.0 and general["eval_transitivity/condorcet_winners"] == 0.0
    assert general["eval_transitivity/intransitive_share"] > 0.9
    assert scalar["eval_transitivity/cyclic_triads"] == 0.0 and scalar["eval_transitivity/intransitive_share"] < 1e-6
    assert general["eval_transitivity/tables"] == 8


def test_transitivity_of_known_tables():
    cycle = np.array([[0.0, 1, -1], [-1, 0, 1], [1, -1, 0]])
    scores = np.array([3.0, 1.0, 0.0, -2.0])
    ranking = scores[:, None] - scores[None, :]
    assert transitivity([cycle]) == {
        "cyclic_triads": 1.0,
        "condorcet_winners": 0.0,
        "intransitive_share": 1.0,
        "tables": 1.0,
    }
    found = transitivity([ranking])
    assert found == pytest.approx(
        {"cyclic_triads": 0.0, "condorcet_winners": 1.0, "intransitive_share": 0.0, "tables": 1.0}
    )
    both = transitivity([cycle, ranking, ranking[:2, :2]])  # 1 of 1 + 4 triples; energy 6 of 6 + 104
    assert both["cyclic_triads"] == pytest.approx(0.2) and both["tables"] == 2
    assert both["intransitive_share"] == pytest.approx(6 / (6 + (ranking**2).sum()))
    assert transitivity([ranking[:2, :2]]) == {}


def test_a_trained_model_is_continued_with_its_own_variant(tmp_path):
    folder = tmp_path / "first"
    trainer = make(folder, dim=4, normalize=True, scale_gate="softmax", temperature=0.3)
    trainer.train()
    trainer.save_model()
    again = make(tmp_path / "second", model=str(folder))
    assert again.headed.head_record == trainer.headed.head_record and again.temperature == 0.3
    torch.testing.assert_close(again.headed.value_head.weight, trainer.headed.value_head.weight)
    with pytest.raises(ValueError, match="trained with dim=4"):
        make(tmp_path / "third", model=str(folder), dim=8)


def test_what_is_refused(tmp_path):
    for changes, message in (
        ({"dim": 3}, "positive even number, got 3"),
        ({"loss_type": "regression"}, "loss_type must be one of general_preference, bradley_terry"),
        ({"loss_type": "bradley_terry", "dim": 4}, "`dim` has no meaning for loss_type 'bradley_terry'"),
        ({"loss_type": "bradley_terry", "sft_coeff": 0.1}, "`sft_coeff` has no meaning"),
        ({"sft_coeff": 1.0}, "sft_coeff is 1.0; it must be below 1"),
        ({"temperature": 0.0}, "temperature is 0.0; it must be above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            make(tmp_path, **changes)
    with pytest.raises(ValueError, match="this trainer and its settings need a GeneralPreferenceModel"):
        make(tmp_path, model=RewardModel.from_module(backbone()))
    for loss_type in ("general_preference", "bradley_terry"):
        with pytest.raises(ValueError, match="1 of 17 rows of the train set are adversarial"):
            rows = [{**row, "type": None} for row in ROWS]
            make(tmp_path, [*rows, {**rows[0], "type": "apo"}], loss_type=loss_type)
    with pytest.raises(ValueError, match="`lm_head=True` contradicts the given model"):
        make(tmp_path, model=GeneralPreferenceModel.from_module(backbone()), sft_coeff=0.1)
