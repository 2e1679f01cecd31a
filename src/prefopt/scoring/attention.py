"""Attention of packed rows: two variable-length attentions, merged by their log-sum-exps.

Every segment of a row (a prompt, a completion) attends to itself, causally; every completion attends to all of its
prompt. A completion's softmax over both is the weighted mean of the two results, with weights exp(lse_i - lse), where
lse = log(exp(lse_1) + exp(lse_2)). The backward pass of either call is an ordinary flash-attention backward that is
given the *merged* output and log-sum-exp. Both directions are exact, nothing is masked, and no T x T tensor exists.

`PackedRows` holds the segments' boundaries and stands in the batch where a padded batch has its `attention_mask`. The
function is registered with transformers under `PACKED_ATTENTION`, so that any model whose attention goes through
transformers' `AttentionInterface` uses it after `use_packed_attention`; calls without `PackedRows` are SDPA's.

Letters: N rows, T tokens of a row, L = N * T tokens of the batch, H heads, D width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

PACKED_ATTENTION = "prefopt_packed"
_PLAIN_BLOCK = 1024  # queries whose scores exist at a time where no flash kernel can be used

_aten = torch.ops.aten


class CannotPackError(ValueError):
    """A model's attention that cannot be computed on packed rows; the message is the reason, in words for a log."""


@dataclass(frozen=True)
class Sequences:
    """Boundaries of the sequences of one variable-length attention, in the host's memory and on the device.

    Attributes:
        queries, keys: n + 1 boundaries each; sequence i has the queries from queries[i] to queries[i + 1].
        query_offsets, key_offsets: (n + 1,) int32, the same on the device, for kernels.
    """

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    query_offsets: Tensor
    key_offsets: Tensor

    @classmethod
    def of(cls, query_lengths: Sequence[int], key_lengths: Sequence[int]) -> Sequences:
        """Make the boundaries of sequences with these lengths."""
        queries, keys = (
            torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
            for lengths in (query_lengths, key_lengths)
        )
        return cls(tuple(queries.tolist()), tuple(keys.tolist()), queries, keys)

    @cached_property
    def longest_query(self) -> int:
        """Most queries of one sequence."""
        return max(b - a for a, b in pairwise(self.queries))

    @cached_property
    def longest_key(self) -> int:
        """Most keys of one sequence."""
        return max(b - a for a, b in pairwise(self.keys))


@dataclass(frozen=True)
class PackedRows:
    """The segments of packed rows; takes the place of an attention mask (N, 1, T, T), which is never built.

    Attributes:
        rows, length: N and T.
        longest: tokens of the longest prompt + completion.
        segments: every token of the batch is in one of them (padding too), and attends within it.
        completions: the completions of each prompt as queries, the prompt as keys; None where no prompt is shared.
        completion_index, prompt_index: (queries,), (keys,) places among the L tokens of those queries and keys.
    """

    rows: int
    length: int
    longest: int
    segments: Sequences
    completions: Sequences | None
    completion_index: Tensor
    prompt_index: Tensor

    ndim = 4  # transformers passes a four-dimensional mask on as it is

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of the mask that this stands for."""
        return self.rows, 1, self.length, self.length

    @classmethod
    def of(
        cls,
        rows: int,
        length: int,
        segments: Sequence[tuple[int, int]],
        prompts: Sequence[tuple[tuple[int, int], tuple[int, int]]],
        longest: int,
    ) -> PackedRows:
        """Make the boundaries of rows from their segments.

        Args:
            rows: N.
            length: T.
            segments: (begin, end) among the L tokens, in order; what lies between them is padding.
            prompts: for each shared prompt its (begin, end), and the (begin, end) of its completions, which follow one
                another.
            longest: tokens of the longest prompt + completion.
        """
        lengths, at = [], 0
        for begin, end in [*segments, (rows * length, rows * length)]:
            lengths += [begin - at, end - begin]
            at = end
        lengths = [size for size in lengths if size]
        # a prompt without tokens has no keys: its completions would get an infinite log-sum-exp
        prompts = [
            (prompt, queries) for prompt, queries in prompts if prompt[0] < prompt[1] and queries[0] < queries[1]
        ]

        def places(ranges: Sequence[tuple[int, int]]) -> Tensor:
            return torch.cat([torch.arange(0), *(torch.arange(begin, end) for begin, end in ranges)])

        completions = None
        if prompts:
            completions = Sequences.of(
                [end - begin for _, (begin, end) in prompts], [end - begin for (begin, end), _ in prompts]
            )
        return cls(
            rows,
            length,
            longest,
            Sequences.of(lengths, lengths),
            completions,
            completion_index=places([queries for _, queries in prompts]),
            prompt_index=places([prompt for prompt, _ in prompts]),
        )

    def to(self, *args: Any, **kwargs: Any) -> PackedRows:
        """Move the tensors, with the arguments of `Tensor.to` for a device."""
        return self._with_tensors(lambda tensor: tensor.to(*args, **kwargs))

    def pin_memory(self, *args: Any) -> PackedRows:
        """Pin the tensors' memory; a `DataLoader` calls it."""
        return self._with_tensors(lambda tensor: tensor.pin_memory())

    def _with_tensors(self, change: Any) -> PackedRows:
        def changed(sequences: Sequences) -> Sequences:
            offsets = change(sequences.query_offsets), change(sequences.key_offsets)
            return replace(sequences, query_offsets=offsets[0], key_offsets=offsets[1])

        return replace(
            self,
            segments=changed(self.segments),
            completions=None if self.completions is None else changed(self.completions),
            completion_index=change(self.completion_index),
            prompt_index=change(self.prompt_index),
        )


