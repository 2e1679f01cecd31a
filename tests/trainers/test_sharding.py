"""Models without weights, as ranks have them that read none under FSDP2; the sharding runs in tests/distributed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import fsdp2_prepare_model
from transformers import AutoModelForCausalLM, modeling_utils

from prefopt import DPOConfig
from prefopt.scoring.plan import BatchPlan, GroupLengths
from prefopt.trainers.base import BaseTrainer
from prefopt.trainers.policy import load_model
from prefopt.trainers.sharding import (
    give_addresses,
    keep_second_partition,
    model_without_weights,
    reads_weights,
)
from tests.test_fences import must, parameters_of
from tests.tiny import tiny_model


@pytest.fixture
def folder(tmp_path):
    tiny_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    return str(tmp_path)


def test_a_model_without_weights_is_the_model_that_would_be_read(folder, monkeypatch):
    read = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    monkeypatch.setattr(modeling_utils, "safe_open", None)  # nothing is read
    empty = model_without_weights(folder, dtype="bfloat16", device_map=None)
    assert type(empty) is type(read)
    assert empty.config.name_or_path == folder
    for (name, weight), (wanted, real) in zip(empty.named_parameters(), read.named_parameters()):
        assert (name, weight.shape, weight.dtype) == (wanted, real.shape, real.dtype)
    assert model_without_weights(folder, dtype="auto").dtype == torch.float32  # the config's


def test_addresses_tell_parameters_apart_and_keep_tied_ones_together(folder):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_model("llama", tie_word_embeddings=True).config).bfloat16()
    model.model.norm.requires_grad_(False)
    give_addresses(model, upcast=True)
    parameters = dict(model.named_parameters())
    assert len({parameter.data_ptr() for parameter in parameters.values()}) == len(parameters)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {p.dtype for p in parameters.values() if p.requires_grad} == {torch.float32}
    assert parameters["model.norm.weight"].dtype == torch.bfloat16
    assert not parameters["model.norm.weight"].requires_grad


def test_weights_in_memory_stay_where_they_are():
    model = tiny_model()
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    give_addresses(model, upcast=True)
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == before


def test_every_rank_reads_unless_fsdp2_says_otherwise(folder, monkeypatch):
    args = DPOConfig(folder, use_cpu=True, model_init_kwargs={"device_map": None})
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    assert reads_weights()  # nothing is distributed here
    assert not any(parameter.is_meta for parameter in load_model(folder, args).parameters())


def test_a_warning_where_ranks_compute_unlike_numbers_of_tokens(capsys):
    lengths = [GroupLengths(size, size, 2, 10) for size in (100, 1000) * 8]
    plan = BatchPlan(lengths, groups_per_micro_batch=1, world_size=2, shuffle=False)
    trainer = SimpleNamespace(_warned_of_uneven_ranks=False)
    for _ in range(2):
        BaseTrainer._warn_of_uneven_ranks(trainer, plan)
    assert capsys.readouterr().err.count("one rank computes 10.0 times the tokens of another") == 1
    even = BatchPlan(lengths, groups_per_micro_batch=8, world_size=2, max_tokens_per_row=8192, shuffle=False)
    BaseTrainer._warn_of_uneven_ranks(SimpleNamespace(_warned_of_uneven_ranks=False), even)
    assert capsys.readouterr().err == ""


def test_accelerates_preparation_takes_what_we_pass():
    must(
        parameters_of(fsdp2_prepare_model) == ["accelerator", "model"],
        "accelerate",
        "`fsdp2_prepare_model` has other parameters",
        "the reference under FSDP2",
    )


def test_the_groups_of_hpz_are_made_once(monkeypatch):
    from deepspeed.utils import groups

    made = []
    monkeypatch.setattr(groups, "_create_zero_param_parallel_group", made.append)
    monkeypatch.setattr(groups, "_get_zero_param_intra_parallel_group", lambda: made or None)
    keep_second_partition()
    keep_second_partition()
    for _ in range(2):
        groups._create_zero_param_parallel_group(8)
    assert made == [8]
