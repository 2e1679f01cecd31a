"""Completion scores against the model's own logits, for every architecture, layout and wrapper."""

from __future__ import annotations

import copy
import types

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from prefopt.scoring.layouts import PackedLayout, PaddedLayout
from prefopt.scoring.logprobs import install_scoring, load_balancing_loss, score_completions
from tests.scoring.helpers import plain_logps, plain_token_logits, random_groups
from tests.tiny import ARCHITECTURES, tiny_model

LAYOUTS = {
    "padded": PaddedLayout(0),
    "packed": PackedLayout(0),
    "packed, own prompts": PackedLayout(0, share_prompt=False),
}
GROUPS = random_groups(5, seed=1)
SHAPE = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}


def scored(model, layout, *, rows=(GROUPS[:2], GROUPS[2:]), **options):
    install_scoring(model)
    return score_completions(model, layout.collate(rows), **options)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scores_and_gradients_equal_the_models_own_logits(architecture, layout):
    model = tiny_model(architecture)
    plain = plain_logps(model, GROUPS)
    weights = torch.linspace(-1, 1, len(plain))
    (plain * weights).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    scores = scored(model, layout)
    (scores.logps * weights).sum().backward()

    torch.testing.assert_close(scores.logps, plain, rtol=1e-5, atol=1e-5)
    assert scores.counts.tolist() == [len(tokens) for group in GROUPS for tokens in group.completions]
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert got.keys() == expected.keys()
    for name in expected:
        scale = expected[name].abs().max()
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-5 * float(scale) + 1e-7, msg=name)


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_eager_attention_packs_as_well(architecture):
    model = tiny_model(architecture, attn_implementation="eager")
    plain = plain_logps(model, GROUPS)
    torch.testing.assert_close(scored(model, LAYOUTS["packed"]).logps, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("alignment", ["sampled", "greedy", "none"])
def test_alignments_are_wpos_formulas(alignment, layout):
    model = tiny_model("gemma2")  # with a soft cap on its logits
    expected = []
    for group in GROUPS:
        for completion in range(2):
            logits, ids = plain_token_logits(model, group, completion)
            logp = logits.double().log_softmax(-1)
            taken = logp.gather(-1, ids[:, None])[:, 0]
            against = {
                "sampled": logp.exp().square().sum(-1).log(),
                "greedy": logp.amax(-1),
                "none": torch.zeros(len(ids)),
            }[alignment]
            expected.append((taken - against).mean())
    got = scored(model, layout, alignment=alignment)
    torch.testing.assert_close(got.mean_aligned_logps.double(), torch.stack(expected), rtol=1e-5, atol=1e-5)
    assert not got.mean_aligned_logps.requires_grad


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_vocabulary_statistics(layout):
    model = tiny_model("llama")
    entropy, mean_logits, top1 = [], [], []
    for group in GROUPS:
        for completion in range(2):
            logits, ids = plain_token_logits(model, group, completion)
            logp = logits.log_softmax(-1)
            entropy.append(-(logp.exp() * logp).sum())
            mean_logits.append(logits.mean(-1).sum())
            top1.append((logits.argmax(-1) == ids).float().sum())
    got = scored(model, layout, vocab_statistics=True)
    torch.testing.assert_close(got.entropy, torch.stack(entropy), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(got.mean_logits, torch.stack(mean_logits), rtol=1e-4, atol=1e-4)
    assert torch.equal(got.top1, torch.stack(top1))


def test_perturbing_one_pair_changes_no_other_and_chosen_does_not_touch_rejected():
    model = tiny_model("llama")
    before = scored(model, LAYOUTS["packed"], rows=[GROUPS]).logps
    changed = [copy.deepcopy(group) for group in GROUPS]
    changed[2].completions[0][0] = (changed[2].completions[0][0] + 7) % 390 + 3
    after = scored(model, LAYOUTS["packed"], rows=[changed]).logps
    differs = (before - after).abs() > 1e-6
    assert differs.tolist() == [completion == 4 for completion in range(10)]


def test_nothing_after_a_scored_token_changes_it():
    model = tiny_model("llama")
    batch = LAYOUTS["packed"].collate([GROUPS[:1], GROUPS[1:]])
    install_scoring(model)
    before = score_completions(model, batch).logps
    padding = batch["token_weights"] == 0
    noisy = {**batch, "input_ids": batch["input_ids"].masked_fill(padding, 77)}
    assert padding.any()
    torch.testing.assert_close(score_completions(model, noisy).logps, before)


@pytest.mark.parametrize("layout", list(LAYOUTS.values())[:2], ids=["padded", "packed"])
def test_bf16_packing_errs_no_more_than_padding(layout):
    exact = plain_logps(tiny_model("llama"), GROUPS)
    half = tiny_model("llama").to(torch.bfloat16)
    error = {name: (scored(half, LAYOUTS[name]).logps - exact).abs().max() for name in ("padded", "packed")}
    assert scored(half, layout).logps.dtype == torch.float32
    assert error["packed"] <= 2 * error["padded"]


def test_gradient_checkpointing_changes_nothing():
    grads = []
    for checkpointing in (False, True):
        model = tiny_model("llama").train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        scored(model, LAYOUTS["packed"]).logps.sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*grads)


def test_the_plain_forward_and_generation_are_left_alone():
    model = tiny_model("llama")
    ids = torch.tensor([[5, 6, 7]])
    before, text = model(input_ids=ids).logits, model.generate(ids, max_new_tokens=5, do_sample=False)
    install_scoring(model)
    install_scoring(model)  # twice changes nothing
    assert torch.equal(model(input_ids=ids).logits, before)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), text)


