"""Layers that are replaced or compiled: liger's and torch.compile's, on the policy and on its reference."""

from __future__ import annotations

from functools import partial

import pytest
import transformers.trainer

from prefopt.trainers import base, policy
from tests.tiny import tiny_model
from tests.trainers.pairs import history, make_trainer


def test_liger_patches_policy_and_reference_alike(tmp_path, monkeypatch):
    patched = []

    def patch(model, config):
        patched.append((model, config))

    monkeypatch.setattr(policy, "is_liger_kernel_available", lambda: True)
    monkeypatch.setattr(policy, "apply_liger_kernel", patch)
    monkeypatch.setattr(transformers.trainer, "apply_liger_kernel", patch)
    trainer = make_trainer(tmp_path, max_steps=1, use_liger_kernel=True, liger_kernel_config={"rope": False})
    trainer.train()
    settings = {"rope": False, "fused_linear_cross_entropy": False, "cross_entropy": False}
    assert [(model is trainer.ref_model, config) for model, config in patched] == [(True, settings), (False, settings)]
    assert patched[1][0] is trainer.model


def test_liger_that_is_not_installed_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(policy, "is_liger_kernel_available", lambda: False)
    with pytest.raises(ValueError, match=r"needs the package liger-kernel: pip install 'prefopt\[fast\]'"):
        make_trainer(tmp_path, use_liger_kernel=True)


def test_blocks_and_the_whole_are_not_compiled_both(tmp_path):
    with pytest.raises(ValueError, match="compile the same layers"):
        make_trainer(tmp_path, compile_blocks=True, torch_compile=True)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["none", "all"])
def test_compiled_blocks_train_alike(tmp_path, monkeypatch, checkpointing):
    """Blocks of policy and reference are compiled, weights keep their names, and figures are those of eager blocks."""
    monkeypatch.setattr(base, "compile_blocks", partial(policy.compile_blocks, backend="aot_eager"))
    settings = {"max_steps": 2, "learning_rate": 1e-2, "gradient_checkpointing": None, "checkpointing": checkpointing}
    plain = make_trainer(tmp_path, **settings)
    compiled = make_trainer(tmp_path, **settings, compile_blocks=True)
    plain.train()
    compiled.train()
    for figure in ("loss", "grad_norm", "rewards/margins"):
        assert history(compiled, figure) == pytest.approx(history(plain, figure), rel=1e-5, abs=1e-7)
    assert history(compiled, "perf/compiled_graphs")[-1] >= 1
    assert list(compiled.model.state_dict()) == list(tiny_model().state_dict())
    for model in (compiled.model, compiled.ref_model):
        assert all(layer._compiled_call_impl is not None for layer in model.model.layers)
