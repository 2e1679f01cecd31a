"""Groups of random tokens and the plainest possible scoring of them."""

from __future__ import annotations

import random
from itertools import pairwise

import torch

from prefopt.scoring.attention import PackedRows
from prefopt.scoring.layouts import Group


def random_groups(
    count: int, *, seed: int = 0, completions: int = 2, vocab_size: int = 400, longest: int = 14
) -> list[Group]:
    """`count` groups with prompts and completions of 1 to `longest` tokens."""
    rng = random.Random(seed)

    def ids() -> list[int]:
        return [rng.randrange(3, vocab_size) for _ in range(rng.randint(1, longest))]

    return [Group(ids(), [ids() for _ in range(completions)]) for _ in range(count)]


def plain_token_logits(model, group: Group, completion: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (tokens, V) that predict one completion, from the model's own forward on it alone, and its ids."""
    ids = torch.tensor([[*group.prompt, *group.completions[completion]]])
    logits = model(input_ids=ids).logits[0, len(group.prompt) - 1 : -1].float()
    return logits, torch.tensor(group.completions[completion])


def plain_logps(model, groups: list[Group]) -> torch.Tensor:
    """(C,) summed log-probs, one sequence at a time."""
    sums = []
    for group in groups:
        for completion in range(len(group.completions)):
            logits, ids = plain_token_logits(model, group, completion)
            sums.append(logits.log_softmax(-1).gather(-1, ids[:, None]).sum())
    return torch.stack(sums)


def dense_mask(rows: PackedRows) -> torch.Tensor:
    """(N, 1, T, T) bool: which tokens see which, written down token by token from the segments' boundaries."""
    total = rows.rows * rows.length
    allowed = torch.zeros(total, total, dtype=torch.bool)
    for begin, end in pairwise(rows.segments.queries):
        allowed[begin:end, begin:end] = torch.ones(end - begin, end - begin, dtype=torch.bool).tril()
    if rows.completions is not None:
        parts = zip(pairwise(rows.completions.queries), pairwise(rows.completions.keys))
        for queries, keys in parts:
            asking, seen = rows.completion_index[slice(*queries)], rows.prompt_index[slice(*keys)]
            allowed[asking[:, None], seen] = True
    blocks = allowed.reshape(rows.rows, rows.length, rows.rows, rows.length)
    row = torch.arange(rows.rows)
    return blocks[row, :, row][:, None]
