"""The SPPO repository's tables: `generate_k` beside `rm_scores` and `probability`, and pairs with `chosen_probs*`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from prefopt.candidates.formats import Context, conversation, plain_prompt, score_name, scores_of
from prefopt.candidates.pairs import win_probabilities
from prefopt.candidates.records import Record, make_candidate, make_record
from prefopt.data.faults import BadRow
from prefopt.data.messages import clean_text
from prefopt.data.rows import COLUMN_ALIASES, Row, row_id

SCORE = "rm_scores"
_GENERATED = re.compile(r"generate_(\d+)")


def read_generated(rows: Sequence[Row], context: Context) -> list[Record]:
    """Records from `prompt`, `generate_0`, ..., `generate_<K-1>` and, where there are any, `rm_scores`.

    The published tables of the first iteration score two responses more than they hold; the scores of those that are held
    come last. Such rows are counted. `probability` follows from the scores and is not kept. Every row is a record, those of a
    prompt that comes again too.

    Raises:
        ValueError: no `generate_k` columns, a gap among them, or fewer scores than responses.
    """
    records: dict[str, Record] = {}
    for number, row in enumerate(rows):
        columns = sorted((name for name in row if _GENERATED.fullmatch(name)), key=lambda n: int(n[9:]))
        if [int(name[9:]) for name in columns] != list(range(len(columns))) or not columns:
            raise ValueError(f"Row {number} has the columns {sorted(row)}; generate_0, generate_1, ... are needed.")
        try:
            prompt = clean_text(row.get("prompt"), "prompt")
        except BadRow as fault:
            context.counts[f"rows dropped: {fault.reason}"] += 1
            continue
        scores = row.get(SCORE)
        if scores is not None and len(scores) < len(columns):
            raise ValueError(f"Row {number} has {len(columns)} responses but {len(scores)} rm_scores.")
        if scores is not None and len(scores) > len(columns):
            context.counts["rows with rm_scores of responses that they do not hold"] += 1
            scores = scores[-len(columns) :]
        candidates = [
            make_candidate(
                _answer(row[name], number),
                source=name,
                scores={SCORE: float(scores[k])} if scores is not None else {},
            )
            for k, name in enumerate(columns)
        ]
        name = str(row.get("prompt_id") or row_id(prompt, [], {}))
        if name in records:
            name = row_id(prompt, [candidate["text"] for candidate in candidates], {"row": number})
        records[name] = make_record(name, prompt, candidates)
    return list(records.values())


def _answer(value: Any, number: int) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and value[-1].get("role") == "assistant":
        return str(value[-1]["content"])
    raise ValueError(
        f"Row {number}: a generate_k column holds neither a text nor a conversation that ends with an answer."
    )


def write_generated(records: Sequence[Record], context: Context) -> list[Row]:
    """`prompt`, `prompt_id`, `generate_k` as conversations; with scores also `rm_scores` (K,) and `probability` (K, K).

    Formula: P_ij = 1 / (1 + exp(s_j - s_i)), P_ii = 0.5; a table of logits is aggregated to s_i = (1/K) sum_j (c_ij - c_ji).

    Raises:
        ValueError: records with different numbers of candidates, which these columns cannot hold.
    """
    sizes = {len(record["candidates"]) for record in records}
    if len(sizes) != 1:
        raise ValueError(
            f"The records have {sorted(sizes)} candidates; generate_k columns need the same number for all."
        )
    name = score_name(records, context.score)
    rows = []
    for record in records:
        row: Row = {"prompt_id": record["prompt_id"], "prompt": plain_prompt(record["prompt"])}
        for k, candidate in enumerate(record["candidates"]):
            row[f"generate_{k}"] = conversation(record["prompt"], candidate["text"])
        if name is not None:
            scores = scores_of(record, name)
            row |= {"probability": win_probabilities(scores).tolist(), SCORE: scores}
        rows.append(row)
    return rows


def write_pairs(pairs: Sequence[Row], context: Context) -> list[Row]:
    """`prompt`, `chosen` and `rejected` as conversations, and `chosen_probs`, `chosen_probs_win`, `chosen_probs_lose`.

    Raises:
        ValueError: a pair without its probabilities.
    """
    rows = []
    for number, pair in enumerate(pairs):
        missing = [name for name in COLUMN_ALIASES.values() if pair.get(name) is None]
        if missing:
            raise ValueError(f"Pair {number} has no {missing[0]}; build the pairs with the policy sppo or sppo_paper.")
        row: Row = {"prompt": plain_prompt(pair["prompt"])}
        row |= {side: conversation(pair["prompt"], pair[side]) for side in ("chosen", "rejected")}
        rows.append(row | {theirs: pair[ours] for theirs, ours in COLUMN_ALIASES.items()})
    return rows
