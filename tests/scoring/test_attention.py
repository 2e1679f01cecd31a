"""Attention of packed rows is attention under the dense mask: values and gradients, backends and models."""

from __future__ import annotations

import inspect
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import repeat_kv

from prefopt.scoring import attention
from prefopt.scoring.attention import (
    PACKED_ATTENTION,
    CannotPackError,
    PackedAttention,
    PackedRows,
    Sequences,
    packed_attention,
    restore_attention,
    use_packed_attention,
)
from prefopt.scoring.layouts import Group, PackedLayout
from prefopt.scoring.logprobs import install_scoring, score_completions
from tests.scoring.helpers import dense_mask, plain_logps, random_groups
from tests.tiny import tiny_model

LAYER = torch.nn.Module()


@pytest.fixture(params=["flash kernels", "matrix products"])
def backend(request, monkeypatch):
    """The CPU's kernels, and the products that serve float32 on a GPU, in blocks of a few queries."""
    if request.param == "matrix products":
        monkeypatch.setattr(attention, "_CpuFlash", attention._Plain)
        monkeypatch.setattr(attention, "_PLAIN_BLOCK", 3)


def packed_rows(*, seed: int, count: int = 4, completions: int = 2, share: bool = True, split: int = 2) -> PackedRows:
    groups = random_groups(count, seed=seed, completions=completions)
    rows = [row for row in (groups[:split], groups[split:]) if row]
    return PackedLayout(0, share_prompt=share).collate(rows)["attention_mask"]


def heads(rows: PackedRows, *, query: int = 4, key: int = 4, width: int = 8, dtype=torch.float64, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(rows.rows, count, rows.length, width) for count in (query, key, key)]
    return [torch.randn(shape, generator=generator, dtype=dtype, requires_grad=True) for shape in shapes]


def expected(rows: PackedRows, query, key, value, *, scale: float, softcap=None, sinks=None) -> torch.Tensor:
    """(N, T, H, D) from whole score matrices."""
    groups = query.shape[1] // key.shape[1]
    scores = query @ repeat_kv(key, groups).transpose(2, 3) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~dense_mask(rows), float("-inf"))
    if sinks is not None:
        column = sinks[None, :, None, None].expand(*scores.shape[:3], 1)
        probs = torch.cat([scores, column], dim=-1).softmax(-1)[..., :-1]
    else:
        probs = scores.softmax(-1)
    return (probs @ repeat_kv(value, groups)).transpose(1, 2)


def assert_same(rows: PackedRows, inputs, *, rtol=1e-10, atol=1e-12, **options) -> None:
    sinks = options.get("sinks")
    keywords = {"softcap": options.get("softcap"), "s_aux": sinks}
    found, weights = packed_attention(LAYER, *inputs, rows, scaling=options["scale"], **keywords)
    wanted = expected(rows, *inputs, **options)
    assert weights is None
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=atol)
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(7), dtype=found.dtype)
    leaves = [*inputs, *([] if sinks is None else [sinks])]
    for ours, theirs in zip(
        torch.autograd.grad(found, leaves, upstream), torch.autograd.grad(wanted, leaves, upstream)
    ):
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    count=st.integers(1, 5),
    completions=st.integers(1, 3),
    share=st.booleans(),
    split=st.integers(0, 5),
)
def test_values_and_gradients_are_those_of_the_dense_mask(seed, count, completions, share, split):
    rows = packed_rows(seed=seed, count=count, completions=completions, share=share, split=split)
    assert_same(rows, heads(rows, seed=seed), scale=0.3)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_fewer_heads_of_keys(key_heads):
    rows = packed_rows(seed=1)
    assert_same(rows, heads(rows, key=key_heads), scale=0.4)


