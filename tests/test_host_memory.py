"""Memory of a node beside its GPUs: what the estimate counts once, once a node or once a rank."""

from __future__ import annotations

from dataclasses import replace

import pytest

from prefopt.host_memory import estimate_host
from prefopt.memory import Launch, ModelShape, Run
from prefopt.recipes import locate
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def shape():
    return ModelShape.of(tiny_model().config)


def host(shape, name, **changes):
    launch = replace(Launch.read(locate(name, "accelerate_configs")), **changes)
    return estimate_host(Run(shape, launch, dtype="bfloat16", bf16=True, optimizer="adamw_torch"))


def test_every_rank_loads_policy_and_reference_without_sharding(shape):
    size = 2 * shape.parameters
    assert host(shape, "multi_gpu").parts["loading"] == host(shape, "deepspeed_zero2").parts["loading"] == 8 * 2 * size


def test_zero3_reads_one_model_after_the_other_on_the_first_rank(shape):
    assert host(shape, "deepspeed_zero3").parts["loading"] == 2 * shape.parameters
    assert host(shape, "deepspeed_zero3_multinode").parts["loading"] == 2 * shape.parameters


def test_fsdp2_reads_once_a_node(shape):
    found = host(shape, "fsdp2")
    assert found.parts["loading"] == (2 + 4) * shape.parameters  # 16 bits and the float32 weights that train
    assert host(shape, "fsdp2", reads_once_a_node=False).parts["loading"] == 8 * 6 * shape.parameters
    assert host(shape, "fsdp2_hsdp").parts == found.parts
    assert found.parts["saving"] == 8 * shape.parameters  # AdamW's two moments
    assert found.total == 8 * shape.parameters


def test_offloaded_parts_are_divided_over_all_nodes(shape):
    found = host(shape, "deepspeed_zero3_offload")
    weights, states = 2 * 2 * shape.parameters, (2 + 4 + 8) * shape.parameters
    assert found.parts["offloaded"] == weights + states
    assert host(shape, "deepspeed_zero3_offload", processes=16, machines=2).parts["offloaded"] * 2 == weights + states
    assert "at one time" in found.table()
