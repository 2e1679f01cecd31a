"""HH dialogues (`\\n\\nHuman: ...\\n\\nAssistant: ...`) and UltraFeedback's conversations."""

from __future__ import annotations

import re
from collections.abc import Sequence

from prefopt.candidates.formats import Context, conversation, plain_prompt, read_pairs, score_name
from prefopt.candidates.records import Record, make_record, off_policy_candidates
from prefopt.data.faults import BadRow
from prefopt.data.messages import HH_TURN, Message, as_messages
from prefopt.data.rows import Row, normalise_prompt

ROLES = {"Human": "user", "Assistant": "assistant"}
_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
ULTRAFEEDBACK_SCORES = {"score_chosen": "chosen_score", "score_rejected": "rejected_score"}


def from_dialogue(text: str) -> list[Message]:
    """The turns of a dialogue, their surrounding white space removed; an open last "Assistant:" is left out.

    Raises:
        ValueError: the text does not begin with a turn.
    """
    parts = _TURN.split(text.lstrip("\n"))
    if len(parts) < 3 or parts[0].strip():
        raise ValueError(f"Not a dialogue of Human: and Assistant: turns: {text[:60]!r}.")
    turns = [
        {"role": ROLES[speaker], "content": content.strip()}
        for speaker, content in zip(parts[1::2], parts[2::2], strict=True)
    ]
    if turns[-1] == {"role": "assistant", "content": ""}:
        turns.pop()
    return turns


def to_dialogue(messages: Sequence[Message]) -> str:
    """The turns as one text; a system turn stands before the first, without a speaker.

    Raises:
        ValueError: a turn of another role.
    """
    names = {role: speaker for speaker, role in ROLES.items()}
    text = ""
    for number, message in enumerate(messages):
        if message["role"] == "system" and number == 0:
            text += f"\n\n{message['content']}"
        elif message["role"] in names:
            text += f"\n\n{names[message['role']]}: {message['content']}"
        else:
            raise ValueError(
                f"A dialogue has turns of Human and Assistant; there is none for the role {message['role']!r}."
            )
    return text


def read_hh(rows: Sequence[Row], context: Context) -> list[Row]:
    """Pairs from two dialogues with a common beginning (`chosen`, `rejected`), or from `prompt`, `chosen`, `rejected`."""
    pairs = read_pairs(rows, context)
    if not context.as_messages:
        return pairs
    found = []
    for pair in pairs:
        try:
            turns = from_dialogue(pair["prompt"] + HH_TURN if not _is_open(pair["prompt"]) else pair["prompt"])
        except ValueError:
            context.counts["rows dropped: not a dialogue"] += 1
            continue
        answers = {side: [{"role": "assistant", "content": pair[side].strip()}] for side in ("chosen", "rejected")}
        found.append({**pair, "prompt": turns, **answers})
    return found


def _is_open(prompt: str) -> bool:
    return prompt.rstrip().endswith("Assistant:")


def write_hh(pairs: Sequence[Row], context: Context) -> list[Row]:
    """`chosen` and `rejected`, each the whole dialogue."""
    rows = []
    for pair in pairs:
        if isinstance(pair["prompt"], str) and _is_open(pair["prompt"]):
            rows.append({side: pair["prompt"] + pair[side] for side in ("chosen", "rejected")})
        else:
            rows.append(
                {side: to_dialogue(conversation(pair["prompt"], pair[side])) for side in ("chosen", "rejected")}
            )
    return rows


def read_ultrafeedback(rows: Sequence[Row], context: Context) -> list[Row]:
    """Pairs from `prompt`, `chosen` and `rejected` (conversations), with `score_chosen` and `score_rejected`."""
    renamed = [{ULTRAFEEDBACK_SCORES.get(name, name): value for name, value in row.items()} for row in rows]
    return read_pairs(renamed, context)


def write_ultrafeedback(pairs: Sequence[Row], context: Context) -> list[Row]:
    """`prompt`, `chosen`, `rejected`, `messages` (the chosen conversation), and the scores where there are any."""
    rows = []
    for pair in pairs:
        row: Row = {"prompt": plain_prompt(pair["prompt"]), "prompt_id": pair.get("prompt_id") or pair["row_id"]}
        row |= {side: conversation(pair["prompt"], pair[side]) for side in ("chosen", "rejected")}
        row["messages"] = row["chosen"]
        rows.append(row | {theirs: pair[ours] for theirs, ours in ULTRAFEEDBACK_SCORES.items() if ours in pair})
    return rows


def read_completions(rows: Sequence[Row], context: Context) -> list[Record]:
    """Records from `instruction` and `completions`, each with `model`, `response` and numbers such as `overall_score`."""
    named = [{**row, "prompt": row.get("instruction")} for row in rows]
    return read_responses(named, Context(columns=["completions"], counts=context.counts))


def write_completions(records: Sequence[Record], context: Context) -> list[Row]:
    """`instruction`, `models`, `completions` with `model`, `response` and the chosen score."""
    name = score_name(records, context.score)
    rows = []
    for record in records:
        completions = [
            {"model": c["source"], "response": c["text"], **({name: c["scores"].get(name)} if name else {})}
            for c in record["candidates"]
        ]
        rows.append(
            {
                "instruction": plain_prompt(record["prompt"]),
                "models": [completion["model"] for completion in completions],
                "completions": completions,
            }
        )
    return rows


def read_responses(rows: Sequence[Row], context: Context) -> list[Record]:
    """Records from any dataset with a prompt and columns of responses (`context.columns`); bad rows are counted.

    Raises:
        ValueError: no columns are named, or one holds no responses.
    """
    if not context.columns:
        raise ValueError("Name the columns that hold responses with `columns`.")
    records: dict[str, Record] = {}
    for row in rows:
        try:
            clean = normalise_prompt(row)
        except BadRow as fault:
            context.counts[f"rows dropped: {fault.reason}"] += 1
            continue
        name = str(row.get("prompt_id") or clean["row_id"])
        if name in records:
            context.counts["rows dropped: prompt seen before"] += 1
            continue
        records[name] = make_record(name, clean["prompt"], off_policy_candidates(row, context.columns))
    return list(records.values())


def pairs_to_records(pairs: Sequence[Row]) -> list[Record]:
    """A record of two candidates, `chosen` and `rejected`, for each pair; pairs of one prompt share a record."""
    records: dict[str, Record] = {}
    for pair in pairs:
        prompt = as_messages(pair["prompt"]) if isinstance(pair["chosen"], list) else pair["prompt"]
        name = normalise_prompt({"prompt": prompt})["row_id"]
        record = records.setdefault(name, make_record(name, prompt, []))
        known = {candidate["text"] for candidate in record["candidates"]}
        for candidate in off_policy_candidates(pair, ["chosen", "rejected"]):
            if candidate["text"] not in known:
                same = [c for c in record["candidates"] if c["source"] == candidate["source"]]
                record["candidates"].append({**candidate, "k": len(same)})
                known.add(candidate["text"])
    return list(records.values())
