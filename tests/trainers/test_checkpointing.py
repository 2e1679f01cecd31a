"""Activation checkpointing: every mode gives the same gradients, keeps what memory.py says, and `auto` says why."""

from __future__ import annotations

import dataclasses
import gc

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.autograd.graph import saved_tensors_hooks

import prefopt
from prefopt.memory import Launch, ModelShape, Recomputation, Widths, activation_bytes
from prefopt.scoring.layouts import Group, PackedLayout
from prefopt.scoring.logprobs import install_scoring, score_completions
from prefopt.trainers import fitting
from prefopt.trainers.checkpointing import checkpoint_selectively
from tests.tiny import tiny_model
from tests.trainers import comparisons
from tests.trainers.pairs import COMMON, history, make_trainer, weights_of

MODES = {
    "every_n": {"checkpointing": "every_n"},
    "every third": {"checkpointing": "every_n", "gradient_checkpointing_kwargs": {"every_n_layers": 3}},
    "selective": {"checkpointing": "selective"},
    "all": {"checkpointing": "all"},
    "all, re-entrant": {"checkpointing": "all", "gradient_checkpointing_kwargs": {"use_reentrant": True}},
}
LORA = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
UNSET = {key: value for key, value in COMMON.items() if key != "gradient_checkpointing"}


def config(tmp_path, **settings):
    return prefopt.DPOConfig(str(tmp_path), **{**UNSET, **settings})


# ---- the setting


@pytest.mark.parametrize(
    ("settings", "mode", "switched_on"),
    [
        ({}, "auto", None),
        ({"gradient_checkpointing": True}, "all", True),
        ({"gradient_checkpointing": False}, "none", False),
        ({"checkpointing": "auto", "gradient_checkpointing": True}, "all", True),
        ({"activation_checkpointing": True}, "all", True),
        ({"gradient_checkpointing": True, "selective_checkpointing": True}, "selective", True),
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"every_n_layers": 4}}, "every_n", True),
        ({"gradient_checkpointing_kwargs": '{"every_n_layers": 4}'}, "every_n", True),
        ({"checkpointing": "none"}, "none", False),
        ({"checkpointing": "selective"}, "selective", True),
    ],
    ids=str,
)
def test_the_users_boolean_wins_and_transformers_reads_the_same(tmp_path, settings, mode, switched_on):
    args = config(tmp_path, **settings)
    for each in (args, dataclasses.replace(args), prefopt.DPOConfig(**init_values(args))):
        assert each.checkpointing == mode
        assert each.gradient_checkpointing is each.activation_checkpointing is switched_on
        assert each.gradient_checkpointing_kwargs == each.activation_checkpointing_kwargs


def init_values(args):
    return {f.name: getattr(args, f.name) for f in dataclasses.fields(args) if f.init and f.name != "bf16"} | {
        "bf16": False
    }


def test_the_n_of_every_n_is_two_unless_given(tmp_path):
    assert config(tmp_path, checkpointing="every_n").activation_checkpointing_kwargs == {"every_n_layers": 2}
    given = config(tmp_path, checkpointing="every_n", gradient_checkpointing_kwargs={"every_n_layers": 5})
    assert given.activation_checkpointing_kwargs == {"every_n_layers": 5}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"checkpointing": "none", "gradient_checkpointing": True}, "contradict each other"),
        ({"checkpointing": "all", "gradient_checkpointing": False}, "contradict each other"),
        ({"checkpointing": "some"}, "checkpointing"),
        ({"checkpointing": "selective", "gradient_checkpointing_kwargs": {"use_reentrant": True}}, "re-entrant"),
        ({"checkpointing": "selective", "gradient_checkpointing_kwargs": {"offload": True}}, "does not read offload"),
        ({"selective_checkpointing": True}, "checkpointing: selective"),
    ],
    ids=str,
)
def test_contradictions_are_one_line(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **settings)


# ---- the same numbers


def deep_model():
    return tiny_model(num_hidden_layers=4)


@pytest.fixture(scope="module")
def plain_runs(tmp_path_factory):
    def run(layout, adapted):
        options = {"peft_config": LORA} if adapted else None
        trainer = make_trainer(
            tmp_path_factory.mktemp("plain"), model=deep_model(), trainer_options=options, batch_layout=layout,
            max_steps=2, learning_rate=1e-2, checkpointing="none", gradient_checkpointing=None,
        )  # fmt: skip
        trainer.train()
        return trainer

    return {(layout, adapted): run(layout, adapted) for layout, adapted in [("packed", False), ("padded", True)]}