@pytest.mark.parametrize(
    ("architecture", "overrides"),
    [
        ("gemma2", {"final_logit_softcapping": 5.0}),
        ("granite", {"logits_scaling": 7.0}),
        ("cohere", {"logit_scale": 0.3}),
        ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
        (
            "minicpm3",
            {"dim_model_base": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8},
        ),
    ],
)
def test_logits_are_scaled_and_capped_as_the_model_does(architecture, overrides):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **SHAPE, pad_token_id=0, **overrides))
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)  # so that scale and cap show
    torch.testing.assert_close(
        scored(model.eval(), LAYOUTS["padded"]).logps, plain_logps(model, GROUPS), rtol=1e-4, atol=1e-4
    )


def test_a_model_whose_logits_come_about_otherwise_is_refused():
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("modernbert-decoder", **SHAPE, pad_token_id=0))
    with pytest.raises(ValueError, match="ModernBertDecoderForCausalLM does more to its logits"):
        install_scoring(model)
    assert "_plain_forward" not in model.__dict__


def test_a_deep_copy_scores_with_its_own_weights():
    model = tiny_model("llama")
    install_scoring(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.mul_(1.5)
    batch = LAYOUTS["packed"].collate([GROUPS])
    install_scoring(twin)
    logps = score_completions(twin, batch).logps
    torch.testing.assert_close(logps, plain_logps(twin, GROUPS), rtol=1e-5, atol=1e-5)
    assert (logps - score_completions(model, batch).logps).abs().max() > 1e-3


def test_accelerate_can_take_its_mixed_precision_off_again():
    from accelerate.utils import convert_outputs_to_fp32, extract_model_from_parallel

    model = tiny_model("llama")
    install_scoring(model)
    batch = LAYOUTS["packed"].collate([GROUPS])
    before = score_completions(model, batch).logps
    model._original_forward = model.forward  # as Accelerator.prepare_model does
    model.forward = types.MethodType(convert_outputs_to_fp32(model.forward.__func__), model)
    extract_model_from_parallel(model, keep_fp32_wrapper=False)
    assert torch.equal(score_completions(model, batch).logps, before)


def test_no_tensor_of_sequence_times_vocabulary_is_made():
    """With 64 scored of 1,000 tokens and a vocabulary of 5,000, no tensor may hold 1,000 x 5,000 numbers."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, torch.Tensor):
                    self.numel = max(self.numel, tensor.numel())
            return out

    groups = random_groups(1, seed=2, vocab_size=5000)
    groups = [type(groups[0])(list(range(3, 903)), [list(range(10, 42)), list(range(50, 82))])]
    model = tiny_model("llama", vocab_size=5000, max_position_embeddings=1024)
    install_scoring(model)
    batch = LAYOUTS["packed"].collate([groups])
    with Largest() as largest:
        score_completions(model, batch, vocab_statistics=True).logps.sum().backward()
    assert largest.numel < 5000 * 900


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_auxiliary_loss_is_the_same_in_every_layout_and_that_of_transformers(layout):
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    model = tiny_model("mixtral")
    install_scoring(model)
    padded = LAYOUTS["padded"].collate([GROUPS])
    outputs = model(
        input_ids=padded["input_ids"],
        attention_mask=padded["attention_mask"],
        position_ids=padded["position_ids"],
        output_router_logits=True,
    )
    expected = load_balancing_loss_func(outputs.router_logits, 4, 2, padded["attention_mask"].long())
    torch.testing.assert_close(scored(model, layout, aux_loss=True).aux_loss, expected, rtol=1e-5, atol=1e-6)


def test_balanced_routing_has_the_smallest_auxiliary_loss():
    """Each of 4 experts takes 1/4 of the tokens at probability 1/4 and k = 1: 4 * 4 * (1/4 * 1/4) = 1."""
    logits = 50 * torch.eye(4)
    assert load_balancing_loss((logits,), torch.ones(4), top_k=1).item() == pytest.approx(1.0, abs=1e-5)
    one_expert = torch.tensor([[50.0, 0, 0, 0]]).repeat(4, 1)
    assert load_balancing_loss((one_expert,), torch.ones(4), top_k=1).item() == pytest.approx(4.0, abs=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_fully_sharded_model_scores_and_trains_like_the_plain_one(layout, tmp_path):
    """torch's `fully_shard` around the model and our forward, on a mesh of one CPU rank: parameters are DTensors."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    plain = tiny_model("llama")
    scored(plain, layout).logps.sum().backward()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = tiny_model("llama")
        install_scoring(model)
        mesh = dist.init_device_mesh("cpu", (1,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        scores = scored(model, layout)
        scores.logps.sum().backward()
        assert all(isinstance(p, DTensor) for p in model.parameters())
        for (name, p), q in zip(model.named_parameters(), plain.parameters()):
            torch.testing.assert_close(p.grad.full_tensor(), q.grad, rtol=1e-4, atol=1e-5, msg=name)
    finally:
        dist.destroy_process_group()


def test_score_weights_weigh_tokens():
    model = tiny_model("llama")
    install_scoring(model)
    batch = LAYOUTS["packed"].collate([GROUPS])
    full = score_completions(model, batch).logps
    half = score_completions(
        model,
        {**batch, "score_weights": torch.full_like(batch["score_targets"], 0.5, dtype=torch.float)},
    ).logps
    torch.testing.assert_close(half, full / 2)
