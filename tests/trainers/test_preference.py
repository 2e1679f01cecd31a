"""The spine of the pair trainers: what is logged is what the equations say, whatever batches and references."""

from __future__ import annotations

import copy
import importlib.metadata
import inspect
import math
import re
from types import SimpleNamespace

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

import prefopt
from prefopt import losses
from prefopt.trainers.pair_losses import PAIR_LOSSES, PairScores
from tests.scoring.helpers import plain_token_logits
from tests.tiny import tiny_model, tiny_tokenizer
from tests.trainers.pairs import (
    COMMON,
    Seen,
    history,
    logged_names,
    make_trainer,
    plain_pair_logps,
    preference_rows,
    trl_trainer,
    weights_of,
)

TRL_METRICS = {
    "loss",
    "grad_norm",
    "learning_rate",
    "epoch",
    "step",
    "num_tokens",
    "entropy",
    "mean_token_accuracy",
    "logits/chosen",
    "logits/rejected",
    "logps/chosen",
    "logps/rejected",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
}
OUR_METRICS = {
    "lengths/chosen",
    "lengths/rejected",
    "perf/peak_memory_gib",
    "perf/tokens_per_second",
    "perf/updates_lost",
}
WPO_METRICS = {
    f"wpo/{name}" for name in ("weight_mean", "weight_min", "weight_max", "clamped_fraction", "effective_pairs")
}


TRL_LOSSES = set(re.findall(r'loss_type == "(\w+)"', inspect.getsource(trl.DPOTrainer)))


def lora(**options) -> LoraConfig:
    return LoraConfig(
        r=4, lora_alpha=8, lora_dropout=0.0, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options
    )


# ---- what is logged
# ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("alignment", ["sampled", "greedy", "none"])
def test_the_logged_loss_is_the_equation_on_that_batch(tmp_path, layout, alignment):
    """L = mean_b w_b * -logsigmoid(beta * h_b), from the models' own logits in float64, for the first three steps."""
    initial = tiny_model(seed=3)
    models = []
    trainer = make_trainer(
        tmp_path, model=copy.deepcopy(initial), batch_layout=layout, weight_alignment=alignment, beta=0.3, max_steps=3
    )
    seen = Seen()
    seen.watch(trainer)
    step_loss = trainer.step_loss

    def keep(model, batch, sums):
        models.append(copy.deepcopy(dict(trainer.model.state_dict().items())))
        return step_loss(model, batch, sums)

    trainer.step_loss = keep
    trainer.train()
    for step, (weights, batch) in enumerate(zip(models, seen.batches)):
        policy = tiny_model(seed=3)
        policy.load_state_dict(weights)
        chosen, rejected = plain_pair_logps(policy, trainer.train_dataset, batch["row_ids"])
        ref_chosen, ref_rejected = plain_pair_logps(initial, trainer.train_dataset, batch["row_ids"])
        margins = ((chosen - ref_chosen) - (rejected - ref_rejected)).double()
        pair_weights = torch.stack([pair_weight(policy, trainer, row, alignment) for row in batch["row_ids"]])
        expected = (pair_weights * -torch.nn.functional.logsigmoid(0.3 * margins)).mean()
        logged = trainer.state.log_history[step]
        assert logged["loss"] == pytest.approx(float(expected), rel=1e-5)
        assert logged["rewards/margins"] == pytest.approx(float(0.3 * margins.mean()), abs=1e-5)
        assert logged["rewards/accuracies"] == pytest.approx(float((margins > 0).double().mean())) or step == 0
        assert logged["logps/chosen"] == pytest.approx(float(chosen.mean()), rel=1e-5)
        assert logged["wpo/weight_mean"] == pytest.approx(float(pair_weights.mean()), rel=1e-5)
        assert logged["wpo/weight_min"] == pytest.approx(float(pair_weights.min()), rel=1e-5)
        assert logged["wpo/weight_max"] == pytest.approx(float(pair_weights.max()), rel=1e-5)
        effective = float(pair_weights.sum() ** 2 / pair_weights.square().sum())
        assert logged["wpo/effective_pairs"] == pytest.approx(effective, rel=1e-5)


