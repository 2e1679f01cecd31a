"""How a trainer runs: metrics of a log, the watch for non-finite losses, precision, checkpoints and their damage."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import subprocess
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import Trainer

import prefopt
from benchmarks.trajectories import COMMON, comparison_rows, make_model, make_tokenizer, pair_rows, scored
from prefopt._transformers import HookedTrainer
from prefopt.trainers import precision
from prefopt.trainers.checkpoints import last_checkpoint
from prefopt.trainers.metrics import MetricLog
from prefopt.trainers.precision import round_stochastically
from tests.tiny import tiny_model
from tests.trainers.pairs import history, make_trainer, preference_rows, weights_of

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


# ---- 16-bit weights


def half(dtype=torch.bfloat16):
    return make_model().to(dtype)


def trained(tmp_path, name="DPO", **settings):
    settings = {"learning_rate": 2e-5, "lr_scheduler_type": "constant", "max_steps": 60, "beta": 1.0} | settings
    trainer = any_trainer(tmp_path, name, **settings)
    trainer.train()
    return trainer


def fall(trainer) -> float:
    losses = history(trainer)
    return sum(losses[:4]) / 4 - sum(losses[-4:]) / 4


def test_bf16_weights_train_as_float32_ones(tmp_path, capsys):
    """The loss falls as far as in float32, by default, and no update is lost; without a remedy it falls less."""
    full, kept = trained(tmp_path), trained(tmp_path, model=half())
    assert "trainable weights are bfloat16" in (printed := capsys.readouterr().out)
    assert "float32 master copies" in printed
    assert all(p.dtype == torch.bfloat16 for p in kept.model.parameters())
    assert fall(kept) == pytest.approx(fall(full), rel=0.05)
    rounded = trained(tmp_path, model=half(), master_weights="stochastic")
    assert fall(rounded) == pytest.approx(fall(full), rel=0.1)
    with pytest.warns(UserWarning, match=r"trainable weights are bfloat16.*in \d+\.\d% of them"):
        plain = trained(tmp_path, model=half(), master_weights="none")
    assert fall(plain) < 0.8 * fall(full)
    lost = {trainer: history(trainer, "perf/updates_lost") for trainer in (full, kept, plain)}
    assert len(lost[full]) == 10  # steps
    assert lost[full][-1] < 0.01 and lost[kept][-1] < 0.01 and lost[plain][-1] > 0.2


@pytest.mark.parametrize("name", ["Reward", "RRHF"])
def test_other_trainers_keep_their_updates_too(tmp_path, name):
    trainer = any_trainer(tmp_path, name, model=half(), learning_rate=1e-6, max_steps=3)
    trainer.train()
    assert history(trainer, "perf/updates_lost")[-1] < 0.01


def test_bf16_adapters_train_as_float32_ones(tmp_path):
    options = {"peft_config": LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=["q_proj", "v_proj"])}
    runs = [
        trained(tmp_path, model=model, trainer_options=options, learning_rate=1e-4) for model in (make_model(), half())
    ]
    assert all(p.dtype == torch.bfloat16 for p in runs[1].model.parameters())
    assert fall(runs[1]) == pytest.approx(fall(runs[0]), rel=0.1)


@pytest.mark.parametrize("remedy", ["float32", "stochastic"])
def test_resumed_equals_uninterrupted_with_bf16_weights(tmp_path, remedy):
    settings = {"master_weights": remedy, "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole = trained(tmp_path, model=half(), **settings)
    resumed = any_trainer(
        tmp_path, "DPO", model=half(), learning_rate=2e-5, lr_scheduler_type="constant", beta=1.0, **settings
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    assert history(resumed) == history(whole)
    assert torch.equal(weights_of(resumed.model), weights_of(whole.model))
    masters = [group["params"] for trainer in (whole, resumed) for group in trainer.optimizer.param_groups]
    for mine, theirs in zip(masters[: len(masters) // 2], masters[len(masters) // 2 :]):
        assert all(torch.equal(p, q) for p, q in zip(mine, theirs))


def test_weights_that_are_changed_between_two_trainings_stay_changed(tmp_path):
    trainer = trained(tmp_path, model=half(), max_steps=1)
    with torch.no_grad():
        trainer.model.lm_head.weight.zero_()
    trainer.args.max_steps, trainer.args.learning_rate = 1, 0.0
    trainer.train()
    assert trainer.model.lm_head.weight.detach().abs().max().item() < 1e-3


def test_stochastic_rounding_is_exact_in_the_mean_and_the_same_for_one_seed():
    values = torch.full((100_000,), 1.0 + 2.0**-10)  # an eighth of the way from 1 to the next bfloat16
    rounded = [round_stochastically(values, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(rounded[0], rounded[1]) and not torch.equal(rounded[0], rounded[2])
    assert set(rounded[0].tolist()) == {1.0, 1.0 + 2.0**-7}
    assert rounded[0].double().mean().item() == pytest.approx(values[0].item(), abs=1e-4)
    edge = torch.tensor([math.inf, -math.inf, 0.0, -1.0])
    assert torch.equal(round_stochastically(edge, torch.Generator()), edge)


def test_stochastic_rounding_holds_one_copy_at_a_time_and_updates_as_the_optimizer_does(monkeypatch):
    """All copies at once would need the memory of master copies, which is what there is no room for."""
    sizes = (100, 300, 200)
    halves = [torch.nn.Parameter(torch.randn(size).bfloat16()) for size in sizes]
    whole = torch.nn.Parameter(torch.randn(50))
    exact = [torch.nn.Parameter(weight.detach().float().clone()) for weight in (*halves, whole)]
    groups = [{"params": halves[:2]}, {"params": [halves[2], whole], "lr": 1e-2}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, fused=True)
    masters = precision.MasterWeights(optimizer, keep=False, seed=3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    reference = torch.optim.AdamW([{"params": exact[:2]}, {"params": exact[2:], "lr": 1e-2}], lr=1e-3, fused=True)
    held, hooks = [], []
    optimizer.register_step_pre_hook(lambda *_: hooks.append("before"))
    optimizer.register_step_post_hook(lambda *_: hooks.append("after"))

    def recorded(values, generator):
        held.append(sum(copied.numel() for _, copied in masters.pairs))
        return round_stochastically(values, generator)

    monkeypatch.setattr(precision, "round_stochastically", recorded)
    for weight, other in zip((*halves, whole), exact):
        weight.grad = torch.randn(weight.shape).to(weight.dtype)
        other.grad = weight.grad.float()
    optimizer.step()
    scheduler.step()
    reference.step()
    assert held == list(sizes) and hooks == ["before", "after"]
    assert sum(copied.numel() for _, copied in masters.pairs) == 0
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 2] and len(optimizer.param_groups) == 2
    generator = torch.Generator().manual_seed(3 + 1)
    for weight, other in zip(halves, exact):
        assert torch.equal(weight, round_stochastically(other, generator).bfloat16())
    assert torch.equal(whole, exact[3])


def test_copies_that_do_not_fit_give_way_to_stochastic_rounding(tmp_path, monkeypatch, capsys):
    from prefopt.trainers import precision

    monkeypatch.setattr(precision, "_copies_fit", lambda device, numbers: False)
    trained(tmp_path, model=half(), max_steps=1)
    assert "rounded stochastically" in capsys.readouterr().out
    with pytest.warns(UserWarning, match="DeepSpeed"):
        trained(tmp_path, model=half(torch.float16), max_steps=1)


# ---- saving that is tried first


def bad_generation_config(trainer):
    trainer.model.generation_config.update(temperature=0.6, do_sample=False)


def bad_config(trainer):
    trainer.model.config.note = object()


def bad_tokenizer(trainer):
    trainer.processing_class.save_pretrained = None


def bad_arguments(trainer):
    trainer.args.note = lambda: None


def bad_method_state(trainer):
    trainer.method_state = lambda: {"a": object()}


def bad_card(trainer):
    trainer._paper = {"no title": ""}


@pytest.mark.parametrize(
    "damage", [bad_generation_config, bad_config, bad_tokenizer, bad_arguments, bad_method_state, bad_card]
)
@pytest.mark.parametrize("name", ["WPO", "Reward"])
def test_a_model_that_cannot_be_saved_is_not_trained(tmp_path, name, damage):
    if name == "Reward" and damage is bad_generation_config:
        pytest.skip("it generates nothing")
    trainer = any_trainer(tmp_path, name)
    damage(trainer)
    batches = poison(trainer, call=0, make_bad=None)
    with pytest.raises(ValueError, match="The model could not be saved after training"):
        trainer.train()
    assert not batches
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_the_trial_leaves_nothing_and_finds_nothing_wrong_with_adapters(tmp_path):
    options = {"peft_config": LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])}
    trainer = any_trainer(tmp_path, "DPO", trainer_options=options, max_steps=1)
    trainer.train()
    assert not list((tmp_path / "out").iterdir())
    trainer.save_model()
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_a_folder_that_cannot_be_written_stops_the_run_before_its_first_step(tmp_path):
    trainer = any_trainer(tmp_path, "DPO")
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "out").write_text("a file")
    with pytest.raises(ValueError, match="out cannot be written"):
        trainer.train()


def test_a_disk_without_room_for_the_checkpoints_stops_the_run_before_its_first_step(tmp_path, monkeypatch):
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4}
    trainer = any_trainer(tmp_path, "DPO", **settings)
    weights = 4 * weights_of(trainer.model).numel()
    needed = 4 * 3 * weights + weights  # weights and two moments in each of four checkpoints, and the model
    free = [needed - 1]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free[0]))
    with pytest.raises(ValueError, match=r"4 checkpoints and the model.*save_total_limit"):
        trainer.train()
    assert not list((tmp_path / "out").iterdir())
    any_trainer(tmp_path, "DPO", **settings, save_total_limit=1).train()  # two at a time


def test_weights_are_saved_although_something_beside_them_cannot_be(tmp_path):
    """Where a model was fine at the start, its weights survive what was done to its config since."""
    for options in ({}, {"peft_config": LoraConfig(r=2, target_modules=["q_proj"])}):
        trainer = any_trainer(tmp_path, "DPO", max_steps=1, trainer_options=options)
        trainer.train()
        model = trainer.model.get_base_model() if options else trainer.model
        model.generation_config.update(temperature=0.6, do_sample=False)
        if options:
            trainer.processing_class.save_pretrained = None
        with pytest.raises((ValueError, TypeError)):
            trainer.save_model(str(tmp_path / "final"))
        saved = {k: v for path in (tmp_path / "final").glob("*.safetensors") for k, v in load_file(path).items()}
        expected = get_peft_model_state_dict(trainer.model) if options else trainer.model.state_dict()
        assert all(torch.equal(saved[name], tensor) for name, tensor in expected.items())
        shutil.rmtree(tmp_path / "final")


# ---- checkpoints


def no_optimizer(checkpoint):
    (checkpoint / "optimizer.pt").unlink()


def no_schedule(checkpoint):
    (checkpoint / "scheduler.pt").unlink()


def no_weights(checkpoint):
    (checkpoint / "model.safetensors").unlink()


def no_random_state(checkpoint):
    (checkpoint / "rng_state.pth").unlink()


def flipped(name, place=-1):
    def flip(checkpoint):
        data = bytearray((checkpoint / name).read_bytes())
        data[place if place < 0 else len(data) // place] ^= 1
        (checkpoint / name).write_bytes(data)

    return flip


flipped_bit = flipped("model.safetensors")


def cut_off(name):
    def cut(checkpoint):
        data = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(data[: len(data) // 2])

    return cut


def written(name, text):
    return lambda checkpoint: (checkpoint / name).write_text(text)


DAMAGES = {
    "no optimizer": (no_optimizer, "optimizer.pt is missing"),
    "no schedule": (no_schedule, "scheduler.pt is missing"),
    "no weights": (no_weights, "model.safetensors is missing"),
    "no random state": (no_random_state, "rng_state.pth is missing"),
    "flipped bit": (flipped_bit, "model.safetensors is not what was written"),
    "cut weights": (cut_off("model.safetensors"), "model.safetensors has"),
    "cut optimizer": (cut_off("optimizer.pt"), "optimizer.pt has"),
    "cut state": (cut_off("trainer_state.json"), "was not written to its end"),
    "flipped optimizer": (flipped("optimizer.pt", 2), "optimizer.pt is not what was written"),
    "flipped random state": (flipped("rng_state.pth", 2), "rng_state.pth is not what was written"),
    "state without a step": (written("trainer_state.json", "{}"), "was not written to its end"),
    "state that is a list": (written("trainer_state.json", "[]"), "was not written to its end"),
    "record": (written("checkpoint_files.json", "{"), "checkpoint_files.json cannot be read"),
    "list as record": (written("checkpoint_files.json", "[]"), "checkpoint_files.json cannot be read"),
    "numbers as record": (written("checkpoint_files.json", '{"a": 3}'), "checkpoint_files.json cannot be read"),
    "deep record": (written("checkpoint_files.json", "[" * 99999), "checkpoint_files.json cannot be read"),
}


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    any_trainer(folder, "DPO", save_strategy="steps", save_steps=2).train()
    return folder / "out"


@pytest.mark.parametrize("recorded", [True, False], ids=["", "older release"])
@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_left_out_for_the_next_older_one(tmp_path, saved_run, kind, recorded, capsys):
    damage, words = DAMAGES[kind]
    if not recorded and (kind in ("flipped bit", "no random state") or "record" in kind):
        pytest.skip("nothing tells")
    shutil.copytree(saved_run, tmp_path / "out")
    for checkpoint in (tmp_path / "out").glob("checkpoint-*"):
        if not recorded:
            (checkpoint / "checkpoint_files.json").unlink()
    newest, older = tmp_path / "out" / "checkpoint-4", tmp_path / "out" / "checkpoint-2"
    damage(newest)
    assert last_checkpoint(tmp_path / "out") == str(older)
    printed = capsys.readouterr().err
    assert str(newest) in printed and "left out" in printed
    assert not recorded or words in printed
    with pytest.raises(ValueError, match=r"holds no whole checkpoint.*begin the optimizer"):
        any_trainer(tmp_path, "DPO").train(resume_from_checkpoint=str(newest))


def test_the_run_continues_from_the_older_checkpoint_as_if_it_had_not_stopped(tmp_path, saved_run):
    shutil.copytree(saved_run, tmp_path / "out")
    flipped_bit(tmp_path / "out" / "checkpoint-4")
    trainer = any_trainer(tmp_path, "DPO", save_strategy="steps", save_steps=2)
    trainer.train(resume_from_checkpoint=True)
    expected = load_file(saved_run / "checkpoint-4" / "model.safetensors")
    assert all(torch.equal(trainer.model.state_dict()[name], tensor) for name, tensor in expected.items())
    assert last_checkpoint(tmp_path / "out") == str(tmp_path / "out" / "checkpoint-4")


def test_a_damaged_state_of_the_method_is_one_line(tmp_path, saved_run):
    """Of a release that kept no record."""
    shutil.copytree(saved_run, tmp_path / "out")
    (tmp_path / "out" / "checkpoint-4" / "checkpoint_files.json").unlink()
    (tmp_path / "out" / "checkpoint-4" / "method_state.json").write_text("[]")
    with pytest.raises(ValueError, match=r"method_state.json is damaged .*: continue from another checkpoint"):
        any_trainer(tmp_path, "DPO").train(resume_from_checkpoint=True)


@pytest.mark.parametrize("limit", [1, 2])
def test_only_checkpoints_of_the_run_are_rotated(tmp_path, saved_run, limit):
    """Of later steps first, which the run has left behind; whatever else is called checkpoint-* is not its own."""
    out = tmp_path / "out"
    shutil.copytree(saved_run, out)
    for name in ("checkpoint-best", "checkpoint-2-copy", "checkpoint-9"):
        shutil.copytree(saved_run / "checkpoint-2", out / name)
    (out / "checkpoint-9" / "optimizer.pt").unlink()
    (out / "checkpoint-4").rename(tmp_path / "elsewhere")
    trainer = any_trainer(tmp_path, "DPO", save_strategy="steps", save_steps=2, save_total_limit=limit)
    trainer.train(resume_from_checkpoint=True)
    kept = ["checkpoint-4"] if limit == 1 else ["checkpoint-2", "checkpoint-4"]
    names = sorted(path.name for path in out.glob("checkpoint-*"))
    assert names == sorted([*kept, "checkpoint-2-copy", "checkpoint-best"])
    saved = torch.load(out / "checkpoint-4" / "training_args.bin", weights_only=False)
    assert trainer.args.save_total_limit == saved.save_total_limit == limit


def test_checkpoints_of_weights_alone_are_not_continued_from(tmp_path):
    any_trainer(tmp_path, "DPO", save_strategy="steps", save_steps=2, save_only_model=True).train()
    for start in (True, str(tmp_path / "out" / "checkpoint-2")):
        with pytest.raises(ValueError, match=r"has no optimizer state.*Start another run from its weights"):
            any_trainer(tmp_path, "DPO").train(resume_from_checkpoint=start)


# ---- disks


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("where", ["weights", "optimizer", "state"])
def test_a_full_disk_ends_the_run_in_one_line_and_it_continues_from_the_checkpoint_before(
    tmp_path, monkeypatch, where
):
    settings = {"save_strategy": "steps", "save_steps": 2}
    whole = any_trainer(tmp_path / "whole", "DPO", **settings)
    whole.train()
    trainer = any_trainer(tmp_path, "DPO", **settings)
    name = {"weights": "save_model", "optimizer": "_save_optimizer_and_scheduler", "state": "_save_rng_state"}[where]
    monkeypatch.setattr(
        HookedTrainer,
        name,
        lambda self, *a, **k: full() if self.state.global_step == 4 else getattr(Trainer, name)(self, *a, **k),
    )
    with pytest.raises(OSError, match=r"checkpoint-4 cannot be written: No space left.*GiB are free") as error:
        trainer.train()
    assert "\n" not in str(error.value)
    assert f"continue from {tmp_path / 'out' / 'checkpoint-2'} with --resume_from_checkpoint true" in str(error.value)
    assert not (tmp_path / "out" / "checkpoint-4").exists()
    monkeypatch.undo()
    again = any_trainer(tmp_path, "DPO", **settings)
    again.train(resume_from_checkpoint=True)
    assert torch.equal(weights_of(again.model), weights_of(whole.model))


def test_a_small_disk_that_really_fills_up(tmp_path):
    trainer = any_trainer(tmp_path, "DPO", save_strategy="steps", save_steps=1, max_steps=3)
    (tmp_path / "out").mkdir(exist_ok=True)
    size = 2 * 3 * 4 * weights_of(trainer.model).numel()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(tmp_path / "out")], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        with pytest.raises(ValueError, match="3 checkpoints and the model"):
            trainer.train()
        trainer.check_space = lambda: None
        with pytest.raises(OSError, match=r"checkpoint-\d cannot be written: .*continue from .*checkpoint-\d"):
            trainer.train()
        assert last_checkpoint(tmp_path / "out") is not None
    finally:
        subprocess.run(["umount", "-l", str(tmp_path / "out")], check=True)


def test_a_folder_that_is_taken_away_while_the_run_saves(tmp_path, monkeypatch):
    trainer = any_trainer(tmp_path, "DPO", save_strategy="steps", save_steps=2)
    after = trainer.after_weights_of_checkpoint
    monkeypatch.setattr(
        trainer, "after_weights_of_checkpoint", lambda folder: (after(folder), shutil.rmtree(tmp_path / "out"))
    )
    with pytest.raises(OSError, match=r"checkpoint-2 was removed while it was written to.*start the run again"):
        trainer.train()


def test_a_final_model_that_the_disk_does_not_take(tmp_path, monkeypatch):
    trainer = any_trainer(tmp_path, "DPO", save_strategy="steps", save_steps=2)
    trainer.train()
    monkeypatch.setattr(trainer.model, "save_pretrained", full)
    with pytest.raises(OSError, match=rf"{tmp_path / 'out'} cannot be written: .*continue from .*checkpoint-4"):
        trainer.save_model()


def test_errors_that_are_not_of_the_disk_stay_what_they_are(tmp_path, monkeypatch):
    trainer = any_trainer(tmp_path, "DPO", save_strategy="steps", save_steps=2)
    monkeypatch.setattr(trainer, "method_state", lambda: {}[0])
    trainer.check_saving = lambda: None
    with pytest.raises(KeyError):
        trainer.train()


def test_a_folder_with_a_generation_config_that_cannot_be_written_back_is_not_trained(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "generation_config.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "temperature": 0.6, "do_sample": False, "pad_token_id": 3})
    )
    trainer = any_trainer(tmp_path, "WPO", model=str(tmp_path / "model"))
    with pytest.raises(ValueError, match=r"could not be saved after training.*generation_config\.json"):
        trainer.train()


def test_a_logarithmic_warm_up_is_deepspeeds(tmp_path):
    """lr(step) = lr log(step) / log(W) below W = 6 steps, DeepSpeed's gamma one step on; then the linear
    schedule's."""
    rates = {}
    for kind in ("linear", "log"):
        settings = {"max_steps": 12, "warmup_steps": 6, "lr_scheduler_type": "linear", "learning_rate": 1e-3}
        run = make_trainer(tmp_path / kind, "DPO", warmup_type=kind, **settings)
        run.train()
        rates[kind] = [entry["learning_rate"] for entry in run.state.log_history if "learning_rate" in entry]
    expected = [1e-3 * math.log(max(step, 1)) / math.log(6) for step in range(6)]
    assert rates["log"][:6] == pytest.approx(expected) and rates["log"][6:] == rates["linear"][6:]
    assert rates["log"][2] > 1.1 * rates["linear"][2]


def test_ids_beyond_the_embeddings_of_the_reference_are_found_too(tmp_path):
    options = {"ref_model": tiny_model(vocab_size=16)}
    with pytest.raises(ValueError, match=r"set has the token id \d+, but the reference has 16 embeddings"):
        make_trainer(tmp_path, rows=preference_rows(4), trainer_options=options)


@pytest.mark.parametrize("set_name", ["train_dataset", "eval_dataset"])
def test_ids_beyond_the_embeddings_are_found_before_anything_runs(tmp_path, set_name):
    """Also where the trainer is built in Python, and in every set."""
    rows = preference_rows(4)
    with pytest.raises(ValueError, match=r"set has the token id \d+, but the model has 16 embeddings"):
        small = tiny_model(vocab_size=16)
        if set_name == "eval_dataset":
            low = {"prompt_ids": [3, 4], "chosen_ids": [5, 2], "rejected_ids": [6, 2]}
            make_trainer(tmp_path, model=small, rows=Dataset.from_list([low]), trainer_options={set_name: rows})
        else:
            make_trainer(tmp_path, model=small, rows=rows)
