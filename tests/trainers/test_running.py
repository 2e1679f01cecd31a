"""How a trainer runs: metrics of a log, the watch for non-finite losses, precision, checkpoints and their damage."""

from __future__ import annotations

import math

import pytest
import torch
from datasets import Dataset

import prefopt
from benchmarks.trajectories import COMMON, comparison_rows, make_model, make_tokenizer, pair_rows, scored
from prefopt.trainers.metrics import MetricLog
from tests.trainers.pairs import make_trainer, preference_rows, weights_of

ROWS = {
    "DPO": pair_rows,
    "WPO": pair_rows,
    "SPPO": pair_rows,
    "MultiReferenceDPO": pair_rows,
    "Reward": comparison_rows,
    "AdversarialReward": lambda: comparison_rows(adversarial=True),
    "GeneralPreference": comparison_rows,
    "RRHF": comparison_rows,
}


def any_trainer(tmp_path, name: str, *, model=None, trainer_options=None, **settings):
    """One of all trainers, on a tiny model and rows that it takes: four steps of two micro-batches."""
    rows = scored(pair_rows()) if name == "MultiReferenceDPO" else Dataset.from_list(ROWS[name]())
    config = getattr(prefopt, f"{name}Config")(str(tmp_path / "out"), **{**COMMON, **settings})
    return getattr(prefopt, f"{name}Trainer")(
        model or make_model(),
        args=config,
        train_dataset=rows,
        processing_class=make_tokenizer(),
        **(trainer_options or {}),
    )


# ---- metrics


class OnDevice(torch.Tensor):
    """A tensor that says that it lies on a GPU, where the host must not choose among values without waiting."""

    @property
    def device(self):
        return torch.device("cuda")


def test_a_step_without_a_kind_of_row_leaves_the_log_window_as_it_is():
    nan, inf = math.nan, math.inf
    steps = {
        "mean": [1.0, nan, 4.0],
        "least": [2.0, inf, 3.0],
        "most": [2.0, -inf, 3.0],
        "sum": [1.0, 2.0, 3.0],
        "none": 3 * [nan],
    }
    for make in (torch.tensor, lambda value: torch.tensor(value).as_subclass(OnDevice)):
        log = MetricLog()
        for step in range(3):
            log.append({name: make(values[step]) for name, values in steps.items()})
        folded = log.drain(minima=("least",), maxima=("most",), totals=("sum",))
        assert folded == {"mean": 2.5, "least": 2.0, "most": 3.0, "sum": 6.0}
        assert log.drain() == {}


# ---- losses that are not finite


def poison(trainer, *, call: int, make_bad):
    """Change the loss that the `call`-th micro-batch returns, and keep its rows."""
    step_loss, batches = trainer.step_loss, []

    def poisoned(model, batch, sums):
        loss, predictions = step_loss(model, batch, sums)
        batches.append(batch["row_ids"])
        return (make_bad(loss) if len(batches) == call else loss), predictions

    trainer.step_loss = poisoned
    return batches


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("name", ROWS)
def test_every_trainer_stops_before_a_loss_that_is_not_finite_reaches_the_weights(tmp_path, name, value):
    """The total is bad and the rows' losses are not: an SFT or auxiliary term, or an overflow of the sum."""
    before = any_trainer(tmp_path, name, max_steps=1, lr_scheduler_type="constant")
    before.train()
    trainer = any_trainer(tmp_path, name, max_steps=3, lr_scheduler_type="constant", logging_steps=3)
    batches = poison(trainer, call=3, make_bad=lambda loss: loss * value)  # the first half of the second step
    with pytest.raises(FloatingPointError, match="in step 2, in a term of no row") as error:
        trainer.train()
    assert batches[2][0] in str(error.value)
    assert torch.equal(weights_of(trainer.model), weights_of(before.model))


def test_the_rows_whose_loss_is_not_finite_are_named(tmp_path):
    trainer = make_trainer(tmp_path, "DPO", logging_steps=4)
    pair_losses = trainer.pair_losses
    bad = trainer.train_dataset[7]["row_id"]

    def poisoned(pair, reference, batch):
        hit = torch.tensor([row == bad for row in batch["row_ids"]])
        return pair_losses(pair, reference, batch).masked_fill(hit, float("nan"))

    trainer.pair_losses = poisoned
    with pytest.raises(FloatingPointError, match=rf"row\(s\) {bad} \(row_id\)"):
        trainer.train()
    assert bool(torch.isfinite(weights_of(trainer.model)).all())


def test_an_evaluation_names_rows_without_a_finite_loss_and_training_goes_on(tmp_path, capsys):
    options = {"eval_dataset": preference_rows(6, seed=3)}
    trainer = make_trainer(tmp_path, "DPO", trainer_options=options, max_steps=2, eval_strategy="steps", eval_steps=1)
    pair_losses = trainer.pair_losses
    bad = trainer.eval_dataset[2]["row_id"]

    def poisoned(pair, reference, batch):
        hit = torch.tensor([row == bad for row in batch["row_ids"]])
        return pair_losses(pair, reference, batch).masked_fill(hit, float("inf"))

    trainer.pair_losses = poisoned
    trainer.train()
    assert f"Evaluation: the loss is not finite in row(s) {bad} (row_id)." in capsys.readouterr().out
    assert trainer.state.global_step == 2


def test_training_twice_checks_each_step_once(tmp_path):
    trainer = make_trainer(tmp_path, "DPO", max_steps=2)
    trainer.train()
    poison(trainer, call=2, make_bad=lambda loss: loss * math.nan)
    with pytest.raises(FloatingPointError, match="in step 2"):
        trainer.train()