def pair_weight(policy, trainer, row_id, alignment) -> torch.Tensor:
    """min(exp(omega(chosen) + omega(rejected)), 1) of one row, in float64."""
    from prefopt.scoring.layouts import Group

    (row,) = [row for row in trainer.train_dataset if row["row_id"] == row_id]
    group = Group(row["prompt_ids"], [row["chosen_ids"], row["rejected_ids"]])
    total = 0.0
    for completion in range(2):
        logits, ids = plain_token_logits(policy, group, completion)
        logp = logits.double().log_softmax(-1)
        against = {
            "sampled": logp.exp().square().sum(-1).log(),
            "greedy": logp.amax(-1),
            "none": torch.zeros(len(ids)),
        }
        total = total + (logp.gather(-1, ids[:, None])[:, 0] - against[alignment]).mean()
    return total.exp().clamp(max=1.0)


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize(("trainer", "settings"), [("DPO", {}), ("WPO", {"use_weighting": True})])
def test_training_is_trls(tmp_path, trainer, settings, layout):
    """Six steps: the same losses, metrics and final weights as TRL's trainer on the same pairs in the same order."""
    extra = {"max_weight": None} if trainer == "WPO" else {}
    ours = make_trainer(tmp_path, trainer, model=tiny_model(), batch_layout=layout, **extra)
    theirs = trl_trainer(tmp_path, ours, model=tiny_model(), **settings)
    ours.train()
    theirs.train()
    for mine, other in zip(ours.state.log_history[:6], theirs.state.log_history[:6]):
        for name in TRL_METRICS - {"mean_token_accuracy", "rewards/accuracies"}:
            assert mine[name] == pytest.approx(other[name], rel=1e-4, abs=2e-5), name
        # ties at the first step and near-ties of logits may fall either way
        assert mine["mean_token_accuracy"] == pytest.approx(other["mean_token_accuracy"], abs=0.05)
        assert mine["rewards/accuracies"] == pytest.approx(other["rewards/accuracies"], abs=0.26)
    torch.testing.assert_close(weights_of(ours.model), weights_of(theirs.model), rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize(
    ("loss_type", "settings"),
    [
        (name, {"label_smoothing": 0.1} if name in ("exo_pair", "robust") else {})
        for name in PAIR_LOSSES
        if name in TRL_LOSSES
    ]
    + [("sft", {}), (["sigmoid", "sft"], {"loss_weights": [1.0, 0.3]}), ("sigmoid", {"ld_alpha": 0.4})],
    ids=str,
)
def test_every_loss_of_trl_has_trls_value(tmp_path, loss_type, settings):
    """Two steps at a large learning rate: policy and reference differ in the second, and the loss is TRL's."""
    settings = {"max_steps": 2, "learning_rate": 1e-2, **settings}
    ours = make_trainer(tmp_path, "DPO", model=tiny_model(), loss_type=loss_type, **settings)
    theirs = trl_trainer(
        tmp_path,
        ours,
        model=tiny_model(),
        loss_type=loss_type if isinstance(loss_type, list) else [loss_type],
        **settings,
    )
    ours.train()
    theirs.train()
    assert history(ours) == pytest.approx(history(theirs), rel=2e-3 if loss_type == "discopop" else 1e-4)


def test_losses_that_trl_has_are_compared_with_it():
    assert {"sigmoid", "ipo", "discopop", "aot", "apo_zero"} <= TRL_LOSSES & set(PAIR_LOSSES)


@pytest.mark.parametrize(
    ("name", "setting"),
    [(name, setting) for name, loss in PAIR_LOSSES.items() for setting in loss.settings if setting.interval],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_a_losss_range_in_the_table_is_the_functions_own(name, setting):
    low, high = (float(bound) for bound in setting.interval[1:-1].split(","))
    pair = PairScores(*[torch.ones(2)] * 6)
    for value in (low, high, low - 0.1, high + 0.1, (low + min(high, 1.0)) / 2, float("nan")):
        config = SimpleNamespace(beta=0.1, **{other.name: 0.1 for other in PAIR_LOSSES[name].settings})
        setattr(config, setting.name, value)
        outcomes = []
        for run in (
            lambda config=config: PAIR_LOSSES[name].check_settings(config, name),
            lambda config=config: PAIR_LOSSES[name](pair, config, {}),
        ):
            try:
                run()
                outcomes.append("fine")
            except ValueError:
                outcomes.append("raises")
        assert outcomes[0] == outcomes[1], value


@pytest.mark.parametrize(("trainer", "names"), [("DPO", set()), ("WPO", WPO_METRICS)])
def test_metric_names_are_exactly_these(tmp_path, trainer, names):
    rows = preference_rows()
    ours = make_trainer(
        tmp_path, trainer, rows=rows, trainer_options={"eval_dataset": rows.select(range(5))}, max_steps=1
    )
    ours.train()
    assert logged_names(ours.state.log_history[0]) == TRL_METRICS | OUR_METRICS | names
    run = {"runtime", "samples_per_second", "steps_per_second"}
    evaluated = (TRL_METRICS - {"grad_norm", "learning_rate", "epoch", "step", "num_tokens"}) | names | run
    expected = {f"eval_{name}" for name in evaluated | {"lengths/chosen", "lengths/rejected"}} | {"epoch"}
    assert set(ours.evaluate()) == expected


def test_vocabulary_metrics_can_be_dropped(tmp_path):
    trainer = make_trainer(tmp_path, "DPO", vocab_metrics=False, max_steps=1)
    trainer.train()
    assert not {"entropy", "logits/chosen", "mean_token_accuracy"} & set(trainer.state.log_history[0])


# ---- batches, accumulation, evaluation
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("loss_type", [["sigmoid"], ["sft"], ["ipo"]], ids=str)
def test_micro_batches_add_up(tmp_path, layout, loss_type):
    """One micro-batch of 4 pairs, 2 of 2 and 4 of 1 give the same losses and weights, in the smaller last step too."""
    runs = []
    trainer_name = "DPO" if loss_type == ["sft"] else "WPO"
    for size in (4, 2, 1):
        trainer = make_trainer(
            tmp_path,
            trainer_name,
            rows=preference_rows(22),
            batch_layout=layout,
            loss_type=loss_type,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=4 // size,
        )
        trainer.train()
        runs.append(trainer)
    names = ["loss", "rewards/margins", "logps/chosen", "num_tokens", "entropy"] + (
        ["wpo/effective_pairs"] if trainer_name == "WPO" else []
    )
    for other in runs[1:]:
        for name in names:
            assert history(other, name) == pytest.approx(history(runs[0], name), rel=1e-4, abs=1e-5), name
        torch.testing.assert_close(weights_of(other.model), weights_of(runs[0].model), rtol=1e-3, atol=2e-5)


def test_evaluation_is_the_mean_over_pairs_whatever_the_batches(tmp_path):
    rows = preference_rows(11, seed=5)
    results = []
    for size, layout in ((1, "padded"), (4, "padded"), (11, "packed")):
        trainer = make_trainer(
            tmp_path, trainer_options={"eval_dataset": rows}, per_device_eval_batch_size=size, batch_layout=layout
        )
        with torch.no_grad():  # away from the reference, so that there is something to measure
            for p in trainer.model.parameters():
                p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
        trainer._margin_checked = True
        results.append(trainer.evaluate())
    chosen, _rejected = plain_pair_logps(trainer.model, trainer.eval_dataset, trainer.eval_dataset["row_id"])
    assert results[0]["eval_logps/chosen"] == pytest.approx(float(chosen.mean()), rel=1e-5)
    for other in results[1:]:
        for name in (
            "eval_loss",
            "eval_rewards/margins",
            "eval_entropy",
            "eval_wpo/effective_pairs",
            "eval_rewards/accuracies",
        ):
            assert other[name] == pytest.approx(results[0][name], rel=1e-5, abs=1e-5), name


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("llama", {"loss_type": ["sft"]}),
        ("llama", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]}),
        ("mixtral", {"router_aux_loss_coef": 0.5}),
    ],
    ids=str,
)
def test_the_evaluated_loss_is_the_loss_that_is_trained(tmp_path, architecture, settings):
    """One step over the whole data set, its loss taken before the step, and the same data evaluated: one number."""
    rows = preference_rows(7)
    trainer = make_trainer(
        tmp_path,
        "DPO",
        model=tiny_model(architecture),
        rows=rows,
        trainer_options={"eval_dataset": rows},
        max_steps=1,
        per_device_train_batch_size=7,
        per_device_eval_batch_size=7,
        batch_layout="padded",
        **settings,
    )
    evaluated = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert evaluated == pytest.approx(history(trainer)[0], rel=1e-5)


