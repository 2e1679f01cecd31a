"""Estimated memory against what training really holds, and against hand-made sums."""

from __future__ import annotations

from dataclasses import replace

import pytest
from datasets import Dataset
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoTokenizer

from prefopt import DPOConfig, DPOTrainer
from prefopt.hardware import GIB
from prefopt.memory import (
    USABLE,
    Launch,
    ModelShape,
    Recomputation,
    Run,
    Widths,
    activation_bytes,
    choose_recomputation,
    choose_tokens,
    estimate,
    kept_of_a_layer,
    optimizer_bytes,
    recomputations,
    with_master_weights,
)
from prefopt.recipes import locate
from tests.tiny import tiny_model
from tests.tiny_runs import pair_rows, write_model

# Llama-3-8B: 32 layers of 218,112,000 parameters, two vocabularies of 128,256 x 4,096, a final norm
LLAMA = AutoConfig.for_model(
    "llama", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, vocab_size=128256,
)  # fmt: skip
N = 8_030_261_248
HEAD = 128_256 * 4096
NONE, SELECTIVE, ALL = (Recomputation(mode) for mode in ("none", "selective", "all"))
BF16 = Widths(2, 2)


def planned(shape, launch, **changes):
    return Run(shape, launch, **{"dtype": "float32", "bf16": True, "optimizer": "adamw_torch", **changes})


def parts(shape, launch, *, way=ALL, tokens=1000, scored_tokens=500, **changes):
    return estimate(planned(shape, launch, **changes), way, tokens=tokens, scored_tokens=scored_tokens).parts


@pytest.fixture(scope="module")
def shape():
    return ModelShape.of(LLAMA)


def test_shape_of_a_known_model(shape):
    assert shape.parameters == N
    assert shape.largest_layer == 218_112_000
    assert shape.linear_parameters == 32 * (218_112_000 - 2 * 4096)
    assert shape.embedding_parameters == 2 * 128256 * 4096
    assert (shape.layers, shape.width, shape.feed_forward, shape.vocabulary) == (32, 4096, 14336, 128256)
    assert (shape.heads, shape.query_width, shape.key_width, shape.head_parameters) == (32, 4096, 1024, HEAD)


def test_a_model_in_memory_is_counted_like_its_config():
    model = tiny_model()
    assert ModelShape.count(model) == ModelShape.of(model.config)
    adapter = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    adapted = ModelShape.count(get_peft_model(model, adapter))
    assert adapted == ModelShape.of(tiny_model().config, adapter)
    assert adapted.trained == 2 * 2 * (32 + 32 + 64 + 32)  # layers, rank
    assert replace(adapted, trained=adapted.parameters) == ModelShape.of(tiny_model().config)
    experts = ModelShape.count(tiny_model("mixtral"))
    assert experts.feed_forward == 2 * 64  # of both experts that a token meets


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


def test_activations_of_a_layer_by_hand(shape):
    """Bytes a token of one layer of an 8B in bf16: h = q = 4,096, k = 1,024, f = 14,336, 32 heads."""
    kept = kept_of_a_layer(shape, BF16)
    norms = 2 * (16_384 + 8_192)  # the input in float32, and the normalised one in bf16
    attention = 8_192 + 2 * 2_048 + 8_192 + 128  # queries, keys, values, result; log-sum-exps
    feed_forward = 4 * 28_672  # gate, its activation, up, their product
    assert kept["none"] == norms + 2 * 8_192 + attention + feed_forward == 200_832
    assert kept["selective"] == 8_192 + 3 * 8_192 + 2 * 2_048 + 2 * 8_192 + 2 * 28_672 + 2 * 128
    assert kept["all"] == 8_192
    fused = kept_of_a_layer(shape, Widths(2, 2, fused=True))
    assert fused["none"] == 2 * 8_192 + 2 * 8_192 + attention + 3 * 28_672


