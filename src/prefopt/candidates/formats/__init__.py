"""Data formats of other projects: each is read into candidate records or into pairs, and written from them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from prefopt.candidates.pairs import aggregate_scores
from prefopt.candidates.records import Record
from prefopt.data.faults import BadRow
from prefopt.data.messages import Message, Text, as_messages
from prefopt.data.rows import Row, normalise_pair

Kind: TypeAlias = Literal["records", "pairs"]


@dataclass
class Context:
    """What a conversion may need besides the rows, and what it counts.

    Attributes:
        columns: columns of responses, for the format that takes any dataset.
        golden: query_id -> golden answer.
        score: name of the scores to write; None where there is one kind only.
        one_sample: use one random sample of each query and not all.
        seed: draws that sample.
        as_messages: read HH dialogues as messages.
        counts: what was dropped or changed, and how often.
    """

    columns: Sequence[str] = ()
    golden: dict[str, str] | None = None
    score: str | None = None
    one_sample: bool = False
    seed: int = 42
    as_messages: bool = False
    counts: Counter[str] = field(default_factory=Counter)


Reader: TypeAlias = Callable[[Sequence[Row], Context], list[Row]]
Writer: TypeAlias = Callable[[Sequence[Row], Context], list[Row]]


@dataclass(frozen=True)
class Format:
    """One format: what it holds, and how it is read and written (None: it is not)."""

    summary: str
    kind: Kind
    read: Reader | None
    write: Writer | None


def read_pairs(rows: Sequence[Row], context: Context) -> list[Row]:
    """Pairs of any shape that the trainers take, in one: prompt, chosen, rejected, method columns and `prompt_id`; bad rows counted."""
    pairs = []
    for row in rows:
        try:
            named = {} if row.get("prompt_id") is None else {"prompt_id": str(row["prompt_id"])}
            pairs.append({**normalise_pair(row), **named})
        except BadRow as fault:
            context.counts[f"rows dropped: {fault.reason}"] += 1
    return pairs


def conversation(prompt: Text, response: Text) -> list[Message]:
    """Prompt and response as one conversation."""
    answer = [{"role": "assistant", "content": response}] if isinstance(response, str) else response
    return [*as_messages(prompt), *answer]


def plain_prompt(prompt: Text) -> Text:
    """The text of a prompt that is one user turn; any other prompt as it is."""
    if isinstance(prompt, list) and len(prompt) == 1 and prompt[0]["role"] == "user":
        return str(prompt[0]["content"])
    return prompt


def score_name(records: Sequence[Record], wanted: str | None) -> str | None:
    """The name of the scores to use; None where the records have none.

    Raises:
        ValueError: there are several and none is chosen, or none of that name.
    """
    names = sorted(
        {name for record in records for candidate in record["candidates"] for name in candidate["scores"]}
        | {name for record in records for name in record["tables"]}
    )
    if wanted is not None and wanted not in names:
        raise ValueError(f"The records have no scores named {wanted!r}; they have {names}.")
    if wanted is None and len(names) > 1:
        raise ValueError(f"The records have several kinds of scores, {names}; choose one with `score`.")
    return wanted or (names[0] if names else None)


def scores_of(record: Record, name: str) -> list[float]:
    """One score a candidate; a table of logits is aggregated.

    Raises:
        ValueError: a candidate without the score.
    """
    if name in record["tables"]:
        return [float(score) for score in aggregate_scores(record["tables"][name])]
    scores: list[Any] = [candidate["scores"].get(name) for candidate in record["candidates"]]
    if None in scores:
        raise ValueError(f"Record {record['prompt_id']!r}: candidate {scores.index(None)} has no score {name!r}.")
    return scores
