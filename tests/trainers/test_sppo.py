"""The SPPO and GPO trainer: the logged loss is the equation, and everything it logs; what it needs; what it
refuses."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from datasets import Dataset

from prefopt import losses
from prefopt.trainers.sppo import SELF_PLAY_LOSSES
from tests.tiny import tiny_model
from tests.trainers.pairs import (
    Seen,
    history,
    logged_names,
    make_trainer,
    plain_pair_logps,
    preference_rows,
    weights_of,
)
from tests.trainers.test_preference import OUR_METRICS, TRL_METRICS, WPO_METRICS

BETA = 0.05
SELF_PLAY_METRICS = {"loss_normalized", "logratios/chosen", "logratios/rejected", "targets/chosen", "targets/rejected"}


def rows(count=24):
    """Pairs with every column that a self-play loss may read."""
    pairs = preference_rows(count)
    grid = [(index * 7 % count) / count for index in range(count)]
    columns = {
        "chosen_win_prob": [0.5 + value / 2 for value in grid],
        "rejected_win_prob": [value / 3 for value in reversed(grid)],
        "chosen_over_rejected_prob": [0.6 + value / 3 for value in grid],
        "chosen_score": [4 * value for value in grid],
        "rejected_score": [-3 * value for value in reversed(grid)],
    }
    for name, values in columns.items():
        pairs = pairs.add_column(name, values)
    return pairs


def by_hand(loss_type, chosen, rejected, batch, max_target=None):
    """The loss of each pair and its two targets, written out again in float64."""
    value = {name: batch[name].double() for name in batch if name.endswith(("_prob", "_score"))}
    if loss_type == "sppo":
        targets = (value["chosen_win_prob"] - 0.5) / BETA, (value["rejected_win_prob"] - 0.5) / BETA
    elif loss_type == "sppo_single":
        target = (value["chosen_over_rejected_prob"] - 0.5) / BETA
        targets = target, -target
    elif loss_type == "sppo_hard":
        targets = torch.full_like(chosen, 0.5 / BETA), torch.full_like(chosen, -0.5 / BETA)
    else:
        targets = value["chosen_score"] / BETA, value["rejected_score"] / BETA
        if max_target is not None:
            targets = tuple(target.clip(-max_target, max_target) for target in targets)
    factor = 1.0 if loss_type == "sppo_hard" else 0.5
    return factor * ((chosen - targets[0]) ** 2 + (rejected - targets[1]) ** 2), targets


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize(
    ("loss_type", "settings"),
    [("sppo", {}), ("sppo_single", {}), ("sppo_hard", {}), ("gpo", {}), ("gpo", {"max_target": 20.0})],
    ids=str,
)
def test_what_is_logged_is_the_equation_on_that_batch(tmp_path, loss_type, settings, layout):
    """Loss, targets and log-ratios of each of three steps, from the models' own logits."""
    initial = tiny_model(seed=3)
    weights = []
    trainer = make_trainer(
        tmp_path,
        "SPPO",
        model=copy.deepcopy(initial),
        rows=rows(),
        batch_layout=layout,
        loss_type=loss_type,
        beta=BETA,
        max_steps=3,
        **settings,
    )
    seen = Seen()
    seen.watch(trainer)
    step_loss = trainer.step_loss

    def keep(model, batch, sums):
        weights.append(copy.deepcopy(trainer.model.state_dict()))
        return step_loss(model, batch, sums)

    trainer.step_loss = keep
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    for step, batch in enumerate(seen.batches):
        policy = tiny_model(seed=3)
        policy.load_state_dict(weights[step])
        pairs = [plain_pair_logps(model, trainer.train_dataset, batch["row_ids"]) for model in (policy, initial)]
        chosen, rejected = ((mine - base).detach().double() for mine, base in zip(*pairs))
        chosen, rejected = chosen.detach(), rejected.detach()
        expected, targets = by_hand(loss_type, chosen, rejected, batch, settings.get("max_target"))
        logged = entries[step]
        assert logged["loss"] == pytest.approx(float(expected.mean()), rel=1e-5)
        assert logged["loss_normalized"] == pytest.approx(BETA**2 * float(expected.mean()), rel=1e-5)
        assert logged["logratios/chosen"] == pytest.approx(float(chosen.mean()), abs=1e-4)
        assert logged["logratios/rejected"] == pytest.approx(float(rejected.mean()), abs=1e-4)
        assert logged["targets/chosen"] == pytest.approx(float(targets[0].mean()), rel=1e-5)
        assert logged["targets/rejected"] == pytest.approx(float(targets[1].mean()), rel=1e-5)
        if settings:
            bounded = torch.stack(targets).abs() >= 20.0
            assert logged["targets/bounded_fraction"] == pytest.approx(float(bounded.double().mean()))
    assert (
        float((chosen - 0).abs().max()) > 0.1
    )  # the policy has left its reference, so that the ratios above say something