def test_activations_of_eight_pairs_of_an_8b(shape):
    """At UltraFeedback's 819 tokens a pair: 28 GiB with liger's layers, 40 GiB without, 2 GiB checkpointed."""
    tokens = 8 * 819
    of_mode = {way.mode: activation_bytes(shape, BF16, way, tokens=tokens) / GIB for way in (NONE, SELECTIVE, ALL)}
    assert of_mode["none"] == pytest.approx(40.4, abs=0.1)
    assert activation_bytes(shape, Widths(2, 2, fused=True), NONE, tokens=tokens) / GIB == pytest.approx(28.1, abs=0.1)
    assert of_mode["selective"] == pytest.approx(23, abs=1)
    assert of_mode["all"] == pytest.approx(2.8, abs=0.1)
    every_third = activation_bytes(shape, BF16, Recomputation("every_n", 3), tokens=tokens)
    kept = kept_of_a_layer(shape, BF16)
    assert every_third == tokens * (21 * kept["none"] + 11 * kept["all"] + kept["none"])


def test_the_lm_head(shape):
    found = parts(shape, Launch())
    assert found["log-probs"] == 8 * 500 * 4096 + 2 * 500 * 32768
    assert found["head gradient"] == 4 * HEAD  # 2 GiB at 128k words
    assert parts(shape, Launch(), dtype="bfloat16")["head gradient"] == 6 * HEAD  # and its 16-bit copy: 3.2 GB
    without = parts(shape, Launch(), scores_tokens=False)
    assert without["log-probs"] == without["head gradient"] == 0


def test_gradients_in_other_places(shape):
    ddp = parts(shape, Launch(processes=2))
    assert ddp["buckets"] == ddp["gradients"] == 4 * N
    assert parts(shape, Launch())["buckets"] == 0
    zero2 = Launch.read(locate("deepspeed_zero2", "accelerate_configs"))
    assert parts(shape, zero2)["buckets"] == 2 * 5e8
    fsdp = Launch.read(locate("fsdp2", "accelerate_configs"))
    assert parts(shape, fsdp)["whole gradients"] == 0
    assert parts(shape, fsdp, accumulates=True)["whole gradients"] == 4 * N
    layer, ends = 218_112_000, 2 * HEAD
    assert parts(shape, fsdp)["gathered"] == 2 * 2 * (2 * layer + ends) + 6 * ends
    zero3 = Launch.read(locate("deepspeed_zero3", "accelerate_configs"))
    assert parts(shape, zero3)["gathered"] == 2 * 2 * 1e9  # the policy's and the reference's
    assert parts(shape, zero3, keeps_reference=False)["gathered"] == 2 * 1e9


def test_the_optimizers_step_comes_after_the_activations(shape):
    """Float32 gradients of 16-bit weights exist when activations are gone: only what they need beyond them counts."""
    zero2 = Launch.read(locate("deepspeed_zero2", "accelerate_configs"))
    small = parts(shape, zero2, tokens=10, scored_tokens=5)
    passing = small["activations"] + small["log-probs"] + small["head gradient"]
    assert small["optimizer step"] == pytest.approx(4 * N / 8 - passing)
    assert parts(shape, zero2, way=NONE, tokens=16_000)["optimizer step"] == 0


@pytest.mark.parametrize("gpus", [1, 8, 64])
def test_against_deepspeeds_own_estimator(shape, gpus):
    """DeepSpeed counts 18 bytes a weight: its last 2 are the difference of float32 to 16-bit gradients (our step)."""
    zero3 = Launch(processes=gpus, zero_stage=3)
    found = parts(shape, zero3, keeps_reference=False)
    held = found["weights"] + found["gradients"] + found["optimizer"]
    _, theirs, layer = estimate_zero3_model_states_mem_needs(N, HEAD, gpus, 1, cpu_offload=False)
    assert theirs - layer == pytest.approx(held + 2 * N / gpus, abs=2)
    assert layer <= found["gathered"] + found["head gradient"]  # theirs: the LM head and its gradient, 4 bytes
    zero2 = parts(shape, replace(zero3, zero_stage=2), keeps_reference=False)
    held = zero2["weights"] + zero2["gradients"] + zero2["optimizer"]
    _, theirs = estimate_zero2_model_states_mem_needs(N, gpus, 1, cpu_offload=False)
    assert theirs == pytest.approx(held + 4 * N / gpus, abs=2)