def test_several_evaluation_sets_and_compute_metrics(tmp_path):
    rows = {"first": preference_rows(5, seed=1), "second": preference_rows(7, seed=2)}
    sizes = []

    def spread(predictions):
        sizes.append(predictions.predictions.shape)
        return {"spread": float((predictions.predictions[:, 0] - predictions.predictions[:, 1]).mean())}

    trainer = make_trainer(
        tmp_path,
        trainer_options={"eval_dataset": rows, "compute_metrics": spread},
        max_steps=2,
        per_device_eval_batch_size=3,
    )
    trainer.train()
    metrics = trainer.evaluate()
    assert sizes == [(5, 2), (7, 2)]
    for name in rows:
        assert metrics[f"eval_{name}_spread"] == pytest.approx(metrics[f"eval_{name}_rewards/margins"], abs=1e-6)


def test_a_collator_in_trls_form_gives_the_same_training(tmp_path):
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    ours = make_trainer(tmp_path)
    custom = make_trainer(tmp_path, trainer_options={"data_collator": DataCollatorForPreference(pad_token_id=0)})
    assert custom.layout.name == "padded"
    ours.train()
    custom.train()
    assert history(custom) == pytest.approx(history(ours), rel=1e-4)


def test_the_mixture_of_experts_loss_is_added(tmp_path):
    def first_loss(**settings):
        trainer = make_trainer(tmp_path, "DPO", model=tiny_model("mixtral"), max_steps=1, **settings)
        trainer.train()
        return trainer.state.log_history[0]

    plain, added = first_loss(router_aux_loss_coef=0.0), first_loss(router_aux_loss_coef=0.5)
    assert "aux_loss" not in plain
    assert added["loss"] == pytest.approx(plain["loss"] + 0.5 * added["aux_loss"], rel=1e-5)
    with pytest.raises(ValueError, match="not a mixture of experts"):
        make_trainer(tmp_path, router_aux_loss_coef=0.1)


# ---- references
# --------------------------------------------------------------------------------------------------------------------


def test_the_reference_is_the_model_as_it_is_now_and_does_not_move(tmp_path):
    """A model that was loaded from disk and then tuned in memory: its reference is the tuned one."""
    tiny_model().save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        model.lm_head.weight.add_(0.5 * torch.randn_like(model.lm_head.weight))
    now = weights_of(model).clone()
    trainer = make_trainer(tmp_path, model=model)
    trainer.train()
    assert trainer.state.log_history[0]["rewards/margins"] == pytest.approx(0.0, abs=1e-6)
    torch.testing.assert_close(weights_of(trainer.ref_model), now)
    assert (weights_of(trainer.model) - now).abs().max() > 1e-3


def test_a_reference_that_does_not_match_the_policy_is_noticed(tmp_path):
    trainer = make_trainer(tmp_path)
    with torch.no_grad():
        trainer.model.lm_head.weight.mul_(1.5)
    with pytest.raises(ValueError, match="Before the first step the reference does not score like the policy"):
        trainer.train()


def test_an_explicit_reference_is_used(tmp_path):
    other = tiny_model(seed=9)
    trainer = make_trainer(tmp_path, trainer_options={"ref_model": other}, max_steps=1)
    trainer.train()
    assert abs(trainer.state.log_history[0]["rewards/margins"]) > 1e-3