def test_a_step_moves_log_ratios_towards_their_targets(tmp_path):
    """chosen (win probability above 1/2) becomes likelier and rejected less so, and the loss falls."""
    trainer = make_trainer(tmp_path, "SPPO", rows=rows(4), beta=BETA, max_steps=40, learning_rate=3e-3)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logged[-1]["logratios/chosen"] > 0.5 and logged[-1]["logratios/rejected"] < -0.5
    assert logged[-1]["loss_normalized"] < logged[0]["loss_normalized"]


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({}, {"win_prob/chosen", "win_prob/rejected"}),
        ({"loss_type": "sppo_single"}, {"win_prob/chosen_over_rejected"}),
        ({"loss_type": "sppo_hard"}, set()),
        ({"loss_type": "gpo", "max_target": 9.0}, {"score/chosen", "score/rejected", "targets/bounded_fraction"}),
        ({"use_weighting": True}, {"win_prob/chosen", "win_prob/rejected", *WPO_METRICS}),
    ],
    ids=["sppo", "sppo_single", "sppo_hard", "gpo", "weighted"],
)
def test_metric_names_are_exactly_these(tmp_path, settings, names):
    data = rows()
    trainer = make_trainer(
        tmp_path, "SPPO", rows=data, max_steps=1, trainer_options={"eval_dataset": data.select(range(5))}, **settings
    )
    trainer.train()
    (entry,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logged_names(entry) == TRL_METRICS | OUR_METRICS | SELF_PLAY_METRICS | names
    evaluated = trainer.evaluate()
    assert {f"eval_{name}" for name in {"loss", *SELF_PLAY_METRICS, *names}} <= set(evaluated)
    assert evaluated["eval_loss_normalized"] == pytest.approx(evaluated["eval_loss"] * 0.1**2, rel=1e-5)


def test_quantiles_and_the_first_loss_are_said_once_before_training(tmp_path, capsys):
    trainer = make_trainer(
        tmp_path, "SPPO", rows=rows(), beta=0.001, max_steps=1, per_device_train_batch_size=24, max_weight=None
    )
    trainer.train()
    (before,) = [entry for entry in trainer.state.log_history if "win_prob/chosen_p50" in entry]
    values = sorted(rows()["chosen_win_prob"])
    assert before["win_prob/chosen_p50"] == pytest.approx((values[11] + values[12]) / 2)
    assert {name for name in before if name.startswith("win_prob/rejected")} == {
        f"win_prob/rejected_p{q}" for q in ("05", 25, 50, 75, 95)
    }
    told = capsys.readouterr().err
    assert told.count("by design") == 1
    first = history(trainer)[0]
    assert 1e4 < first < 1e6 and f"{first:.3g}" in told


def test_weights_multiply_each_pairs_loss(tmp_path):
    """The mean of w_b L_b at the first step, w_b from the same forward pass, as `wpo/*` reports it for all-equal
    losses."""
    plain, weighted = (
        make_trainer(
            tmp_path,
            "SPPO",
            rows=rows(),
            loss_type="sppo_hard",
            beta=BETA,
            max_steps=1,
            per_device_train_batch_size=24,
            **more,
        )
        for more in ({}, {"use_weighting": True, "max_weight": 1.0})
    )
    plain.train()
    weighted.train()
    (entry,) = [entry for entry in weighted.state.log_history if "loss" in entry]
    # policy = reference: every pair's loss is 2 (1 / (2 beta))^2
    assert history(plain)[0] == pytest.approx(2 * (0.5 / BETA) ** 2, rel=1e-5)
    assert entry["loss"] == pytest.approx(entry["wpo/weight_mean"] * history(plain)[0], rel=1e-4)
    assert entry["wpo/weight_mean"] < 0.999


@pytest.mark.parametrize("loss_type", ["sppo", "gpo"])
def test_batches_and_layouts_change_nothing(tmp_path, loss_type):
    """4 micro-batches of 1 equal one of 4, packed equals padded: the same losses and final weights."""
    runs = []
    for settings in (
        {"batch_layout": "padded"},
        {"batch_layout": "packed"},
        {"batch_layout": "packed", "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    ):
        trainer = make_trainer(
            tmp_path, "SPPO", rows=rows(), loss_type=loss_type, beta=BETA, optim="sgd", learning_rate=1e-4, **settings
        )
        trainer.train()
        runs.append((history(trainer), weights_of(trainer.model)))
    for losses_, weights in runs[1:]:
        assert losses_ == pytest.approx(runs[0][0], rel=1e-4)
        torch.testing.assert_close(weights, runs[0][1], rtol=1e-4, atol=1e-5)


def test_soft_with_certain_probabilities_is_half_of_hard(tmp_path):
    data = rows().remove_columns(["chosen_win_prob", "rejected_win_prob"])
    data = data.add_column("chosen_win_prob", [1.0] * 24).add_column("rejected_win_prob", [0.0] * 24)
    soft, hard = (
        make_trainer(
            tmp_path, "SPPO", rows=data, loss_type=name, beta=BETA, optim="sgd", learning_rate=rate, max_steps=4
        )
        for name, rate in (("sppo", 2e-4), ("sppo_hard", 1e-4))
    )
    soft.train()
    hard.train()
    assert [2 * value for value in history(soft)] == pytest.approx(history(hard), rel=1e-4)


def test_scores_equal_to_centred_probabilities_make_gpo_sppo(tmp_path):
    data = rows().remove_columns(["chosen_score", "rejected_score"])
    for side in ("chosen", "rejected"):
        data = data.add_column(f"{side}_score", [p - 0.5 for p in data[f"{side}_win_prob"]])
    runs = [
        make_trainer(tmp_path, "SPPO", rows=data, loss_type=name, beta=BETA, max_steps=4) for name in ("sppo", "gpo")
    ]
    for trainer in runs:
        trainer.train()
    assert history(runs[0]) == pytest.approx(history(runs[1]), rel=1e-5)


def test_a_mixture_of_losses_weighs_them(tmp_path):
    trainer = make_trainer(
        tmp_path,
        "SPPO",
        rows=rows(),
        loss_type=["sppo", "sppo_single"],
        loss_weights=[0.25, 0.75],
        beta=BETA,
        max_steps=1,
        per_device_train_batch_size=24,
    )
    trainer.train()
    columns = {
        name: torch.tensor(rows()[name])
        for name in ("chosen_win_prob", "rejected_win_prob", "chosen_over_rejected_prob")
    }
    zeros = torch.zeros(24)
    expected = 0.25 * losses.sppo_loss(
        zeros, zeros, columns["chosen_win_prob"], columns["rejected_win_prob"], beta=BETA
    )
    expected += 0.75 * losses.sppo_single_loss(zeros, zeros, columns["chosen_over_rejected_prob"], beta=BETA)
    assert history(trainer)[0] == pytest.approx(float(expected.mean()), rel=1e-4)
    (entry,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert {"targets/chosen_sppo", "targets/chosen_sppo_single"} <= set(entry)


# ---- what is needed, what is refused
# -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", sorted(SELF_PLAY_LOSSES))
def test_only_the_columns_of_the_loss_are_needed(tmp_path, loss_type):
    needed = SELF_PLAY_LOSSES[loss_type].columns
    others = [name for name in rows().column_names if name.endswith(("_prob", "_score")) and name not in needed]
    make_trainer(tmp_path, "SPPO", rows=rows().remove_columns(others), loss_type=loss_type)
    for column in needed:
        with pytest.raises(
            ValueError,
            match=rf"`loss_type: {loss_type}` reads the column '{column}', which the train data does not have",
        ):
            make_trainer(tmp_path, "SPPO", rows=rows().remove_columns(column), loss_type=loss_type)


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("chosen_win_prob", 1.2, "1.2, which is no probability"),
        ("rejected_win_prob", -0.1, "-0.1, which is no probability"),
        ("rejected_win_prob", None, "missing"),
    ],
)
def test_a_value_that_is_none_is_refused_with_its_row(tmp_path, column, value, said):
    data = rows().to_list()
    data[5][column] = value
    loss_type = "gpo" if column.endswith("score") else "sppo"
    with pytest.raises(ValueError, match=rf"row '[0-9a-f]{{16}}' \(number 5\): `{column}` is {said}"):
        make_trainer(tmp_path, "SPPO", rows=Dataset.from_list(data), loss_type=loss_type)


@pytest.mark.parametrize(("column", "value"), [("chosen_win_prob", math.nan), ("chosen_score", math.inf)])
def test_a_row_with_a_number_that_is_not_finite_is_a_bad_row(tmp_path, column, value):
    data = rows().to_list()
    data[5][column] = value
    loss_type = "gpo" if column.endswith("score") else "sppo"
    trainer = make_trainer(tmp_path, "SPPO", rows=Dataset.from_list(data), loss_type=loss_type)
    assert len(trainer.train_dataset) == len(data) - 1
    ((row, detail),) = trainer.tokenization_reports["train"].examples.values()
    assert row == 5 and f"`{column}` is {value}" in detail
    with pytest.raises(ValueError, match=f"Row 5 .*`{column}` is {value}"):
        make_trainer(tmp_path, "SPPO", rows=Dataset.from_list(data), loss_type=loss_type, on_bad_row="raise")


def test_scores_may_be_negative_or_large(tmp_path):
    data = rows().to_list()
    data[0] |= {"chosen_score": 8.4, "rejected_score": -7.0}
    make_trainer(tmp_path, "SPPO", rows=Dataset.from_list(data), loss_type="gpo")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"loss_type": "sigmoid"},
            "Unknown loss_type 'sigmoid' for SPPOTrainer. Known: gpo, sft, sppo, sppo_hard, sppo_single",
        ),
        ({"max_target": 100.0}, "`max_target` bounds the targets of `loss_type: gpo`"),
        ({"loss_type": "gpo", "max_target": 0.0}, "max_target is 0.0; it must be above 0"),
        ({"label_smoothing": 0.1}, "`label_smoothing` is not used"),
        ({"loss_type": ["sppo", "sft"], "use_weighting": True}, "weights belong to pairs"),
        ({"beta": 0.0}, "`beta` must be positive"),
    ],
    ids=str,
)
def test_settings_that_cannot_go_together(tmp_path, settings, said):
    with pytest.raises(ValueError, match=said):
        make_trainer(tmp_path, "SPPO", rows=rows(), **settings)


