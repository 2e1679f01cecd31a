"""Attention masks of packed rows, and which models can be packed exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

MASKED_ATTENTION = ("sdpa", "eager", "flex_attention")
"""Attention implementations of transformers that take a ready mask."""
_WINDOWS = {"gpt_neo": "window_size", "modernbert-decoder": "local_attention"}
"""The setting that is a model's sliding window, where it is not called `sliding_window`."""


def packed_attention_mask(
    group_ids: torch.Tensor, branch_ids: torch.Tensor, *, implementation: str, dtype: torch.dtype
):
    """The mask of packed rows: a token sees the tokens before it of its own group that are prompt or its own branch.

    Args:
        group_ids: (N, T) group of each token, -1 for padding.
        branch_ids: (N, T) 0 for prompt tokens, r + 1 for completion r.
        implementation: one of `MASKED_ATTENTION`.
        dtype: the model's dtype, used by the additive mask of "eager".

    Returns:
        What transformers passes on unchanged to that implementation: a `BlockMask` for "flex_attention", a bool (N, 1, T, T) tensor
        (True: may attend) for "sdpa", an additive (N, 1, T, T) tensor for "eager". A padding token sees itself and the padding
        before it, so that no row of the softmax is empty.

    Raises:
        ValueError: the implementation takes no mask.
    """
    if implementation not in MASKED_ATTENTION:
        raise ValueError(
            f"Packed rows need an attention implementation that takes a mask ({', '.join(MASKED_ATTENTION)}); "
            f"{implementation!r} does not. Set `attn_implementation`, or `batch_layout: padded`."
        )
    if implementation == "flex_attention":
        return _block_mask(group_ids, branch_ids)
    length = group_ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=group_ids.device).tril()
    same_group = group_ids[:, :, None] == group_ids[:, None, :]
    visible = (branch_ids[:, None, :] == 0) | (branch_ids[:, :, None] == branch_ids[:, None, :])
    allowed = (causal & same_group & visible)[:, None]
    if implementation == "sdpa":
        return allowed
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, torch.finfo(dtype).min)


def _block_mask(group_ids: torch.Tensor, branch_ids: torch.Tensor):
    from torch.nn.attention.flex_attention import create_block_mask

    def mask_mod(n: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        same_group = group_ids[n, query] == group_ids[n, key]
        visible = (branch_ids[n, key] == 0) | (branch_ids[n, key] == branch_ids[n, query])
        return (query >= key) & same_group & visible

    rows, length = group_ids.shape
    build: Callable = create_block_mask
    return build(mask_mod, B=rows, H=None, Q_LEN=length, KV_LEN=length, device=group_ids.device)


def load_with_flex_attention(load: Callable[..., PreTrainedModel], name: str, **options: Any) -> PreTrainedModel:
    """A model with FlexAttention, or with its default attention where its architecture has none; a choice among `options` stands.

    Args:
        load: what loads a name or folder.
        name: name or folder.
        options: keywords of `load`.
    """
    try:
        return load(name, **{"attn_implementation": "flex_attention", **options})
    except ValueError as error:
        # raised before any weights are read
        if "flex_attention" not in str(error) or "attn_implementation" in options:
            raise
    return load(name, **options)


def why_not_packed(config: PretrainedConfig, *, implementation: str, longest_sequence: int) -> str | None:
    """Why a model cannot be trained on packed rows exactly, in words for the log; None where nothing is known against it.

    Args:
        config: the model's config.
        implementation: its attention implementation.
        longest_sequence: longest prompt + completion of the data, in tokens.
    """
    text = config.get_text_config()
    settings = text.to_dict()
    if implementation not in MASKED_ATTENTION:
        return f"attention implementation {implementation!r} takes no mask"
    if text.model_type in ("bloom", "mpt") or settings.get("alibi"):
        return "its attention biases count places along the row (ALiBi)"
    window = settings.get(_WINDOWS.get(text.model_type, "sliding_window"))
    if window is not None and settings.get("use_sliding_window", True) and window < longest_sequence:
        return f"its sliding window of {window} tokens is shorter than the longest sequence ({longest_sequence})"
    if settings.get("attention_chunk_size") and settings["attention_chunk_size"] < longest_sequence:
        return (
            f"its attention chunks of {settings['attention_chunk_size']} tokens are shorter than the longest sequence"
        )
    kinds = set(settings.get("layer_types") or settings.get("layers_block_type") or [])
    if unknown := sorted(kinds - {"full_attention", "sliding_attention", "chunked_attention", "attention"}):
        return f"it has layers that carry state along the row ({', '.join(unknown)})"
    if any(
        word in text.model_type
        for word in ("mamba", "rwkv", "recurrent", "xlstm", "jamba", "bamba", "zamba", "falcon_h1")
    ):
        return f"{text.model_type} carries state along the row"
    return None