def test_a_second_round_against_a_copy_of_the_first_rounds_policy(tmp_path):
    """The copy has been through a trainer, and must stay what it is while the policy trains on."""
    model = tiny_model()
    make_trainer(tmp_path, model=model, max_steps=1).train()
    trainer = make_trainer(tmp_path, model=model, trainer_options={"ref_model": copy.deepcopy(model)}, max_steps=3)
    trainer.train()
    assert history(trainer, "rewards/margins")[0] == pytest.approx(0.0, abs=1e-6)
    assert abs(history(trainer, "rewards/margins")[-1]) > 1e-4


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_a_fresh_adapter_trains_against_the_model_without_it(tmp_path, layout):
    base = tiny_model()
    before = weights_of(base).clone()
    trainer = make_trainer(
        tmp_path, model=base, trainer_options={"peft_config": lora()}, learning_rate=1e-2, batch_layout=layout
    )
    assert trainer.ref_model is None
    trainer.train()
    full = make_trainer(tmp_path, model=tiny_model(), max_steps=1)
    full.train()
    assert history(trainer)[0] == pytest.approx(history(full)[0], rel=1e-5)  # an adapter starts as nothing
    assert history(trainer, "rewards/margins")[0] == pytest.approx(0.0, abs=1e-6)
    assert history(trainer, "rewards/margins")[-1] != pytest.approx(0.0, abs=1e-4)
    base_now = torch.cat([p.detach().flatten() for n, p in trainer.model.named_parameters() if "lora_" not in n])
    assert torch.equal(base_now, before)


def test_a_trained_adapter_trains_against_a_frozen_copy_of_itself(tmp_path):
    model = get_peft_model(tiny_model(), lora())
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.add_(0.3 * torch.randn_like(p))
    trainer = make_trainer(tmp_path, model=model, learning_rate=1e-2)
    copies = {n: p.clone() for n, p in trainer.model.named_parameters() if ".ref." in n}
    trainer.train()
    assert history(trainer, "rewards/margins")[0] == pytest.approx(0.0, abs=1e-6)
    assert history(trainer, "rewards/margins")[-1] != pytest.approx(0.0, abs=1e-4)
    assert copies
    for name, p in trainer.model.named_parameters():
        if name in copies:
            assert torch.equal(p, copies[name])
            assert not p.requires_grad
        elif ".default." in name:
            assert p.requires_grad


def test_the_policy_is_its_reference_without_dropout_and_goes_on_with_its_checkpointing(tmp_path, monkeypatch):
    from prefopt.trainers import checkpointing

    used = []
    contexts = checkpointing.selective_contexts
    monkeypatch.setattr(checkpointing, "selective_contexts", lambda: used.append(1) or contexts())
    trainer = make_trainer(
        tmp_path,
        model=tiny_model(attention_dropout=0.5),
        trainer_options={"peft_config": lora()},
        max_steps=3,
        disable_dropout=False,
        gradient_checkpointing=True,
        selective_checkpointing=True,
    )
    trainer.train()
    assert len(used) == 3 * 2  # steps, layers
    trainer.model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model_wrapped = trainer.model
    first, second = (trainer.reference_scores(batch).chosen_logps for _ in range(2))
    assert torch.equal(first, second)
    assert trainer.model.training


def test_each_round_on_one_adapter_starts_from_its_present_weights(tmp_path):
    model = get_peft_model(tiny_model(), lora(), adapter_name="mine")
    for _ in range(3):
        trainer = make_trainer(tmp_path, model=model, learning_rate=1e-2, max_steps=2)
        trainer.train()
        assert history(trainer, "rewards/margins")[0] == pytest.approx(0.0, abs=1e-6)
        assert abs(history(trainer, "rewards/margins")[1]) > 1e-5


