"""Attention part by part is attention under the dense mask: values, gradients, padding, and what else reads the mask."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from prefopt.scoring.attention import PackedMask, packed_attention_mask
from prefopt.scoring.layouts import PackedLayout
from tests.scoring.helpers import random_groups


def masks(*, seed: int, count: int = 4, completions: int = 2, share: bool = True, split: int = 2, padding: int = 3):
    """A dense mask, the same as parts, and which tokens are real."""
    groups = random_groups(count, seed=seed, completions=completions)
    rows = [row for row in (groups[:split], groups[split:]) if row]
    layout = PackedLayout(0, share_prompt=share)
    longest = layout.collate(rows)["input_ids"].shape[1]
    batch = layout.collate(rows, row_length=longest + padding)
    ids = batch["group_ids"], batch["branch_ids"]
    dense = packed_attention_mask(*ids, implementation="sdpa", dtype=torch.float32)
    return dense, PackedMask.of(*ids), (ids[0] >= 0)[:, None, :, None]


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    count=st.integers(1, 5),
    completions=st.integers(1, 3),
    share=st.booleans(),
    split=st.integers(0, 5),
)
def test_values_and_gradients_are_those_of_the_dense_mask(seed, count, completions, share, split):
    dense, packed, real = masks(seed=seed, count=count, completions=completions, share=share, split=split)
    generator = torch.Generator().manual_seed(seed)
    shape = (dense.shape[0], 2, dense.shape[-1], 4)
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    found = scaled_dot_product_attention(*inputs, attn_mask=packed, scale=0.3)
    expected = scaled_dot_product_attention(*inputs, attn_mask=dense, scale=0.3)
    assert found.shape == expected.shape
    assert torch.equal(found.masked_select(~real), torch.zeros_like(found.masked_select(~real)))
    torch.testing.assert_close(found * real, expected * real, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(shape, generator=generator, dtype=torch.float64) * real
    for ours, theirs in zip(
        torch.autograd.grad(found, inputs, upstream), torch.autograd.grad(expected, inputs, upstream)
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_fewer_heads_of_keys():
    dense, packed, real = masks(seed=1)
    query = torch.randn(2, 4, dense.shape[-1], 8)
    key, value = torch.randn(2, 2, 2, dense.shape[-1], 8)
    found, expected = (
        scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True) for mask in (packed, dense)
    )
    torch.testing.assert_close(found * real, expected * real, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "read",
    [
        lambda mask: mask[:, :, 1:, :-1],
        lambda mask: torch.zeros(mask.shape).masked_fill(~mask, -1.0),
        lambda mask: torch.where(mask, 1.0, 2.0),
        lambda mask: mask.to(torch.float32),
    ],
)
def test_whatever_else_reads_it_gets_the_dense_mask(read):
    dense, packed, _ = masks(seed=2)
    assert type(read(packed)) is torch.Tensor and torch.equal(read(packed), read(dense))


def test_it_looks_like_the_dense_mask_and_takes_no_memory():
    dense, packed, _ = masks(seed=3)
    assert packed.shape == dense.shape and packed.dtype == dense.dtype and packed.ndim == 4
    assert packed.untyped_storage().nbytes() == 1
    assert packed.detach() is packed
