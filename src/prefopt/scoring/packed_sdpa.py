"""SDPA over packed rows where no kernel skips masked blocks (a CPU): each prompt and each completion attends to its own keys alone.

A dense mask costs the square of a row. `PackedMask` stands for that mask, but holds only which tokens belong together; as the `attn_mask` of
`scaled_dot_product_attention` it has the attention computed part by part, as `torch.nn.attention.bias.CausalBias` does for its patterns.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._pytree import tree_map_only

from prefopt.scoring.attention import packed_attention_mask


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