def test_a_new_adapter_is_drawn_from_the_seed(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    drawn = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        trainer = make_trainer(tmp_path, model=str(tmp_path / "model"), trainer_options={"peft_config": lora()})
        drawn.append(weights_of(trainer.model))
    assert torch.equal(*drawn)


def test_zero3_with_an_adapter_checkpoints_re_entrantly(tmp_path, monkeypatch, capsys):
    from prefopt.trainers import policy

    monkeypatch.setattr(policy, "is_deepspeed_zero3_enabled", lambda: True)
    trainer = make_trainer(tmp_path, trainer_options={"peft_config": lora()}, gradient_checkpointing=True)
    assert "gradient checkpointing is re-entrant" in capsys.readouterr().out
    assert trainer.args.activation_checkpointing_kwargs == {"use_reentrant": True}  # what Trainer.train reads
    assert trainer.args.gradient_checkpointing_kwargs == {"use_reentrant": True}


def test_modules_to_save_may_hold_the_lm_head(tmp_path):
    trainer = make_trainer(
        tmp_path, trainer_options={"peft_config": lora(modules_to_save=["lm_head"])}, learning_rate=1e-2
    )
    trainer.train()
    assert history(trainer, "rewards/margins")[0] == pytest.approx(0.0, abs=1e-6)
    head = trainer.model.get_base_model().lm_head
    assert not torch.equal(head.modules_to_save["default"].weight, head.original_module.weight)


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_cached_reference_scores_train_like_a_live_reference(tmp_path, capsys, peft):
    rows, held_out = preference_rows(), preference_rows(5, seed=8)
    options = {"eval_dataset": held_out} | ({"peft_config": lora()} if peft else {})
    live = make_trainer(tmp_path, rows=rows, trainer_options=options)
    live.train()

    def cached(**settings):
        settings = {"precompute_ref_log_probs": True, "ref_logps_dir": str(tmp_path / "scores"), **settings}
        return make_trainer(tmp_path, rows=rows, trainer_options=options, **settings)

    trainer = cached()
    assert "0 read" in (printed := capsys.readouterr().out)
    assert "48 scored now" in printed
    trainer.train()
    assert history(trainer) == pytest.approx(history(live), rel=1e-5)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(live.evaluate()["eval_loss"], rel=1e-4)
    capsys.readouterr()
    cached(learning_rate=5e-4, beta=0.5)  # neither alters a score
    assert "48 read" in (printed := capsys.readouterr().out)
    assert "10 read" in printed
    assert " 0 scored now" in printed
    if not peft:
        with pytest.raises(ValueError, match="no cached reference scores"):
            trainer.evaluate(preference_rows(3, seed=77))


def test_numbers_of_a_batch_keep_their_dtype_under_deepspeed(tmp_path, monkeypatch):
    """transformers casts floats of a batch to DeepSpeed's dtype: in bf16, -466.934 would be read as -466.0."""
    rows = preference_rows(8)
    make = {"rows": rows, "precompute_ref_log_probs": True, "ref_logps_dir": str(tmp_path / "scores")}
    trainer = make_trainer(tmp_path, **make)
    (loaded,) = [next(iter(trainer.get_train_dataloader()))]
    plugin = SimpleNamespace(hf_ds_config=SimpleNamespace(dtype=lambda: torch.bfloat16))
    monkeypatch.setattr(type(trainer.accelerator.state), "deepspeed_plugin", plugin)
    trainer.is_deepspeed_enabled = True
    batch = trainer.to_device(loaded)
    for name, value in loaded.items():
        if isinstance(value, torch.Tensor):
            assert batch[name].dtype == value.dtype, name
            assert torch.equal(batch[name], value), name
    assert batch["ref_chosen_logps"].dtype == batch["token_weights"].dtype == torch.float32


def test_cached_scores_that_are_not_the_policys_are_noticed(tmp_path):
    trainer = make_trainer(tmp_path, precompute_ref_log_probs=True, ref_logps_dir=str(tmp_path / "scores"))
    with torch.no_grad():
        trainer.model.lm_head.weight.mul_(1.5)
    with pytest.raises(ValueError, match="Before the first step the reference does not score like the policy"):
        trainer.train()


def test_scores_given_with_the_data_may_be_those_of_any_model(tmp_path):
    first = make_trainer(tmp_path, precompute_ref_log_probs=True, ref_logps_dir=str(tmp_path / "scores"))
    given = Dataset.from_list(list(first.train_dataset))
    trainer = make_trainer(tmp_path, model=tiny_model(seed=4), rows=given, precompute_ref_log_probs=True, max_steps=1)
    trainer.train()
    assert abs(history(trainer, "rewards/margins")[0]) > 1e-4


def test_a_reference_with_an_adapter_is_cached_with_it(tmp_path):
    def trained_adapter():
        model = get_peft_model(tiny_model(), lora())
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_" in name:
                    p.copy_(0.3 * torch.randn(p.shape, generator=generator))
        return model

    runs = []
    for cached in (False, True):
        trainer = make_trainer(
            tmp_path,
            trainer_options={"ref_model": trained_adapter()},
            max_steps=2,
            precompute_ref_log_probs=cached,
            ref_logps_dir=str(tmp_path / "scores"),
        )
        trainer.train()
        runs.append(history(trainer))
    assert runs[1] == pytest.approx(runs[0], rel=1e-5)


def test_late_data_is_not_scored_by_the_policy_where_another_model_is_the_reference(tmp_path):
    trainer = make_trainer(
        tmp_path,
        trainer_options={"ref_model": tiny_model(seed=4), "peft_config": lora()},
        precompute_ref_log_probs=True,
        ref_logps_dir=str(tmp_path / "scores"),
    )
    with pytest.raises(ValueError, match="the reference is no longer at hand"):
        trainer.evaluate(preference_rows(3, seed=77))


def test_losses_without_a_reference_keep_none(tmp_path):
    trainer = make_trainer(tmp_path, "DPO", loss_type="simpo", beta=2.0, gamma_beta_ratio=0.5, max_steps=1)
    assert trainer.ref_model is None
    trainer.train()
    batch_rows = trainer.train_dataset
    order = trainer.get_train_dataloader().batch_sampler.step(0, 0)[0][0].indices
    chosen, rejected = plain_pair_logps(tiny_model(), batch_rows, [batch_rows[i]["row_id"] for i in order])
    lengths = [(len(batch_rows[i]["chosen_ids"]), len(batch_rows[i]["rejected_ids"])) for i in order]
    means = [(c / n, r / m) for c, r, (n, m) in zip(chosen.tolist(), rejected.tolist(), lengths)]
    expected = sum(math.log1p(math.exp(-(2.0 * (c - r) - 1.0))) for c, r in means) / len(means)
    assert history(trainer)[0] == pytest.approx(expected, rel=1e-5)
    # SimPO's reward is beta times the mean log-prob, and so are its authors' logged rewards and accuracies
    logged = trainer.state.log_history[0]
    assert logged["rewards/chosen"] == pytest.approx(2.0 * sum(c for c, _ in means) / len(means), rel=1e-5)
    assert logged["rewards/rejected"] == pytest.approx(2.0 * sum(r for _, r in means) / len(means), rel=1e-5)
    assert logged["rewards/accuracies"] == pytest.approx(sum(c > r for c, r in means) / len(means))


def test_ipo_on_sums_is_the_equation_without_lengths(tmp_path):
    """The SPPO repository's `ipo`: (h - 1 / (2 beta))^2 of summed log-ratios, which are 0 before the first step."""
    trainer = make_trainer(
        tmp_path, "DPO", loss_type="ipo_sum", beta=0.5, max_steps=1, trainer_options={"ref_model": tiny_model(seed=4)}
    )
    trainer.train()
    rows = trainer.train_dataset
    order = trainer.get_train_dataloader().batch_sampler.step(0, 0)[0][0].indices
    ids = [rows[i]["row_id"] for i in order]
    policy, reference = (plain_pair_logps(tiny_model(**seed), rows, ids) for seed in ({}, {"seed": 4}))
    margins = (policy[0] - policy[1]) - (reference[0] - reference[1])
    assert history(trainer)[0] == pytest.approx(((margins - 1.0) ** 2).mean().item(), rel=1e-4)


# ---- stopping, saving, resuming
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_resumed_equals_uninterrupted(tmp_path, layout):
    """Stopped in the middle of the second epoch (step 8 of 12, 6 steps an epoch) and resumed by a new trainer."""
    settings = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 4, "batch_layout": layout}
    whole = make_trainer(tmp_path / "a", **settings)
    whole.train()
    resumed = make_trainer(tmp_path / "a", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a/out/checkpoint-8"))
    for name in ("loss", "rewards/margins", "num_tokens", "learning_rate"):
        assert history(resumed, name) == pytest.approx(history(whole, name), rel=1e-6), name
    assert torch.equal(weights_of(resumed.model), weights_of(whole.model))


def test_tokens_between_the_last_log_and_a_checkpoint_are_counted_on_resume(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "logging_steps": 3}
    whole = make_trainer(tmp_path, **settings)
    whole.train()
    resumed = make_trainer(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-2"))
    assert history(resumed, "num_tokens") == history(whole, "num_tokens")


def test_a_saved_model_loads_in_plain_transformers_with_its_card(tmp_path):
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=6)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    torch.testing.assert_close(weights_of(loaded), weights_of(trainer.model))
    card = (tmp_path / "out" / "README.md").read_text()
    for expected in (
        "**WPO**",
        "2406.11827",
        "| beta | 0.1 |",
        "| max_weight | 1.0 |",
        f"prefopt {importlib.metadata.version('prefopt')}",
        "@inproceedings{zhou2024wpo",
    ):
        assert expected in card


def test_an_empty_tensor_in_a_saved_model_is_an_error(tmp_path):
    from safetensors.torch import save_file

    from prefopt.trainers.checkpoints import check_saved_shapes

    save_file({"whole": torch.zeros(2), "empty": torch.zeros(0)}, tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match="zero3_save_16bit_model"):
        check_saved_shapes(tmp_path)


@pytest.mark.parametrize("selective", [False, True])
def test_checkpointing_changes_nothing(tmp_path, selective, monkeypatch):
    from prefopt.trainers import checkpointing

    used = []
    contexts = checkpointing.selective_contexts
    monkeypatch.setattr(checkpointing, "selective_contexts", lambda: used.append(1) or contexts())
    plain = make_trainer(tmp_path, max_steps=2)
    checkpointed = make_trainer(
        tmp_path,
        max_steps=2,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        selective_checkpointing=selective,
    )
    plain.train()
    checkpointed.train()
    assert history(checkpointed) == pytest.approx(history(plain), rel=1e-6)
    torch.testing.assert_close(weights_of(checkpointed.model), weights_of(plain.model))
    assert bool(used) == selective


@pytest.mark.parametrize("loss_type", [*(name for name, loss in PAIR_LOSSES.items() if not loss.sorts_batch), "sft"])
def test_packed_rows_train_like_padded_ones_for_every_loss(tmp_path, loss_type):
    runs = []
    for layout in ("padded", "packed"):
        smoothing = {"label_smoothing": 0.1} if loss_type in ("exo_pair", "robust") else {}
        trainer = make_trainer(
            tmp_path, "DPO", loss_type=loss_type, batch_layout=layout, max_steps=2, learning_rate=1e-2, **smoothing
        )
        trainer.train()
        runs.append(trainer)
    assert history(runs[1]) == pytest.approx(history(runs[0]), rel=1e-5, abs=1e-6)
    assert history(runs[1], "grad_norm") == pytest.approx(history(runs[0], "grad_norm"), rel=1e-4)


# ---- refusals
#
#
#
#
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 0.0}, "`beta` must be positive"),
        ({"max_length": 32, "max_prompt_length": 32}, "must be below `max_length`"),
        ({"loss_type": []}, "`loss_type` is an empty list"),
        ({"num_train_epochs": 0.0}, "`num_train_epochs` must be above 0, not 0.0"),
        ({"max_steps": 0}, "`max_steps` must be at least 1"),
        ({"save_steps": 0}, "`save_steps` must be above 0"),
        (
            {"lr_scheduler_type": "cosine_with_min_lr"},
            "`lr_scheduler_type: cosine_with_min_lr` cannot be made .* min_lr",
        ),
        ({"lr_scheduler_kwargs": {"min": 1}}, "`lr_scheduler_kwargs: {'min': 1}`: "),
        ({"adam_beta2": 1.5}, r"`adam_beta2` must be in \[0, 1\), not 1.5"),
        ({"weight_decay": -0.1}, "`weight_decay` must be a number from 0 up"),
        ({"dataloader_num_workers": -1}, "`dataloader_num_workers` must be at least 0"),
        ({"loss_type": "sigmid"}, "Unknown loss_type 'sigmid'"),
        ({"loss_type": "aot"}, "WPO's weights belong to pairs"),
        ({"loss_type": ["sigmoid", "sft"]}, "WPO's weights belong to pairs"),
        ({"loss_type": "exo_pair"}, "exo_pair"),
        ({"loss_type": ["sigmoid"], "loss_weights": [1.0, 2.0]}, "same length as `loss_type`"),
        ({"padding_free": True, "batch_layout": "padded"}, "contradict each other"),
        ({"sync_ref_model": True}, "stays fixed"),
        ({"f_divergence_type": "forward_kl"}, "reverse KL"),
        ({"weight_alignment": "sample"}, "weight_alignment"),
        ({"max_weight": -1.0}, "max_weight"),
        ({"batch_layout": "tight"}, "batch_layout"),
        ({"use_weighting": False}, "plain DPO"),
        ({"ld_alpha": 0.5, "precompute_ref_log_probs": True}, "ld_alpha"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size"),
        ({"train_sampling_strategy": "group_by_length"}, "balanced by length already"),
        ({"accelerator_config": {"split_batches": True}}, "split_batches"),
        ({"batch_eval_metrics": True}, "all rows at once"),
        ({"include_for_metrics": ["loss"]}, "predictions only"),
        ({"eval_do_concat_batches": False}, "in one array"),
        ({"dataloader_in_order": False}, "belong together"),
        ({"label_smoothing_factor": 0.1}, "`label_smoothing` is that"),
        ({"precompute_ref_batch_size": 4}, "filled by tokens"),
        ({"neftune_noise_alpha": 5.0}, "not the reference's"),
        ({"label_smoothing": 0.7}, "label_smoothing must lie in"),
        ({"loss_type": "discopop", "discopop_tau": 3.0}, "tau must lie in"),
        ({"loss_type": "simpo", "gamma_beta_ratio": -1.0}, "gamma_beta_ratio"),
        (
            {"loss_type": "sigmoid", "gamma_beta_ratio": 0.3},
            "is read with loss_type simpo only.* loss_type is sigmoid",
        ),
        ({"loss_type": ["ipo", "hinge"], "label_smoothing": 0.1}, "sigmoid or .* only.* loss_type is ipo, hinge"),
        ({"selective_checkpointing": True}, "turn that on as well"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused_before_any_weights(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, model="no/such-model", **settings)


def test_models_and_adapters_that_cannot_work_are_refused(tmp_path):
    model = tiny_model()
    with pytest.raises(ValueError, match="same object as `model`"):
        make_trainer(tmp_path, model=model, trainer_options={"ref_model": model})
    head = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="`lm_head` would be ignored"):
        make_trainer(tmp_path, trainer_options={"peft_config": head})
    with pytest.raises(ValueError, match="adds virtual tokens"):
        make_trainer(
            tmp_path, trainer_options={"peft_config": PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")}
        )
    with pytest.raises(ValueError, match="already has an adapter"):
        make_trainer(tmp_path, model=get_peft_model(tiny_model(), lora()), trainer_options={"peft_config": lora()})
    with pytest.raises(ValueError, match="No parameter of the model is trainable"):
        make_trainer(tmp_path, model=get_peft_model(tiny_model(), lora(inference_mode=True)))
    with pytest.raises(ValueError, match=r"AutoModelForCausalLM\.from_pretrained\('some/model'\)"):
        make_trainer(tmp_path, trainer_options={"ref_model": "some/model"})
    with pytest.raises(ValueError, match="would not reach the batches"):
        make_trainer(tmp_path, "DPO", ld_alpha=0.5, trainer_options={"data_collator": list})
    args = trl.DPOConfig(str(tmp_path), **COMMON)
    with pytest.raises(ValueError, match=r"WPOTrainer needs a prefopt\.WPOConfig, .* not a trl"):
        prefopt.WPOTrainer("no/such-model", args=args, train_dataset=preference_rows())
    with pytest.raises(ValueError, match="must be a tokenizer, not a dict"):
        prefopt.DPOTrainer("no/such-model", processing_class={}, train_dataset=preference_rows())
    with pytest.raises(ValueError, match="`predict` is not supported"):
        make_trainer(tmp_path).predict(preference_rows(2))
    with pytest.raises(ValueError, match=r"was given\. Drop one"):
        make_trainer(tmp_path, model_init_kwargs={"dtype": "float32"})
    with pytest.raises(ValueError, match="sliding window of 16"):
        make_trainer(tmp_path, model=tiny_model("mistral", sliding_window=16), batch_layout="packed")
    with pytest.raises(ValueError, match="would not be used"):
        make_trainer(tmp_path, "DPO", loss_type="simpo", trainer_options={"ref_model": tiny_model(seed=1)})


def test_a_model_that_cannot_be_packed_is_padded_with_one_line_why(tmp_path, capsys):
    trainer = make_trainer(tmp_path, model=tiny_model("mistral", sliding_window=16), max_steps=1)
    assert trainer.layout.name == "padded"
    assert "Batches are padded, not packed: its sliding window of 16" in capsys.readouterr().out
    assert make_trainer(tmp_path).layout.name == "packed"


def numbers_positions_itself(model):
    """Count positions along the row, whatever `position_ids` say, as models of remote code do."""
    forward = model.model.forward

    def counted(input_ids, position_ids=None, **kwargs):
        return forward(input_ids, position_ids=torch.arange(input_ids.shape[1])[None], **kwargs)

    model.model.forward = counted
    return model


def attends_by_itself(model):
    """Compute attention without transformers' interface, so that no boundaries reach it."""
    for layer in model.model.layers:
        layer.self_attn.config = copy.copy(layer.self_attn.config)
        layer.self_attn.config._attn_implementation = "sdpa"
        attend = layer.self_attn.forward
        layer.self_attn.forward = lambda *args, attend=attend, attention_mask=None, **kwargs: attend(
            *args, attention_mask=None, **kwargs
        )
    return model


def takes_no_positions(model):
    forward = model.model.forward

    def plain(input_ids, attention_mask=None, use_cache=None):
        return forward(input_ids, attention_mask=attention_mask, use_cache=use_cache)

    model.model.forward = plain
    return model


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (numbers_positions_itself, "scores differently packed"),
        (attends_by_itself, "scores differently packed"),
        (takes_no_positions, "does not take packed rows"),
    ],
)
def test_a_model_whose_packed_rows_are_not_exact_is_found_before_training(tmp_path, capsys, change, reason):
    """One pair is scored packed and by the model's plain forward: positions and boundaries must reach every layer."""
    trainer = make_trainer(tmp_path, model=change(tiny_model()), max_steps=1)
    assert trainer.layout.name == "padded"
    assert reason in capsys.readouterr().out
    assert "batches: padded (" in trainer.describe_run()
    assert reason in trainer.describe_run()
    with pytest.raises(ValueError, match=f"`batch_layout: packed` cannot be exact.*{reason}"):
        make_trainer(tmp_path, model=change(tiny_model()), batch_layout="packed")