# ---- variable-length attention: one call on each kind of device


@dataclass(frozen=True)
class _Call:
    """One variable-length attention. Queries and outputs are (L, H, D), keys and values (L, H', D), lse (H, L)."""

    sequences: Sequences
    causal: bool
    scale: float

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return output and log-sum-exp."""
        raise NotImplementedError

    def backward(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of queries, keys and values, where `out` and `lse` are those of the whole softmax."""
        raise NotImplementedError

    def parts(self) -> list[tuple[slice, slice]]:
        """Return queries and keys of each sequence."""
        return [
            (slice(*queries), slice(*keys))
            for queries, keys in zip(pairwise(self.sequences.queries), pairwise(self.sequences.keys))
        ]


class _CudaFlash(_Call):
    """torch's variable-length flash kernels; two operators that torch does not document, hence this one place."""

    def _arguments(self) -> tuple[Any, ...]:
        s = self.sequences
        return s.query_offsets, s.key_offsets, s.longest_query, s.longest_key, 0.0, self.causal

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        out, lse, *_ = _aten._flash_attention_forward(query, key, value, *self._arguments(), False, scale=self.scale)
        return out, lse

    def backward(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        # states of a dropout that is off, as torch.nn.attention.varlen passes them
        rng, unused = torch.zeros(2, dtype=torch.uint64, device=query.device), torch.empty(0, device=query.device)
        grads: tuple[Tensor, Tensor, Tensor] = _aten._flash_attention_backward(
            grad.contiguous(),
            query,
            key,
            value,
            out,
            lse.contiguous(),
            *self._arguments(),
            rng,
            unused,
            scale=self.scale,
        )
        return grads


def _heads_first(tokens: Tensor) -> Tensor:
    """Return (1, H, L, D) of (L, H, D), as SDPA's operators take it."""
    return tokens.transpose(0, 1)[None]


class _CpuFlash(_Call):
    """torch's flash kernels for the CPU, sequence by sequence."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        outs, sums = [], []
        for q, k in self.parts():
            out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
                _heads_first(query[q]),
                _heads_first(key[k]),
                _heads_first(value[k]),
                0.0,
                self.causal,
                scale=self.scale,
            )
            outs.append(out[0].transpose(0, 1))
            sums.append(lse[0])
        return torch.cat(outs), torch.cat(sums, dim=1)

    def backward(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        parts = []
        for q, k in self.parts():
            tensors = [_heads_first(each) for each in (grad[q], query[q], key[k], value[k], out[q])]
            grads = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *tensors, lse[:, q][None], 0.0, self.causal, scale=self.scale
            )
            parts.append([each[0].transpose(0, 1) for each in grads])
        first, second, third = (torch.cat(each) for each in zip(*parts))
        return first, second, third


@dataclass(frozen=True)
class _Plain(_Call):
    """Matrix products, block by block: for float32 on a GPU, a soft cap, and values of another width than queries."""

    softcap: float | None = None

    def _blocks(self) -> list[tuple[slice, slice, int]]:
        """Return queries, keys, and the first query's place in its sequence, of each block."""
        return [
            (slice(begin, min(begin + _PLAIN_BLOCK, q.stop)), k, begin - q.start)
            for q, k in self.parts()
            for begin in range(q.start, q.stop, _PLAIN_BLOCK)
        ]

    def _scores(self, query: Tensor, key: Tensor, offset: int) -> tuple[Tensor, Tensor | None]:
        """Return the scores (H, queries, keys), and tanh of the capped ones."""
        scores = query @ key.transpose(1, 2) * self.scale
        capped = None
        if self.softcap is not None:
            capped = torch.tanh(scores / self.softcap)
            scores = self.softcap * capped
        if self.causal:
            hidden = torch.ones(scores.shape[1:], dtype=torch.bool, device=scores.device).triu(offset + 1)
            scores = scores.masked_fill(hidden, float("-inf"))
        return scores, capped

    @staticmethod
    def _wide(tokens: Tensor, heads: int) -> Tensor:
        """Return (H, L, D) of (L, H', D) in float32 at least, each key's head repeated for its queries' heads."""
        wide = tokens.to(torch.promote_types(tokens.dtype, torch.float32)).transpose(0, 1)
        return wide.repeat_interleave(heads // wide.shape[0], dim=0)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        heads, outs, sums = query.shape[1], [], []
        for q, k, offset in self._blocks():
            keys, values = self._wide(key[k], heads), self._wide(value[k], heads)
            scores, _ = self._scores(self._wide(query[q], heads), keys, offset)
            lse = scores.logsumexp(-1)
            outs.append(((scores - lse[..., None]).exp() @ values).transpose(0, 1).to(query.dtype))
            sums.append(lse)
        return torch.cat(outs), torch.cat(sums, dim=1)

    def backward(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        heads, kv_heads = query.shape[1], key.shape[1]
        grads = [torch.zeros_like(each, dtype=lse.dtype) for each in (query, key, value)]

        def add(target: Tensor, place: slice, values: Tensor) -> None:
            groups = values.unflatten(0, (target.shape[1], -1)).sum(1)
            target[place] += groups.transpose(0, 1)

        assert heads % kv_heads == 0
        for q, k, offset in self._blocks():
            queries, keys, values, upstream, outs = (
                self._wide(each, heads) for each in (query[q], key[k], value[k], grad[q], out[q])
            )
            scores, capped = self._scores(queries, keys, offset)
            probs = (scores - lse[:, q, None]).exp()
            inner = upstream @ values.transpose(1, 2) - (upstream * outs).sum(-1, keepdim=True)
            slopes = probs * inner * self.scale
            if capped is not None:
                slopes = slopes * (1 - capped.square())
            add(grads[0], q, slopes @ keys)
            add(grads[1], k, slopes.transpose(1, 2) @ queries)
            add(grads[2], k, probs.transpose(1, 2) @ upstream)
        first, second, third = (each.to(like.dtype) for each, like in zip(grads, (query, key, value)))
        return first, second, third


def _call(
    query: Tensor, value: Tensor, sequences: Sequences, *, causal: bool, scale: float, softcap: float | None
) -> _Call:
    """Choose the kernel for tensors of this device, dtype and width."""
    width = query.shape[-1]
    if softcap is None and value.shape[-1] == width:
        if query.device.type == "cpu":
            return _CpuFlash(sequences, causal, scale)
        if query.dtype in (torch.float16, torch.bfloat16) and width % 8 == 0 and width <= 256:
            return _CudaFlash(sequences, causal, scale)
    return _Plain(sequences, causal, scale, softcap)


# ---- the function of packed rows


class PackedAttention(torch.autograd.Function):
    """Attention (L, H, D) of packed rows from queries (L, H, D), keys and values (L, H', D) and sinks (H,) or None."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        rows: PackedRows,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        """Attend within segments, let completions attend to their prompts, and merge."""
        own = _call(query, value, rows.segments, causal=True, scale=scale, softcap=softcap)
        out, lse = own.forward(query, key, value)
        cross = None
        if rows.completions is not None:
            cross = _call(query, value, rows.completions, causal=False, scale=scale, softcap=softcap)
            asking, seen = rows.completion_index, rows.prompt_index
            more, more_lse = cross.forward(query[asking], key[seen], value[seen])
            merged = torch.logaddexp(lse[:, asking], more_lse)
            mixed = out[asking] * _weights(lse[:, asking], merged) + more * _weights(more_lse, merged)
            out = out.index_copy(0, asking, mixed.to(out.dtype))
            lse = lse.index_copy(1, asking, merged)
        if sinks is not None:  # one more key for every query, whose value is 0
            merged = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
            out = (out * _weights(lse, merged)).to(out.dtype)
            lse = merged
        ctx.save_for_backward(query, key, value, sinks, out, lse)
        ctx.calls, ctx.rows = (own, cross), rows
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Run either call's backward pass with the merged output and log-sum-exp, and add up."""
        query, key, value, sinks, out, lse = ctx.saved_tensors
        (grad,), (own, cross), rows = grads, ctx.calls, ctx.rows
        dq, dk, dv = own.backward(grad, query, key, value, out, lse)
        if cross is not None:
            asking, seen = rows.completion_index, rows.prompt_index
            more = cross.backward(
                grad[asking], query[asking], key[seen], value[seen], out[asking], lse[:, asking].contiguous()
            )
            dq = dq.index_add(0, asking, more[0])
            dk, dv = dk.index_add(0, seen, more[1]), dv.index_add(0, seen, more[2])
        dsinks = None
        if sinks is not None:
            inner = (grad.to(lse.dtype) * out.to(lse.dtype)).sum(-1).T
            dsinks = -((sinks.to(lse.dtype)[:, None] - lse).exp() * inner).sum(1).to(sinks.dtype)
        return dq, dk, dv, dsinks, None, None, None


def _weights(lse: Tensor, merged: Tensor) -> Tensor:
    """Return the share (L, H, 1) of a result in the merged one."""
    return (lse - merged).exp().T[..., None]


@torch.compiler.disable  # type: ignore[untyped-decorator]  # the kernels' host-side boundaries are no graph
def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention with the arguments of transformers' attention functions; SDPA's unless rows are packed.

    Args:
        module: the attention layer.
        query: (N, H, T, D).
        key: (N, H', T, D).
        value: (N, H', T, D).
        attention_mask: `PackedRows`, or a mask of SDPA.
        dropout: probability; must be 0 for packed rows.
        scaling: factor of the scores; None: 1 / sqrt(D).
        sliding_window: tokens that a query sees; no less than the longest sequence, for packed rows.
        softcap: bound of the scores, by tanh.
        s_aux: (H,) attention sinks.
        kwargs: further arguments, for SDPA; a `position_bias` cannot be packed.

    Returns:
        The outputs (N, T, H, D), and no attention weights.

    Raises:
        CannotPackError: the layer asks for what packed rows cannot have.
    """
    if not isinstance(attention_mask, PackedRows):
        if softcap is not None or s_aux is not None:
            raise CannotPackError("its layers need eager attention; call `restore_attention` first")
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    rows = attention_mask
    if dropout:
        raise CannotPackError("its attention has dropout; set the config's `attention_dropout` to 0")
    if kwargs.get("position_bias") is not None:
        raise CannotPackError("its attention adds a bias that counts places along the row")
    if not getattr(module, "is_causal", True) or query.shape[2] != key.shape[2]:
        raise CannotPackError("its attention is not causal self-attention")
    if sliding_window is not None and sliding_window < rows.longest:
        raise CannotPackError(f"its sliding window of {sliding_window} tokens is shorter than {rows.longest} tokens")
    if query.device.type == "cuda" and not value.shape[-1] == query.shape[-1] <= 256:
        raise CannotPackError("its attention heads are wider than 256, or their values have another width")
    # rotary embeddings may return float32, which flash kernels do not mix with 16-bit values
    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    with torch.autocast(device, enabled=False):
        flat = [tokens.transpose(1, 2).flatten(0, 1).to(dtype) for tokens in (query, key, value)]
        out = PackedAttention.apply(*flat, s_aux, rows, scale, softcap)
    return out.unflatten(0, (rows.rows, rows.length)), None


def packed_mask(attention_mask: Any = None, **kwargs: Any) -> Any:
    """Return `PackedRows` as they are, and SDPA's mask for any other; transformers calls it once in a forward."""
    if isinstance(attention_mask, PackedRows):
        return attention_mask
    return sdpa_mask(attention_mask=attention_mask, **kwargs)


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
AttentionMaskInterface.register(PACKED_ATTENTION, packed_mask)


# ---- which attention a model uses


def use_packed_attention(model: nn.Module) -> None:
    """Switch a model to `PACKED_ATTENTION`, wrapped or not; a model that is switched already stays so.

    Raises:
        CannotPackError: a submodel's attention does not go through transformers' interface.
    """
    base = transformers_model(model)
    if base.config._attn_implementation == PACKED_ATTENTION:
        return
    patched: Any = base
    patched._attention_before = base.config._attn_implementation
    base.set_attn_implementation(PACKED_ATTENTION)
    for module in base.modules():
        if isinstance(module, PreTrainedModel) and module.config._attn_implementation != PACKED_ATTENTION:
            restore_attention(model)
            raise CannotPackError(f"{type(module).__name__} does not use transformers' interface for attention")


def restore_attention(model: nn.Module) -> None:
    """Give a model back the attention that it had before `use_packed_attention`."""
    patched: Any = transformers_model(model)
    if before := patched.__dict__.pop("_attention_before", None):
        patched.set_attn_implementation(before)


@contextmanager
def plain_attention(model: PreTrainedModel) -> Iterator[None]:
    """Have a switched model use its former attention for a while; no-op for any other."""
    before = model.__dict__.get("_attention_before")
    if before is None:
        yield
        return
    model.set_attn_implementation(before)
    try:
        yield
    finally:
        model.set_attn_implementation(PACKED_ATTENTION)


def transformers_model(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model inside of any wrapper."""
    return next(module for module in model.modules() if isinstance(module, PreTrainedModel))
