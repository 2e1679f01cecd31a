"""The one place where token sequences are cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prefopt.data.faults import TOO_LONG, BadRow


@dataclass(frozen=True)
class Truncation:
    """How a prompt and its R >= 1 completions are made to fit `max_length`.

    With `max_prompt_length`: nothing is cut while the prompt and the longest completion fit; otherwise the prompt
    keeps its last `max_prompt_length` tokens and then each completion its first `max_length - len(prompt)`.
    Without: "keep_start" keeps the first `max_length` tokens of prompt + completion, so a prompt of `max_length` tokens
    leaves no room; "keep_end" cuts the prompt's beginning until the longest completion fits, and a completion that is
    too long by itself keeps its last `max_length - 1` tokens behind one prompt token. A prompt that loses its
    beginning keeps its BOS, which counts. "drop" cuts nothing: a row that does not fit cannot be used.

    Args:
        max_length: tokens of prompt and completion together; None cuts nothing.
        max_prompt_length: tokens of a cut prompt.
        mode: "keep_start", "keep_end" (both read only without `max_prompt_length`) or "drop".
    """

    max_length: int | None = None
    max_prompt_length: int | None = None
    mode: str = "keep_start"

    def __post_init__(self) -> None:
        if self.mode not in ("keep_start", "keep_end", "drop"):
            raise ValueError(f'truncation_mode must be "keep_start", "keep_end" or "drop", not {self.mode!r}.')
        if self.mode == "drop" and self.max_prompt_length is not None:
            raise ValueError(
                'max_prompt_length says how to cut a prompt, and truncation_mode "drop" cuts none: set one of them.'
            )
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(
                f"max_length must be at least 2 (a prompt token and a completion token), not {self.max_length}."
            )
        if self.max_prompt_length is None:
            return
        if self.max_prompt_length < 1:
            raise ValueError(f"max_prompt_length must be at least 1, not {self.max_prompt_length}.")
        if self.max_length is None:
            raise ValueError("max_prompt_length needs max_length: without it nothing is cut. Set both, or neither.")
        if self.max_prompt_length >= self.max_length:
            raise ValueError(
                f"max_prompt_length ({self.max_prompt_length}) must be smaller than max_length ({self.max_length}), or no "
                "room is left for completions."
            )

    def cut(
        self, prompt: Sequence[int], completions: Sequence[Sequence[int]], bos_token_id: int | None
    ) -> tuple[list[int], list[list[int]]]:
        """The kept ids of the prompt and of each completion; a completion may come out empty ("keep_start" only).

        Raises:
            BadRow: the row does not fit and must not be cut.
        """
        longest = max((len(completion) for completion in completions), default=0)
        if self.max_length is None or len(prompt) + longest <= self.max_length:
            return list(prompt), [list(completion) for completion in completions]
        if self.mode == "drop":
            raise BadRow(TOO_LONG, f"{len(prompt) + longest} tokens, max_length {self.max_length}")
        if self.max_prompt_length is None and self.mode == "keep_end":
            room = self.max_length - 1
            completions = [completion[max(len(completion) - room, 0) :] for completion in completions]
            kept = keep_last(prompt, self.max_length - min(longest, room), bos_token_id)
            return kept, [list(completion) for completion in completions]
        limit = len(prompt) if self.max_prompt_length is None else self.max_prompt_length
        kept = keep_last(prompt, limit, bos_token_id)
        room = max(self.max_length - len(kept), 0)
        return kept, [list(completion[:room]) for completion in completions]


def keep_last(ids: Sequence[int], limit: int, bos_token_id: int | None) -> list[int]:
    """The last `limit` ids; a BOS in first place stays there and counts."""
    assert limit >= 1
    if len(ids) <= limit:
        return list(ids)
    if bos_token_id is not None and ids[0] == bos_token_id:
        return [ids[0], *ids[len(ids) - (limit - 1) :]]
    return list(ids[len(ids) - limit :])