def test_the_probe_is_two_forwards_and_its_result_is_printed(tmp_path, capsys):
    model = tiny_model()
    calls = []
    model.model.embed_tokens.register_forward_hook(lambda *_: calls.append(1))
    trainer = make_trainer(tmp_path, model=model, max_steps=1)
    assert len(calls) == 2
    assert trainer.model.config._attn_implementation == "sdpa"
    trainer.train()
    assert "batches: packed (tried: a pair of the data scores as in padded rows)" in capsys.readouterr().out


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flex_attention"])
def test_a_model_gets_its_own_attention_back(tmp_path, attention):
    model = tiny_model(attn_implementation=attention if attention != "flex_attention" else None)
    if attention == "flex_attention":
        model.set_attn_implementation(attention)
    trainer = make_trainer(tmp_path, "DPO", model=model, max_steps=2, batch_layout="packed")
    other = make_trainer(tmp_path, "DPO", model=tiny_model(), max_steps=2, batch_layout="padded")
    trainer.train()
    other.train()
    assert history(trainer) == pytest.approx(history(other), rel=1e-5)
    for each in (trainer.model, trainer.ref_model):
        assert each.config._attn_implementation == attention


def test_pairs_can_be_trained_on_in_the_order_of_the_data(tmp_path):
    trainer = make_trainer(tmp_path, train_sampling_strategy="sequential", num_train_epochs=2)
    seen = Seen()
    seen.watch(trainer)
    trainer.train()
    order = [sorted(batch["row_ids"]) for batch in seen.batches]
    row_ids = trainer.train_dataset["row_id"]
    assert order == 2 * [sorted(row_ids[i : i + 4]) for i in range(0, 24, 4)]


