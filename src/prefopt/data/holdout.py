"""Rows that share a prompt stay together: what makes two prompts the same, and sets of rows without a common prompt.

Two prompts are the same where their turns have the same roles and texts, whatever their white space and letter case; a
string is one user's turn. Copies of a question that differ in nothing else would otherwise leak from training into
evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from prefopt.data.messages import TextOrMessages, as_messages
from prefopt.files import content_hash


@dataclass(frozen=True)
class PromptName:
    """The names of a row's prompt.

    Attributes:
        same: equal for all prompts that count as the same.
        exact: a hash of the prompt as it is written. Hold-outs are drawn from prompts in the order of this hash.
    """

    same: str
    exact: str


def prompt_identity(prompt: TextOrMessages) -> str:
    """Hash the roles and texts of a prompt, whatever their white space and letter case."""
    turns = [
        (turn["role"], " ".join(str(turn.get("content") or "").split()).casefold()) for turn in as_messages(prompt)
    ]
    return content_hash(turns)


def prompt_name(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None = None) -> PromptName:
    """Name the prompt of a normalised or tokenised row; a row without one is a prompt that no other row has.

    With the tokenizer, prompts that are token ids are compared as text too.
    """
    prompt, ids = row.get("prompt"), row.get("prompt_ids")
    written = ids if prompt is None else prompt
    exact = content_hash(repr(sorted(row.items(), key=str)) if written is None else written)
    if prompt is None and ids and tokenizer is not None:
        prompt = str(tokenizer.decode(ids, skip_special_tokens=True))
    return PromptName(exact if prompt is None else prompt_identity(prompt), exact)


def hold_out(
    dataset: Dataset, size: float | int, *, seed: int, key: Callable[[Mapping[str, Any]], str] | None = None
) -> tuple[Dataset, Dataset]:
    """Split `dataset` in two without a common prompt; which prompts are held out does not depend on the rows' order.

    Args:
        dataset: rows with `prompt` or `prompt_ids`.
        size: part (below 1) or number of rows of the second set, reached to within one prompt's rows.
        seed: which prompts.
        key: names a row's prompt; default: `prompt_name`.

    Returns:
        The remaining rows and the held-out rows, each in their old order.
    """
    names = [PromptName(key(row), key(row)) if key else prompt_name(row) for row in dataset]
    kept, held = hold_out_rows(names, size, seed=seed)
    return dataset.select(kept), dataset.select(held)


def hold_out_rows(names: Sequence[PromptName], size: float | int, *, seed: int) -> tuple[list[int], list[int]]:
    """Choose rows as `hold_out` does, given the names of their prompts; return the places of both sets."""
    check_test_size(size)
    first: dict[str, str] = {}
    for name in names:
        first[name.same] = min(name.exact, first.get(name.same, name.exact))
    prompts = sorted(first, key=first.__getitem__)
    order = [prompts[place] for place in np.random.default_rng(seed).permutation(len(prompts))]
    target = max(round(size * len(names)) if size < 1 else int(size), 1)
    (held,) = fill_with_prompts([name.same for name in names], [target], order)
    if len(held) == len(names):
        raise ValueError(
            f"Cannot hold out {size} of {len(names)} rows with {len(prompts)} different prompts: no row would be left."
        )
    return sorted(set(range(len(names))) - set(held)), sorted(held)


def check_test_size(size: float | int) -> None:
    """Raise a ValueError unless `size` is a part between 0 and 1 or a number of rows."""
    whole = isinstance(size, int) and not isinstance(size, bool)
    if not (size >= 1 if whole else 0 < size < 1):
        raise ValueError(f"test_split_size must be a part between 0 and 1 or a number of rows, not {size!r}.")


def fill_with_prompts(prompts: Sequence[str], sizes: Sequence[int], order: Iterable[str]) -> list[list[int]]:
    """Fill parts with rows, all rows of a prompt in one part.

    Args:
        prompts: the prompt of each row.
        sizes: rows of each part; a part is filled until it has so many, to within one prompt's rows.
        order: the different prompts, in the order in which they are taken.

    Returns:
        For each part the places of its rows, prompt by prompt.
    """
    rows: dict[str, list[int]] = {}
    for place, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(place)
    parts: list[list[int]] = [[] for _ in sizes]
    number = 0
    for prompt in order:
        while number < len(sizes) and len(parts[number]) >= sizes[number]:
            number += 1
        if number == len(sizes):
            break
        parts[number] += rows[prompt]
    return parts