def test_against_deepspeeds_estimator_with_offloading(shape):
    states = ("weights", "gradients", "optimizer")
    partly = Launch(processes=8, zero_stage=3, offload_optimizer=True)
    _, theirs, layer = estimate_zero3_model_states_mem_needs(N, HEAD, 8, 1, cpu_offload_params=False)
    assert sum(parts(shape, partly)[name] for name in states) == pytest.approx(theirs - layer, abs=2)
    wholly = replace(partly, offload_weights=True)
    _, theirs, layer = estimate_zero3_model_states_mem_needs(N, HEAD, 8, 1)
    assert sum(parts(shape, wholly)[name] for name in states) == theirs - layer == 0


# ---- what fits


def test_ways_of_recomputing_are_listed_from_the_cheapest():
    ways = recomputations(32)
    assert [way.mode for way in ways] == ["none", "every_n", "every_n", "selective", *["every_n"] * 3, "all"] or (
        [way.repeated for way in ways] == sorted(way.repeated for way in ways)
    )
    assert ways[0] == NONE
    assert ways[-1] == ALL
    assert SELECTIVE in ways
    assert SELECTIVE not in recomputations(32, selective=False)
    assert [way.mode for way in recomputations(1, selective=False)] == ["none", "all"]


def test_no_more_is_recomputed_than_the_card_asks_for(shape):
    """8 pairs of an 8B under ZeRO-3 on 8 GPUs; the room a card has decides, down to nothing that fits."""
    launch = Launch.read(locate("deepspeed_zero3", "accelerate_configs"))
    run = planned(shape, launch, dtype="bfloat16")
    size = {"tokens": 8 * 819, "scored_tokens": 8 * 629}
    ways = recomputations(32)
    assert choose_recomputation(run, ways, **size, available=80e9) == NONE  # nothing has to be recomputed
    for way, cheaper in zip(ways[1:], ways):
        needed = estimate(run, way, **size).total
        if needed < estimate(run, cheaper, **size).total:
            chosen = choose_recomputation(run, ways, **size, available=needed / USABLE + 1)
            assert chosen.repeated <= way.repeated
            assert estimate(run, chosen, **size).total <= needed + 1
    assert choose_recomputation(run, ways, **size, available=10e9) == ALL  # not refused


def test_tokens_of_a_micro_batch_fill_the_card(shape):
    launch = Launch.read(locate("deepspeed_zero3", "accelerate_configs"))
    run = planned(shape, launch, dtype="bfloat16")
    for card in (48e9, 80e9, 141e9):
        tokens = choose_tokens(run, recomputations(32), available=card)
        assert 4096 <= tokens <= 16384
        way = choose_recomputation(run, recomputations(32), tokens=tokens, scored_tokens=tokens, available=card)
        assert estimate(run, way, tokens=tokens, scored_tokens=tokens).total <= USABLE * card
    assert choose_tokens(run, recomputations(32), available=141e9) > 10_000
    assert choose_tokens(run, [ALL], available=1e9) == 512  # what does not fit is tried with the least


def test_an_8b_in_bf16_on_one_card_of_139_gib(shape):
    """Master copies do not fit, so that updates are rounded stochastically; without either the states are 75 GiB, and
    eight pairs of UltraFeedback (6,500 tokens) need no recomputation beside them."""
    card = 139 * GIB
    run = planned(shape, Launch(), dtype="bfloat16")
    assert with_master_weights(run, "auto", available=card).master_weights == "stochastic"
    assert with_master_weights(run, "auto", available=2 * card).master_weights == "float32"
    assert with_master_weights(run, "float32", available=card).master_weights == "float32"
    held = {}
    for remedy in ("float32", "stochastic", "none"):
        found = parts(shape, Launch(), dtype="bfloat16", master_weights=remedy)
        held[remedy] = sum(found[name] for name in ("weights", "reference", "gradients", "optimizer"))
    assert held == {"float32": 18 * N, "stochastic": 14 * N, "none": 10 * N}
    ways, plain = recomputations(shape.layers), replace(run, master_weights="none", fused=True)
    assert choose_recomputation(plain, ways, tokens=6500, scored_tokens=5000, available=card) == NONE
    assert choose_recomputation(run, ways, tokens=6500, scored_tokens=5000, available=card) == ways[-1]


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
    assert found["reference"] == found["head gradient"] == 0


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
    found = parts(ModelShape.count(trainer.model), Launch.of(trainer.accelerator), bf16=False)
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