@pytest.mark.usefixtures("backend")
def test_float32(backend):
    rows = packed_rows(seed=2)
    assert_same(rows, heads(rows, dtype=torch.float32), scale=0.4, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("share", [True, False])
def test_attention_sinks_are_one_more_key(share):
    rows = packed_rows(seed=3, share=share)
    sinks = torch.linspace(-2, 2, 4, dtype=torch.float64, requires_grad=True)
    assert_same(rows, heads(rows, key=2), scale=0.4, sinks=sinks)


def test_capped_scores():
    rows = packed_rows(seed=4)
    assert_same(rows, heads(rows, key=2), scale=2.0, softcap=1.5)


def test_values_of_another_width_than_queries():
    rows = packed_rows(seed=5)
    query, key, value = heads(rows)
    narrow = value[..., :5].detach().requires_grad_()
    assert_same(rows, [query, key, narrow], scale=0.4)


def test_sixteen_bits_err_no_more_than_sdpa():
    rows = packed_rows(seed=6)
    inputs = heads(rows, dtype=torch.float32)
    exact = expected(rows, *inputs, scale=0.3)
    rounded = [each.detach().bfloat16().requires_grad_() for each in inputs]
    found, _ = packed_attention(LAYER, *rounded, rows, scaling=0.3)
    theirs = scaled_dot_product_attention(*rounded, attn_mask=dense_mask(rows), scale=0.3).transpose(1, 2)
    assert found.dtype == torch.bfloat16
    assert (found - exact).norm() <= 1.5 * (theirs - exact).norm()
    found.sum().backward()
    assert all(each.grad.isfinite().all() for each in rounded)


def test_queries_and_keys_in_float32_beside_values_in_bf16():
    """Rotary embeddings may return float32, and autocast leaves what it does not know as it is."""
    rows = packed_rows(seed=7)
    query, key, value = heads(rows, dtype=torch.float32)
    found, _ = packed_attention(LAYER, query, key, value.bfloat16(), rows, scaling=0.3)
    assert found.dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = packed_attention(LAYER, query, key, value, rows, scaling=0.3)
    assert found.dtype == torch.bfloat16


def test_a_prompt_without_tokens_stays_out_of_the_second_call():
    rows = PackedRows.of(1, 9, [(0, 4), (4, 6)], [((0, 0), (0, 4)), ((4, 4), (4, 6))], 4)
    assert rows.completions is None
    assert rows.segments.queries == (0, 4, 6, 9)  # padding attends to itself
    assert_same(rows, heads(rows), scale=0.3)


def test_what_it_cannot_compute_is_named():
    rows = packed_rows(seed=8)
    inputs = heads(rows)
    with pytest.raises(CannotPackError, match="dropout"):
        packed_attention(LAYER, *inputs, rows, dropout=0.1)
    with pytest.raises(CannotPackError, match="sliding window of 3"):
        packed_attention(LAYER, *inputs, rows, sliding_window=3)
    with pytest.raises(CannotPackError, match="counts places"):
        packed_attention(LAYER, *inputs, rows, position_bias=torch.zeros(1))
    packed_attention(LAYER, *inputs, rows, sliding_window=rows.longest)


def test_boundaries_move_and_copy_with_the_batch():
    rows = packed_rows(seed=9)
    moved = rows.to("meta", non_blocking=True)
    assert moved.segments.query_offsets.device.type == moved.completion_index.device.type == "meta"
    assert moved.segments.queries == rows.segments.queries
    assert rows.ndim == len(rows.shape) == 4


# ---- the CUDA backend, on a machine without a card


def test_the_operators_of_the_cuda_backend_are_those_that_it_was_written_for():
    """torch does not document these two; where this fails, compare `_CudaFlash` with torch.nn.attention.varlen."""
    forward, backward = (
        getattr(torch.ops.aten, f"_flash_attention_{direction}").default._schema
        for direction in ("forward", "backward")
    )
    offsets = ["Optional[Tensor]", "Optional[Tensor]"], ["Tensor", "Tensor"]
    shared = ["cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal"]
    numbers = ["int", "int", "float", "bool"]
    assert [a.name for a in forward.arguments][:11] == ["query", "key", "value", *shared, "return_debug_mask", "scale"]
    assert [str(a.type) for a in forward.arguments][:11] == [
        *["Tensor"] * 3, *offsets[0], *numbers, "bool", "Optional[float]"
    ]  # fmt: skip
    assert next(a.name for a in forward.arguments if a.kwarg_only) == "scale"
    assert all(a.has_default_value() for a in forward.arguments[10:])
    assert [r.name for r in forward.returns][:2] == ["output", "softmax_logsumexp"]
    tensors = ["grad_out", "query", "key", "value", "out", "logsumexp"]
    assert [a.name for a in backward.arguments][:15] == [*tensors, *shared, "rng_state", "unused", "scale"]
    assert [str(a.type) for a in backward.arguments][:15] == [
        *["Tensor"] * 6, *offsets[1], *numbers, "Tensor", "Tensor", "Optional[float]"
    ]  # fmt: skip
    assert all(a.has_default_value() for a in backward.arguments[14:])
    import torch.nn.attention.varlen as varlen

    source = inspect.getsource(varlen)
    assert "(num_heads, total_q)" in source  # the layout of the log-sum-exp
    # how torch itself calls the backward operator: the state of a dropout that is off, and an empty tensor
    assert "rng_state_ = torch.zeros(\n        (2,), dtype=torch.uint64" in source
    assert "unused = torch.empty(0, device=query.device)" in source


def _check_sequences(tensor, offsets, longest):
    """What the kernels demand of a tensor and its boundaries."""
    assert tensor.dim() == 3 and tensor.stride(-1) == 1
    assert offsets.dtype == torch.int32 and offsets.is_contiguous() and offsets.device == tensor.device
    lengths = offsets.diff()
    assert offsets[0] == 0 and offsets[-1] == len(tensor) and (lengths > 0).all() and lengths.max() == longest


def _parts(query, key, value, query_offsets, key_offsets, causal, scale):
    """Queries, keys, values and scores (H, q, k) of each sequence, in float64."""
    repeats = query.shape[1] // key.shape[1]
    for (a, b), (c, d) in zip(*(list(pairwise(offsets.tolist())) for offsets in (query_offsets, key_offsets))):
        q = query[a:b].double().transpose(0, 1)
        k, v = (each[c:d].double().transpose(0, 1).repeat_interleave(repeats, 0) for each in (key, value))
        scores = q @ k.transpose(1, 2) * scale
        if causal:
            scores = scores.masked_fill(torch.ones(b - a, d - c).triu(1).bool(), float("-inf"))
        yield (slice(a, b), slice(c, d)), q, k, v, scores


def _emulated_forward(query, key, value, cq, ck, max_q, max_k, dropout, causal, debug, *, scale=None, **windows):
    assert dropout == 0.0 and debug is False and all(each is None for each in windows.values())
    for tensor, offsets, longest in ((query, cq, max_q), (key, ck, max_k), (value, ck, max_k)):
        _check_sequences(tensor, offsets, longest)
    out, lse = torch.empty_like(query), query.new_empty(query.shape[1], len(query), dtype=torch.float32)
    for (rows, _), _, _, v, scores in _parts(query, key, value, cq, ck, causal, scale):
        out[rows] = (scores.softmax(-1) @ v).transpose(0, 1).to(out.dtype)
        lse[:, rows] = scores.logsumexp(-1).float()
    state = torch.zeros(2, dtype=torch.uint64)
    return out, lse, state, torch.zeros((), dtype=torch.uint64), query.new_empty(0)


def _emulated_backward(grad, query, key, value, out, lse, cq, ck, max_q, max_k, dropout, causal, rng, unused, *,
                       scale=None, **windows):  # fmt: skip
    assert rng.dtype == torch.uint64 and rng.shape == (2,) and unused.numel() == 0
    for tensor, offsets, longest in ((query, cq, max_q), (grad, cq, max_q), (out, cq, max_q), (key, ck, max_k)):
        _check_sequences(tensor, offsets, longest)
    assert lse.shape == (query.shape[1], len(query)) and lse.dtype == torch.float32 and lse.is_contiguous()
    grads = [torch.zeros(each.shape, dtype=torch.float64) for each in (query, key, value)]
    groups = query.shape[1] // key.shape[1]
    for (rows, keys), q, k, v, scores in _parts(query, key, value, cq, ck, causal, scale):
        upstream, outs = (each[rows].double().transpose(0, 1) for each in (grad, out))
        probs = (scores - lse[:, rows, None].double()).exp()
        slopes = probs * (upstream @ v.transpose(1, 2) - (upstream * outs).sum(-1, keepdim=True)) * scale
        grads[0][rows] += (slopes @ k).transpose(0, 1)
        grads[1][keys] += (slopes.transpose(1, 2) @ q).unflatten(0, (-1, groups)).sum(1).transpose(0, 1)
        grads[2][keys] += (probs.transpose(1, 2) @ upstream).unflatten(0, (-1, groups)).sum(1).transpose(0, 1)
    return tuple(each.to(like.dtype) for each, like in zip(grads, (query, key, value)))


@pytest.fixture
def cuda_backend(monkeypatch):
    """The CUDA backend on CPU tensors: torch's dispatcher checks the calls, an emulation of the kernels answers."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", _emulated_forward, "CPU")
    library.impl("_flash_attention_backward", _emulated_backward, "CPU")
    monkeypatch.setattr(attention, "_CpuFlash", attention._CudaFlash)
    yield
    library._destroy()


@pytest.mark.usefixtures("cuda_backend")
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_the_cuda_backend_calls_its_kernels_rightly(key_heads, share):
    rows = packed_rows(seed=11, completions=3, share=share)
    assert_same(rows, heads(rows, key=key_heads, dtype=torch.float32), scale=0.4, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("cuda_backend")
def test_the_cuda_backend_with_sinks():
    rows = packed_rows(seed=12)
    sinks = torch.linspace(-2, 2, 4, requires_grad=True)
    assert_same(rows, heads(rows, key=2, dtype=torch.float32), scale=0.4, sinks=sinks, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("dtype", "width", "kernel"), [
    (torch.bfloat16, 64, True),
    (torch.float16, 256, True),
    (torch.float32, 64, False),  # flash kernels take 16 bits
    (torch.bfloat16, 36, False),  # and widths that are multiples of 8
])  # fmt: skip
def test_which_tensors_on_a_card_go_to_the_flash_kernels(dtype, width, kernel):
    tensor = SimpleNamespace(device=torch.device("cuda"), dtype=dtype, shape=(10, 4, width))
    sequences = packed_rows(seed=13).segments
    call = attention._call(tensor, tensor, sequences, causal=True, scale=0.3, softcap=None)
    assert type(call) is (attention._CudaFlash if kernel else attention._Plain)
    capped = attention._call(tensor, tensor, sequences, causal=True, scale=0.3, softcap=2.0)
    assert type(capped) is attention._Plain


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shapes_of_the_cuda_backend_are_those_that_torch_declares(dtype):
    """On tensors without data torch runs its own declaration of both operators."""
    rows = packed_rows(seed=13)
    sequences = Sequences(
        rows.segments.queries,
        rows.segments.keys,
        *(torch.empty(len(rows.segments.queries), dtype=torch.int32, device="meta"),) * 2,
    )
    call = attention._CudaFlash(sequences, True, 0.3)
    tokens = rows.rows * rows.length
    query, key, value = (torch.empty(tokens, count, 64, dtype=dtype, device="meta") for count in (8, 2, 2))
    out, lse = call.forward(query, key, value)
    assert (out.shape, out.dtype, lse.shape, lse.dtype) == (query.shape, dtype, (8, tokens), torch.float32)
    grads = call.backward(torch.empty_like(out), query, key, value, out, lse)
    assert [(grad.shape, grad.dtype) for grad in grads] == [(x.shape, dtype) for x in (query, key, value)]


# ---- in models


def switched(model) -> set[str]:
    return {module.config._attn_implementation for module in model.modules() if hasattr(module, "config")}


@pytest.mark.parametrize("before", ["sdpa", "eager"])
def test_a_model_is_switched_and_restored(before, tmp_path):
    model = tiny_model("llama", attn_implementation=before)
    use_packed_attention(model)
    assert switched(model) == {PACKED_ATTENTION}
    model.save_pretrained(tmp_path)
    assert PACKED_ATTENTION not in (tmp_path / "config.json").read_text()
    restore_attention(model)
    restore_attention(model)
    assert switched(model) == {before}


def test_generation_uses_the_models_own_attention_while_it_is_switched():
    model = tiny_model("gemma2")
    prompt = torch.tensor([[1, 5, 9, 17]])
    before = model.generate(prompt, max_new_tokens=5, do_sample=False)
    install_scoring(model)
    batch = PackedLayout(0).collate([random_groups(2, seed=1)])
    first = score_completions(model, batch).logps
    assert switched(model) == {PACKED_ATTENTION}
    assert torch.equal(model.generate(prompt, max_new_tokens=5, do_sample=False), before)
    assert torch.equal(score_completions(model, batch).logps, first)


def test_a_switched_model_without_packed_rows_computes_sdpa():
    model = tiny_model("llama")
    ids, mask = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    before = model(ids, attention_mask=mask).logits
    use_packed_attention(model)
    assert torch.equal(model(ids, attention_mask=mask).logits, before)


@pytest.mark.parametrize("kwargs", [{"use_reentrant": False}, {"use_reentrant": True}], ids=str)
def test_checkpointed_layers_run_again_with_packed_rows(kwargs):
    groups = random_groups(4, seed=2)
    grads = []
    for checkpointing in (False, True):
        model = tiny_model("llama").train()
        install_scoring(model)
        if checkpointing:
            model.gradient_checkpointing_enable(kwargs)
            model.enable_input_require_grads()
        score_completions(model, PackedLayout(0).collate([groups])).logps.sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-6, atol=1e-7)


def test_autocast_computes_as_padded_rows_do():
    from prefopt.scoring.layouts import PaddedLayout

    groups = random_groups(4, seed=3)
    model = tiny_model("llama")
    exact = plain_logps(model, groups)
    install_scoring(model)
    errors = []
    for layout in (PackedLayout(0), PaddedLayout(0)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logps = score_completions(model, layout.collate([groups])).logps
        assert logps.dtype == torch.float32
        logps.sum().backward()
        errors.append((logps - exact).norm())
    assert errors[0] <= 2 * errors[1]


def test_layers_with_sinks_score_packed_rows_as_the_model_does_itself():
    config = AutoConfig.for_model(
        "gpt_oss", vocab_size=400, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=2, num_experts_per_tok=1, sliding_window=256,
        max_position_embeddings=256, pad_token_id=0, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "sinks" in name:
                parameter.copy_(torch.linspace(-1, 2, 4))
    groups = random_groups(3, seed=4)
    plain = plain_logps(model, groups)
    install_scoring(model)
    scores = score_completions(model, PackedLayout(0).collate([groups])).logps
    torch.testing.assert_close(scores, plain, rtol=1e-5, atol=1e-5)


def test_saved_tensors_grow_with_the_tokens_and_not_with_their_square():
    """What a call keeps for its backward pass: queries, keys, values, output, and one number a head and token."""
    groups = [Group([5] * 60, [[6] * 50, [7] * 40])] * 4
    rows = PackedLayout(0).collate([groups])["attention_mask"]
    kept = []
    inputs = [each.transpose(1, 2).flatten(0, 1) for each in heads(rows, dtype=torch.float32)]
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda t: t):
        PackedAttention.apply(*inputs, None, rows, 0.3, None)
    tokens = rows.length
    assert sum(kept) <= 4 * tokens * 4 * 8 + tokens * 4
