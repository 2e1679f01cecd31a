"""Attention masks of packed rows, and which models can be packed exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._pytree import tree_map_only
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
        What transformers passes on unchanged to that implementation: a `BlockMask` for "flex_attention", a bool (N, 1,
            T, T) tensor
        (True: may attend) for "sdpa", an additive (N, 1, T, T) tensor for "eager". A padding token sees itself and the
        padding
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


def by_parts(implementation: str, device: torch.device, *, compiled: bool) -> bool:
    """Whether packed rows are attended to part by part: SDPA on a CPU, in a model that is not compiled (the tracer takes plain masks only)."""
    return implementation == "sdpa" and device.type == "cpu" and not compiled


@dataclass(frozen=True)
class Part:
    """Consecutive tokens of a row that see the same prompt: a prompt itself, or one completion.

    Attributes:
        row: which row.
        begin, end: its tokens, which are its queries.
        prompt: (begin, end) of the prompt that a completion sees beside itself; None where there is none before it.
    """

    row: int
    begin: int
    end: int
    prompt: tuple[int, int] | None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """Attention of this part (1, heads, end - begin, D), from that of all rows (N, heads, T, D)."""
        query = self._own(query)
        if self.prompt is None:
            return scaled_dot_product_attention(query, self._own(key), self._own(value), is_causal=True, **options)
        begin, end = self.prompt
        key, value = (
            torch.cat([every[self.row : self.row + 1, :, begin:end], self._own(every)], dim=2)
            for every in (key, value)
        )
        return scaled_dot_product_attention(query, key, value, attn_mask=self._seen, **options)

    @cached_property
    def _seen(self) -> Tensor:
        """What a completion's queries may see of prompt and completion, for all layers: bool (1, 1, R, P + R)."""
        assert self.prompt is not None
        own, before = self.end - self.begin, self.prompt[1] - self.prompt[0]
        return torch.ones(1, 1, own, before + own, dtype=torch.bool).tril(before)

    def _own(self, every: Tensor) -> Tensor:
        return every[self.row : self.row + 1, :, self.begin : self.end]


class PackedMask(Tensor):
    """The bool (N, 1, T, T) mask of packed rows, built only if something else than attention reads it; see the module's docstring.

    Attributes:
        parts: for each row, its parts in order; what they leave out is padding, whose attention is zero.
        ids: the (N, T) group and branch ids that it stands for.
    """

    parts: list[list[Part]]
    ids: tuple[Tensor, Tensor]

    @staticmethod
    def of(group_ids: Tensor, branch_ids: Tensor) -> PackedMask:
        """The mask of rows with these ids, each (N, T); see `scoring.attention.packed_attention_mask`."""
        rows, length = group_ids.shape
        mask = torch.zeros(1, dtype=torch.bool).expand(rows, 1, length, length).as_subclass(PackedMask)
        mask.parts = [parts_of_row(row, group_ids[row], branch_ids[row]) for row in range(rows)]
        mask.ids = group_ids, branch_ids
        return mask

    def dense(self) -> Tensor:
        """The mask itself."""
        return packed_attention_mask(*self.ids, implementation="sdpa", dtype=torch.float32)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        """Divide the attention; what reads the mask in another way gets the dense one."""
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention:
            return cls.attend(*args, **kwargs)
        if func is Tensor.detach:
            return args[0]
        result = super().__torch_function__(func, types, args, kwargs)
        if not isinstance(result, Tensor):
            return result  # a shape, a dtype
        return func(*tree_map_only(cls, cls.dense, args), **tree_map_only(cls, cls.dense, kwargs))

    @staticmethod
    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: PackedMask,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **options: Any,
    ) -> Tensor:
        """Attention (N, heads, T, D) of packed rows, with the arguments of `scaled_dot_product_attention`."""
        assert not is_causal, "a mask and is_causal"
        rows = []
        for parts in attn_mask.parts:
            done = [part.attend(query, key, value, dropout_p=dropout_p, **options) for part in parts]
            padding = query.shape[2] - (parts[-1].end if parts else 0)
            done.append(query.new_zeros(1, query.shape[1], padding, value.shape[3]))
            rows.append(torch.cat(done, dim=2))
        return torch.cat(rows)


def parts_of_row(row: int, group_ids: Tensor, branch_ids: Tensor) -> list[Part]:
    """The parts of one row from its tokens' ids (T,): runs of the same group and branch; group -1 is padding."""
    ids = torch.stack([group_ids, branch_ids], dim=1)
    runs, lengths = torch.unique_consecutive(ids, dim=0, return_counts=True)
    parts, prompts, begin = [], {}, 0
    for (group, branch), length in zip(runs.tolist(), lengths.tolist()):
        end = begin + length
        if group >= 0:
            parts.append(Part(row, begin, end, prompts.get(group)))
            if branch == 0:
                prompts[group] = (begin, end)
        begin = end
    return parts