def test_several_references_are_refused_by_name(tmp_path):
    data = rows()
    for side in ("chosen", "rejected"):
        data = data.add_column(f"ref_{side}_logps", [[-20.0, -21.0]] * 24)
    with pytest.raises(ValueError, match=r"scores of several references.*`multi-reference-dpo`"):
        make_trainer(tmp_path, "SPPO", rows=data, precompute_ref_log_probs=True)


def test_the_schedule_may_be_longer_than_the_training(tmp_path):
    """One epoch of 6 steps under a linear schedule for 3: the rates are those of the first third."""
    whole, part = (
        make_trainer(
            tmp_path, "SPPO", rows=rows(), lr_scheduler_type="linear", warmup_steps=0, learning_rate=1e-5, **settings
        )
        for settings in ({"num_train_epochs": 3}, {"num_train_epochs": 1, "schedule_epochs": 3})
    )
    whole.train()
    part.train()
    assert history(part, "learning_rate") == history(whole, "learning_rate")[:6]
    assert history(part, "learning_rate")[-1] == pytest.approx(1e-5 * 13 / 18)
    with pytest.raises(ValueError, match=r"`schedule_epochs` \(1\) must be at least `num_train_epochs`"):
        make_trainer(tmp_path, "SPPO", rows=rows(), num_train_epochs=2, schedule_epochs=1)