@pytest.mark.parametrize(("layout", "adapted"), [("packed", False), ("padded", True)], ids=["packed", "padded, LoRA"])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_trains_alike(tmp_path, plain_runs, mode, layout, adapted):
    """Losses, gradient norms and weights after two steps, with the live reference and WPO's weights."""
    trainer = make_trainer(
        tmp_path, model=deep_model(), trainer_options={"peft_config": LORA} if adapted else None, batch_layout=layout,
        max_steps=2, learning_rate=1e-2, gradient_checkpointing=None, **MODES[mode],
    )  # fmt: skip
    calls = count_layer_calls(trainer)
    trainer.train()
    plain = plain_runs[layout, adapted]
    for figure in ("loss", "grad_norm", "rewards/margins"):
        assert history(trainer, figure) == pytest.approx(history(plain, figure), rel=1e-6, abs=1e-8)
    torch.testing.assert_close(weights_of(trainer.model), weights_of(plain.model), rtol=1e-5, atol=1e-7)
    again = {"every_n": [0, 2], "every third": [0, 3]}.get(mode, [0, 1, 2, 3])
    assert [layer for layer in range(4) if calls[layer] > min(calls)] == (again if len(again) < 4 else [])
    assert (min(calls) if len(again) == 4 else max(calls)) == 2 * 2  # twice in each of two steps


def count_layer_calls(trainer):
    """Count how often the norm of each layer runs while gradients are needed."""
    calls = [0] * 4
    for name, module in trainer.model.named_modules():
        if name.endswith("input_layernorm"):
            number = int(name.split(".layers.")[1].split(".")[0])
            plain = module.forward

            def counted(*args, plain=plain, number=number):
                # re-entrant checkpointing runs forward without gradient first, as the reference's forward does
                calls[number] += trainer.model.training
                return plain(*args)

            module.forward = counted
    return calls


# ---- what is kept

FEW, MANY = 2, 6


def kept_bytes(model, batch, *, beyond_the_graph):
    """Bytes that a forward pass leaves for the backward one beside weights and batch, each storage once.

    What selective checkpointing keeps is not in the graph: then all tensors that have come to life are counted.
    """
    saved = []

    def keep(tensor):
        saved.append(tensor)
        return tensor

    known = [*model.parameters(), *model.buffers(), *(v for v in batch.values() if isinstance(v, torch.Tensor))]
    before = {tensor.untyped_storage().data_ptr() for tensor in known}
    gc.freeze()  # leaves what there is out of `get_objects`
    try:
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            scores = score_completions(model, batch)
        assert scores.logps.requires_grad
        if beyond_the_graph:
            gc.collect()
            saved = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
    finally:
        gc.unfreeze()
    shapes = {tuple(weight.shape) for weight in model.parameters() if weight.ndim == 2}
    shapes |= {shape[::-1] for shape in shapes}
    random_state = torch.get_rng_state().numel()  # checkpointing keeps it for every layer
    found = {}
    for tensor in saved:
        if tuple(tensor.shape) not in shapes and tensor.numel() != random_state:  # nor autocast's copies of weights
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(size for place, size in found.items() if place not in before)


def measured(layers, mode, dtype, autocast):
    model = tiny_model(
        num_hidden_layers=layers, hidden_size=64, intermediate_size=176, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16,
    ).to(dtype)  # fmt: skip
    install_scoring(model)
    model.train()
    if mode.mode != "none":
        model.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=mode.every)
    if mode.mode == "selective":
        checkpoint_selectively(model)
    groups = [Group(list(range(5, 45)), [list(range(50, 90)), list(range(90, 145))]) for _ in range(2)]
    batch = PackedLayout(0).collate([groups])
    tokens = batch["input_ids"].numel()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        kept = kept_bytes(model, batch, beyond_the_graph=mode.mode == "selective")
    return kept, tokens, ModelShape.count(model)


@pytest.mark.parametrize(
    ("dtype", "autocast", "widths"),
    [
        (torch.float32, False, Widths(4, 4)),
        (torch.bfloat16, False, Widths(2, 2)),
        (torch.float32, True, Widths(2, 4, casts=True)),
    ],
    ids=["float32", "bf16", "autocast"],
)
@pytest.mark.parametrize(
    "way", [Recomputation("none"), Recomputation("every_n", 2), Recomputation("selective"), Recomputation("all")],
    ids=str,
)  # fmt: skip
def test_activations_are_those_that_memory_predicts(way, dtype, autocast, widths):
    """Bytes alive after the forward of a packed row, of four layers more, as predicted to a few percent."""
    (more, tokens, large), (less, _, small) = (measured(layers, way, dtype, autocast) for layers in (MANY, FEW))
    predicted = activation_bytes(large, widths, way, tokens=tokens) - activation_bytes(
        small, widths, way, tokens=tokens
    )
    assert (more - less) / predicted == pytest.approx(1, abs=0.05)


# ---- auto


