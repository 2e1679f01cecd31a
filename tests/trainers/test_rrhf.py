"""The RRHF trainer: both terms by hand, whatever the batches; that it learns the order; what it refuses."""

import itertools

import pytest
import torch
from peft import LoraConfig

from prefopt import RRHFConfig, RRHFTrainer
from tests.trainers.comparisons import TOKENIZER, backbone, comparison_rows, dataset, losses, settings

ROWS = comparison_rows(12)


def make(tmp_path, rows=ROWS, *, model=None, peft_config=None, **changes):
    return RRHFTrainer(
        model or backbone(),
        args=RRHFConfig(**settings(tmp_path, **changes)),
        train_dataset=dataset(rows),
        processing_class=TOKENIZER,
        peft_config=peft_config,
    )


def loss_by_hand(model, tokenised, sft_coeff):
    """sum_{s_i < s_j} max(0, p_i - p_j) - c * log pi(best), the mean over prompts, from one forward per response."""
    total = 0.0
    for row in tokenised:
        sums, means = [], []
        for response in row["response_ids"]:
            sequence = torch.tensor([row["prompt_ids"] + response])
            with torch.no_grad():
                tokens = (
                    model(sequence).logits[0, :-1].log_softmax(-1).gather(1, sequence[0, 1:, None])[-len(response) :]
                )
            sums.append(tokens.sum().item())
            means.append(tokens.mean().item())
        for (p, s), (q, t) in itertools.permutations(zip(means, row["scores"]), 2):
            total += max(0.0, p - q) if s < t else 0.0
        total -= sft_coeff * sums[row["scores"].index(max(row["scores"]))]
    return total / len(tokenised)


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("sft_coeff", [0.0, 1.0, 0.3])
def test_the_logged_loss_is_rrhf(tmp_path, layout, sft_coeff):
    trainer = make(tmp_path, batch_layout=layout, per_device_train_batch_size=12, max_steps=1, sft_coeff=sft_coeff)
    expected = loss_by_hand(trainer.model.eval(), trainer.train_dataset, sft_coeff)
    assert expected > 0
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(expected, rel=1e-4)


def test_any_micro_batch_size_gives_the_same_model(tmp_path):
    runs = []
    for size, accumulation in ((8, 1), (1, 8)):
        trainer = make(tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation)
        trainer.train()
        runs.append((losses(trainer), list(trainer.model.parameters())))
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-5)
    for first, second in zip(runs[0][1], runs[1][1]):
        torch.testing.assert_close(first, second, atol=1e-4, rtol=0)


def test_the_ranking_term_alone_learns_the_order(tmp_path):
    trainer = make(tmp_path, max_steps=30, per_device_train_batch_size=12, learning_rate=1e-2, sft_coeff=0.0)
    before = trainer.evaluate(dataset(ROWS))
    trainer.train()
    after = trainer.evaluate(dataset(ROWS))
    assert before["eval_accuracy"] < 0.8 and after["eval_accuracy"] > 0.95
    assert after["eval_ranking_loss"] < 0.1 * before["eval_ranking_loss"]
    assert after["eval_loss"] == pytest.approx(after["eval_ranking_loss"])


def test_the_supervised_term_raises_the_best_response(tmp_path):
    best = {}
    for coeff in (0.0, 1.0):
        trainer = make(tmp_path, max_steps=10, per_device_train_batch_size=12, learning_rate=1e-2, sft_coeff=coeff)
        before = trainer.evaluate(dataset(ROWS))["eval_logps/best"]
        trainer.train()
        best[coeff] = trainer.evaluate(dataset(ROWS))["eval_logps/best"] - before
    assert best[1.0] > 15 and best[1.0] > best[0.0] + 10


def test_lora(tmp_path):
    trainer = make(tmp_path, peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), learning_rate=1e-2)
    trainer.train()
    assert losses(trainer)[-1] != pytest.approx(losses(trainer)[0])
    assert all("lora_" in name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad)


def test_what_is_refused_or_dropped(tmp_path):
    tied = {"prompt": "p", "responses": ["a", "b"], "scores": [1.0, 1.0]}
    assert make(tmp_path, [*ROWS, tied]).data.reports["train"].dropped == {"all scores tied": 1}
    with pytest.raises(ValueError, match="which RRHF does not read"):
        make(tmp_path, [{"prompt": "p", "chosen": "a", "rejected": "b", "margin": 1.0}])
    with pytest.raises(ValueError, match="are for reward models"):
        make(tmp_path, [{**row, "type": "apo"} for row in ROWS])
    with pytest.raises(ValueError, match=r"sft_coeff is -1\.0; it must be at least 0"):
        RRHFConfig(**settings(tmp_path, sft_coeff=-1.0))
