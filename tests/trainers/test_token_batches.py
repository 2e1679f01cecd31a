"""Micro-batches of tokens: the optimizer step keeps its examples, its loss and its gradient."""

from __future__ import annotations

import pytest
import torch

from prefopt.pages import counted
from prefopt.trainers import fitting
from tests.trainers.pairs import Seen, history, make_trainer, preference_rows, weights_of

STEP = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4, "learning_rate": 1e-2}
FIGURES = ("loss", "grad_norm", "rewards/margins", "wpo/effective_pairs", "num_tokens", "epoch")


def trained(tmp_path, name, **settings):
    seen = Seen()
    trainer = make_trainer(tmp_path / name, rows=preference_rows(30), **{**STEP, **settings})
    seen.watch(trainer)
    trainer.train()
    return trainer, seen.batches


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_a_step_is_the_same_in_micro_batches_of_tokens(tmp_path, capsys, layout):
    """12 pairs a step, and 6 in the last one: the same figures and weights as four micro-batches of three pairs."""
    pairs, batches = trained(tmp_path, "pairs", batch_layout=layout)
    assert len(batches) == 3 * 4
    for tokens in (150, 10_000) if layout == "packed" else (250,):
        capsys.readouterr()
        each, batches = trained(tmp_path, str(tokens), batch_layout=layout, tokens_per_micro_batch=tokens)
        printed = capsys.readouterr().out
        count = each.args.gradient_accumulation_steps
        divided = counted(count, "micro-batch", "micro-batches")
        assert f"Each optimizer step of 12 examples runs as {divided} on each of 1 process, " in printed
        assert (count == 1) == (tokens == 10_000)
        assert len(batches) == 3 * count
        assert max(batch["input_ids"].numel() for batch in batches) <= tokens
        for figure in FIGURES:
            assert history(each, figure) == pytest.approx(history(pairs, figure), rel=1e-4, abs=1e-5)
        torch.testing.assert_close(weights_of(each.model), weights_of(pairs.model), rtol=1e-3, atol=2e-5)
        assert each.get_total_train_batch_size(each.args) == 12


def test_a_pair_larger_than_that_is_a_micro_batch_of_its_own(tmp_path, capsys):
    trainer, batches = trained(tmp_path, "out", tokens_per_micro_batch=20)
    assert trainer.args.gradient_accumulation_steps == 12
    assert {len(batch["row_ids"]) for batch in batches} == {1}
    assert "A single example has more tokens than that" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_resumes_in_micro_batches_of_another_size(tmp_path):
    settings = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 2, "tokens_per_micro_batch": 150}
    whole, _ = trained(tmp_path, "run", **settings)
    continued = make_trainer(
        tmp_path / "run", rows=preference_rows(30), **STEP, **{**settings, "tokens_per_micro_batch": 300}
    )
    continued.train(resume_from_checkpoint=str(tmp_path / "run" / "out" / "checkpoint-4"))
    assert continued.args.gradient_accumulation_steps < whole.args.gradient_accumulation_steps
    assert history(continued)[-2:] == pytest.approx(history(whole)[-2:], rel=1e-4)
    torch.testing.assert_close(weights_of(continued.model), weights_of(whole.model), rtol=1e-3, atol=2e-5)


def test_auto_keeps_pairs_on_a_cpu_and_fills_a_card(tmp_path, monkeypatch, capsys):
    trainer = make_trainer(tmp_path, tokens_per_micro_batch="auto")
    assert "keep `per_device_train_batch_size`" in capsys.readouterr().out
    assert trainer.args.gradient_accumulation_steps == 1
    monkeypatch.setattr(fitting, "card_bytes", lambda device: 10**12)
    trainer = make_trainer(tmp_path, tokens_per_micro_batch="auto", gradient_checkpointing=None, **STEP)
    printed = capsys.readouterr().out
    assert "runs as 1 micro-batch on each" in printed
    assert "`tokens_per_micro_batch: 16384`" in printed
    assert "Checkpointing: none (auto" in printed


def test_deepspeed_gets_numbers_that_fit_together(tmp_path):
    from types import SimpleNamespace

    trainer = make_trainer(tmp_path)
    plugin = SimpleNamespace(deepspeed_config={"train_batch_size": 4})
    trainer.is_deepspeed_enabled = True
    trainer.accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))
    trainer.divide_step(5)
    assert plugin.deepspeed_config == {
        "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 5, "train_batch_size": 5,
    }  # fmt: skip


@pytest.mark.parametrize("wrong", [0, -5, "many"])
def test_what_is_no_number_of_tokens_is_one_line(tmp_path, wrong):
    with pytest.raises(ValueError, match="must be a number of tokens or 'auto'"):
        make_trainer(tmp_path, tokens_per_micro_batch=wrong)
