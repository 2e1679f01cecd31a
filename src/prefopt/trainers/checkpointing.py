"""Selective activation checkpointing: keep what is expensive to compute again, recompute the rest."""

from __future__ import annotations

import torch
from torch.utils.checkpoint import create_selective_checkpoint_contexts

_aten = torch.ops.aten
KEPT = (
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.higher_order.flex_attention,
)
"""Operations whose results are kept: matrix products and attention, nearly all of a layer's arithmetic."""


def selective_contexts():
    """Contexts of the forward and of the recomputation, for `torch.utils.checkpoint`'s `context_fn`."""
    return create_selective_checkpoint_contexts(list(KEPT))


def use_selective_checkpointing(model) -> None:
    """Have a model that checkpoints its layers keep matrix products and attention, and recompute norms and activations only.

    Args:
        model: a transformers model, or a wrapper that passes `gradient_checkpointing_enable` on to it.
    """
    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": selective_contexts})
