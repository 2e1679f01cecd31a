"""Which of a sequence's hidden states a head reads.

Letters: N rows, T tokens of a row, H hidden width.
"""

from __future__ import annotations

import torch
from torch import nn

POOLINGS = ("last", "eos", "mean", "max")


class Float32Linear(nn.Linear):
    """A linear layer without bias whose product is taken in float32 whatever the autocast or the weights' dtype."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(..., H) -> (..., out), float32."""
        with torch.autocast(input.device.type, enabled=False):
            return nn.functional.linear(input.float(), self.weight.float())


def pooled_columns(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, *, pooling: str, eos_token_ids: tuple[int, ...]
) -> torch.Tensor:
    """The column at which each row is read: its last real token ("eos"), or the one before a closing EOS ("last").

    Real tokens are those of the attention mask, on either padding side; a pad token that is also the EOS does not matter.

    Args:
        input_ids, attention_mask: (N, T); the mask is 0 at padding.
        pooling: "eos" or "last".
        eos_token_ids: what counts as EOS; a row that ends otherwise (cut, say) is read at its last real token.

    Returns:
        (N,) long.
    """
    mask = attention_mask.long()
    columns = torch.arange(mask.shape[1], device=mask.device)
    end = (columns * mask).argmax(-1)
    if pooling == "eos":
        return end
    return end - closes(input_ids.gather(1, end[:, None])[:, 0], eos_token_ids) * (mask.sum(-1) > 1)


def closes(tokens: torch.Tensor, eos_token_ids: tuple[int, ...]) -> torch.Tensor:
    """1 where a token is an EOS, else 0, long."""
    return torch.isin(tokens, torch.tensor(eos_token_ids, device=tokens.device)).long()


def pool_rows(hidden: torch.Tensor, attention_mask: torch.Tensor | None, pooling: str) -> torch.Tensor:
    """Mean (float32) or maximum over the real tokens of each row.

    Args:
        hidden: (N, T, H).
        attention_mask: (N, T), 0 at padding; None for no padding.
        pooling: "mean" or "max".

    Returns:
        (N, H).

    Raises:
        ValueError: the mask is that of packed rows.
    """
    if attention_mask is None:
        attention_mask = torch.ones(hidden.shape[:2], device=hidden.device)
    if attention_mask.ndim != 2:
        raise ValueError(f"Pooling {pooling!r} needs one sequence a row; set `batch_layout: padded`.")
    real = attention_mask.bool()[..., None]
    if pooling == "mean":
        return hidden.float().masked_fill(~real, 0.0).sum(1) / real.sum(1)
    return hidden.masked_fill(~real, float("-inf")).amax(1)