def test_on_a_cpu_nothing_is_recomputed(tmp_path, capsys):
    trainer = make_trainer(tmp_path, gradient_checkpointing=None)
    assert "Checkpointing: none (auto: nothing is recomputed on a CPU)." in capsys.readouterr().out
    assert trainer.args.checkpointing == "none"
    assert trainer.args.gradient_checkpointing is False


def test_a_config_stays_undecided_for_its_next_trainer(tmp_path):
    args = config(tmp_path, beta=0.1)
    first = make_trainer(tmp_path, gradient_checkpointing=None)
    assert first.args is not args
    assert args.checkpointing == "auto"


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
def test_auto_recomputes_less_on_a_larger_card(tmp_path, monkeypatch, capsys, adapted):
    """Cards from too small to large: the modes get cheaper, each says why, and the smallest card still trains."""
    repeated = []
    for card in (1_000, 3_000_000, 4_000_000, 10**9):
        monkeypatch.setattr(fitting, "card_bytes", lambda device, card=card: card)
        trainer = make_trainer(
            tmp_path, model=deep_model(), gradient_checkpointing=None,
            trainer_options={"peft_config": LORA} if adapted else None,
        )  # fmt: skip
        printed = capsys.readouterr().out
        way = fitting.recomputation_of(trainer.args)
        assert f"Checkpointing: {way} (auto: about " in printed
        assert ("without recomputation" in printed) == (way.mode != "none")
        assert trainer.args.activation_checkpointing is (way.mode != "none")
        repeated.append(way.repeated)
    assert repeated == sorted(repeated, reverse=True)
    assert repeated[0] == 1.0
    assert repeated[-1] == 0.0
    trainer.train()


def test_reward_models_are_estimated_without_an_lm_head(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fitting, "card_bytes", lambda device: 10**9)
    values = comparisons.settings(tmp_path, gradient_checkpointing=None, tokens_per_micro_batch="auto")
    trainer = prefopt.RewardTrainer(
        comparisons.backbone(),
        args=prefopt.RewardConfig(**values),
        train_dataset=comparisons.dataset(comparisons.comparison_rows(8)),
        processing_class=comparisons.TOKENIZER,
    )
    assert "Checkpointing: none (auto" in capsys.readouterr().out
    run = fitting.run_of(trainer)
    assert not run.scores_tokens
    assert not run.keeps_reference
    assert trainer.args.gradient_accumulation_steps == 1


def test_ddp_does_not_search_for_unused_weights_under_auto(tmp_path):
    """As under TRL's default of checkpointing everything: Trainer builds DDP's settings before `auto` is settled."""
    trainer = make_trainer(tmp_path, gradient_checkpointing=None)
    assert trainer.accelerator.ddp_handler.find_unused_parameters is False
    assert make_trainer(tmp_path).accelerator.ddp_handler.find_unused_parameters is True


def test_options_of_a_recipe_go_on_to_work_with_auto(tmp_path, monkeypatch):
    """Re-entrant checkpointing cannot be selective, so `auto` does not choose that."""
    monkeypatch.setattr(fitting, "card_bytes", lambda device: 1)
    options = {"use_reentrant": True}
    trainer = make_trainer(tmp_path, gradient_checkpointing=None, gradient_checkpointing_kwargs=options)
    assert trainer.args.checkpointing == "all"
    assert trainer.args.activation_checkpointing_kwargs == options
    run = fitting.run_of(trainer)  # before another config is made, which resets accelerate's state
    ways = fitting.ways_of(config(tmp_path, gradient_checkpointing_kwargs=options), run)
    assert "selective" not in {way.mode for way in ways}


def test_zero3_does_not_recompute_selectively(tmp_path):
    """It gathers within a layer, by other operations the second time, which torch's selective recomputation checks."""
    run = fitting.run_of(make_trainer(tmp_path))
    sharded = dataclasses.replace(run, launch=Launch(processes=8, zero_stage=3))
    assert "selective" in {way.mode for way in fitting.ways_of(config(tmp_path), run)}
    assert "selective" not in {way.mode for way in fitting.ways_of(config(tmp_path), sharded)}
    with pytest.raises(ValueError, match="does not work under ZeRO-3"):
        fitting.ways_of(config(tmp_path, checkpointing="selective"), sharded)


def test_a_quantised_models_weights_are_counted_unpacked():
    """bitsandbytes keeps two weights in a byte: the layer's own sizes count."""
    model = tiny_model()
    shape = ModelShape.count(model)
    for layer in model.model.layers:
        layer.mlp.up_proj.weight = torch.nn.Parameter(torch.zeros(64 * 32 // 2, 1))
    packed = ModelShape.count(model)
    assert packed.parameters == shape.parameters
    assert packed.linear_parameters == shape.linear_parameters


def test_a_model_with_an_adapter_is_counted_without_it():
    assert ModelShape.count(get_peft_model(tiny_model(), LORA)).parameters == ModelShape.count(tiny_model()).parameters
