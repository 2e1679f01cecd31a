"""Estimated memory against what training really holds, and against hand-made sums."""

from __future__ import annotations

from dataclasses import replace

import pytest
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoConfig, AutoTokenizer

from prefopt import DPOConfig, DPOTrainer
from prefopt.memory import Launch, ModelShape, estimate, optimizer_bytes
from prefopt.recipes import locate
from tests.tiny import tiny_model
from tests.tiny_runs import pair_rows, write_model

# Llama-3-8B: 32 layers of 218,112,000 parameters, two vocabularies of 128,256 x 4,096, a final norm
LLAMA = AutoConfig.for_model(
    "llama", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, vocab_size=128256,
)  # fmt: skip
N = 8_030_261_248


def parts(shape, launch, **changes):
    settings = {
        "dtype": "float32", "bf16": True, "optimizer": "adamw_torch", "tokens": 1000, "scored_tokens": 500,
    }  # fmt: skip
    return estimate(shape, launch, **{**settings, **changes}).parts


@pytest.fixture(scope="module")
def shape():
    return ModelShape.of(LLAMA)


def test_shape_of_a_known_model(shape):
    assert shape.parameters == N
    assert shape.largest_layer == 218_112_000
    assert shape.linear_parameters == 32 * (218_112_000 - 2 * 4096)
    assert shape.embedding_parameters == 2 * 128256 * 4096
    assert (shape.layers, shape.width, shape.feed_forward, shape.vocabulary) == (32, 4096, 14336, 128256)


def test_zero3_shards_everything_over_its_processes(shape):
    launch = Launch.read(locate("deepspeed_zero3", "accelerate_configs"))
    assert launch.processes == 8
    found = parts(shape, launch)
    assert found["weights"] == found["gradients"] == found["reference"] == 2 * N / 8
    assert found["optimizer"] == 12 * N / 8  # float32 master copy and two moments
    assert parts(shape, launch, optimizer="rmsprop")["optimizer"] == 8 * N / 8


def test_zero2_keeps_weights_whole(shape):
    found = parts(shape, Launch.read(locate("deepspeed_zero2", "accelerate_configs"), processes=4))
    assert found["weights"] == found["reference"] == 2 * N
    assert found["gradients"] == 2 * N / 4


def test_offloaded_parts_leave_the_gpu(shape):
    found = parts(shape, Launch.read(locate("deepspeed_zero3_offload", "accelerate_configs")))
    assert found["weights"] == found["optimizer"] == found["reference"] == 0


def test_fsdp_shards_float32_weights(shape):
    found = parts(shape, Launch.read(locate("fsdp2", "accelerate_configs")))
    assert found["weights"] == 4 * N / 8
    assert found["optimizer"] == 8 * N / 8


def test_activations_and_log_probs(shape):
    found = parts(shape, Launch())
    one_layer = 1000 * (16 * 4096 + 6 * 14336) * 2
    assert found["activations"] == 2 * 1000 * 4096 * 32 + one_layer
    assert parts(shape, Launch(), checkpointing=False)["activations"] == 32 * one_layer
    assert found["log-probs"] == 8 * 500 * 32768


def test_four_bit_adapter(shape):
    adapter = LoraConfig(r=8, target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapted = ModelShape.of(LLAMA, adapter)
    trained = adapted.trained
    assert trained == 32 * 8 * (4096 + 4096)
    assert replace(adapted, trained=N) == shape
    found = parts(adapted, Launch(), dtype="bfloat16", four_bit=True, keeps_reference=False)
    rest = N - shape.linear_parameters
    assert found["weights"] == pytest.approx(0.56 * shape.linear_parameters + 2 * rest + 2 * trained)
    assert found["gradients"] == 2 * trained
    assert found["reference"] == 0


@pytest.mark.parametrize(
    ("name", "size"),
    [("adamw_torch", 8), ("rmsprop", 4), ("paged_adamw_8bit", 2), ("paged_adamw_32bit", 8), ("sgd", 0)],
)
def test_optimizer_states(name, size):
    assert optimizer_bytes(name) == size


def test_against_what_training_holds(tmp_path):
    """Weights, gradients, optimizer and reference of a run in float32 on one process, counted tensor by tensor."""
    folder = write_model(tmp_path / "model")
    args = DPOConfig(
        str(tmp_path),
        use_cpu=True,
        bf16=False,
        max_steps=1,
        per_device_train_batch_size=2,
        report_to="none",
        save_strategy="no",
    )
    dataset = Dataset.from_list(pair_rows(2))
    trainer = DPOTrainer(
        str(folder), args=args, train_dataset=dataset, processing_class=AutoTokenizer.from_pretrained(folder)
    )
    held = {}

    def count(optimizer, *_):
        held["gradients"] = sum(4 * p.grad.numel() for p in trainer.model.parameters())

    trainer.create_optimizer()
    trainer.optimizer.register_step_pre_hook(count)
    trainer.train()
    states = trainer.optimizer.state.values()
    held["optimizer"] = sum(4 * value.numel() for state in states for name, value in state.items() if name != "step")
    held["weights"] = sum(4 * parameter.numel() for parameter in trainer.model.parameters())
    held["reference"] = sum(4 * parameter.numel() for parameter in trainer.ref_model.parameters())
    found = parts(ModelShape.of(tiny_model().config), Launch(), bf16=False)
    assert {name: found[name] for name in held} == held


def test_hybrid_sharding_divides_by_the_processes_of_a_copy(shape):
    hybrid = Launch.read(locate("fsdp2_hsdp", "accelerate_configs"))
    assert (hybrid.processes, hybrid.machines, hybrid.shards) == (16, 2, 8)
    assert parts(shape, hybrid) == parts(shape, Launch.read(locate("fsdp2", "accelerate_configs")))


def test_the_second_partition_of_weights_is_counted(shape):
    launch = Launch.read(locate("deepspeed_zero3_hpz", "accelerate_configs"))
    assert (launch.zero_stage, launch.mixed_precision, launch.second_copy_over) == (3, "bf16", 8)
    found = parts(shape, launch)
    assert found["weights"] == found["reference"] == 2 * N / 16
    assert found["hpZ's copies"] == 2 * 2 * N / 8