@pytest.mark.parametrize("mode", ["multi_dpo", "geometric", "harmonic"])
def test_soft_targets_against_several_references(tmp_path, mode):
    """multi_dpo: the mean over references of the losses; a mixture: the loss against it. GPO and lengths as units are
    refused."""
    data = rows()
    generator = torch.Generator().manual_seed(0)
    for side in ("chosen", "rejected"):
        data = data.add_column(f"ref_{side}_logps", (-90 * torch.rand(24, 2, generator=generator) - 20).tolist())
        data = data.add_column(f"ref_{side}_counts", [[9.0, 9.0]] * 24)
    settings = {"mode": mode, "beta": BETA, "max_steps": 1, "per_device_train_batch_size": 24, "max_length": 512}
    trainer = make_trainer(tmp_path, "MultiReferenceDPO", rows=data, loss_type="sppo", **settings)
    pairs = trainer.train_dataset
    policy = plain_pair_logps(tiny_model(), pairs, pairs["row_id"])
    references = [torch.tensor(pairs[f"ref_{side}_logps"]).T for side in ("chosen", "rejected")]
    probs = [torch.tensor(pairs[f"{side}_win_prob"]) for side in ("chosen", "rejected")]
    weights = torch.tensor([0.5, 0.5])
    if mode != "multi_dpo":
        references = [losses.mixture_logps(logps, weights, mode=mode)[None] for logps in references]
    each = [losses.sppo_loss(policy[0] - c, policy[1] - r, *probs, beta=BETA) for c, r in zip(*references)]
    trainer.train()
    assert history(trainer)[0] == pytest.approx(torch.stack(each).mean().item(), rel=1e-4)
    with pytest.raises(ValueError, match="Unknown loss_type 'gpo'"):
        make_trainer(tmp_path, "MultiReferenceDPO", rows=data, loss_type="gpo", **settings)
    with pytest.raises(ValueError, match="targets in nats of whole answers"):
        make_trainer(tmp_path, "MultiReferenceDPO", rows=data, loss_type="sppo", normalize="token", **settings)
    with pytest.raises(ValueError, match="reads the column 'chosen_win_prob'"):
        make_trainer(
            tmp_path, "MultiReferenceDPO", rows=data.remove_columns("chosen_win_prob"), loss_type="sppo", **settings
        )