def test_streaming_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Streaming"):
        make_trainer(tmp_path, rows=preference_rows().to_iterable_dataset())


def test_only_model_and_data_are_needed(tmp_path, monkeypatch):
    """`WPOTrainer("folder", train_dataset=rows)`, as TRL's trainer; everything else has a default."""
    monkeypatch.chdir(tmp_path)
    tiny_model().save_pretrained("model")
    tiny_tokenizer("llama3").save_pretrained("model")
    trainer = prefopt.WPOTrainer("model", train_dataset=preference_rows(8))
    assert trainer.args.beta == 0.01
    assert trainer.args.max_weight == 1.0


def test_raw_strings_and_ready_ids_train_alike(tmp_path):
    rows = preference_rows()
    first = make_trainer(tmp_path, rows=rows, max_steps=2)
    ready = Dataset.from_list(list(first.train_dataset))
    second = make_trainer(tmp_path, rows=ready, max_steps=2)
    first.train()
    second.train()
    assert history(first) == history(second)
    assert COMMON["logging_steps"] == 1
    assert losses.dpo_loss(torch.zeros(1), torch.zeros(1), beta=0.1).item() == pytest.approx(math.log(2))


@pytest.mark.slow
def test_torch_compile_trains_alike(tmp_path):
    """`torch_compile: true` compiles the model around the scoring path; losses are the eager ones."""
    eager = make_trainer(tmp_path, max_steps=3)
    compiled = make_trainer(tmp_path, max_steps=3, torch_compile=True)
    eager.train()
    compiled.train()
    assert history(compiled) == pytest.approx(history(eager), rel=1e-4)
    assert history(compiled, "perf/compiled_graphs")[-1] >= 1
    print({name: value for name, value in compiled.state.log_history[-2].items() if "compile" in name})
