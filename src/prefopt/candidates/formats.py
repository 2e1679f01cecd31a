"""Data formats of other projects: each is read into candidate records or into pairs, and written from them."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from prefopt.candidates.pairs import win_probabilities
from prefopt.candidates.records import (
    Record,
    make_candidate,
    make_record,
    off_policy_candidates,
    score_name,
    scores_of,
)
from prefopt.data.messages import HH_TURN, BadRow, Message, TextOrMessages, as_messages, clean_text
from prefopt.data.rows import (
    ADVERSARIAL_TYPE,
    COLUMN_ALIASES,
    SEPARATOR,
    Row,
    normalise_pair,
    normalise_prompt,
    row_id,
)
from prefopt.files import content_hash

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


def conversation(prompt: TextOrMessages, response: TextOrMessages) -> list[Message]:
    """Prompt and response as one conversation."""
    answer = [{"role": "assistant", "content": response}] if isinstance(response, str) else response
    return [*as_messages(prompt), *answer]


def plain_prompt(prompt: TextOrMessages) -> TextOrMessages:
    """The text of a prompt that is one user turn; any other prompt as it is."""
    if isinstance(prompt, list) and len(prompt) == 1 and prompt[0]["role"] == "user":
        return str(prompt[0]["content"])
    return prompt


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


GOLDEN = "golden"
# a further turn of the dialogue that the model wrote itself; "\nHumans are" is none
_NEXT_TURN = re.compile(r"\n\s*Human\s*:")
_SAMPLE = re.compile(r"sample_(\d+)")


def clean_response(text: str) -> str:
    """The response up to a further turn of the user, stripped there; untouched where there is none."""
    found = _NEXT_TURN.search(text)
    return text[: found.start()].strip() if found else text


def read_golden(rows: Sequence[Row]) -> dict[str, str]:
    """query_id -> golden answer.

    Raises:
        ValueError: a row without `query_id` or `golden`, or two different answers to one query.
    """
    golden: dict[str, str] = {}
    for number, row in enumerate(rows):
        if row.get("query_id") is None or not isinstance(row.get(GOLDEN), str):
            raise ValueError(f"Golden answers, row {number}: `query_id` and `golden` are needed, found {sorted(row)}.")
        name = str(row["query_id"])
        if golden.setdefault(name, row[GOLDEN]) != row[GOLDEN]:
            raise ValueError(f"Golden answers, row {number}: a second, different answer to the query {name!r}.")
    return golden


def read_samples(rows: Sequence[Row], context: Context) -> list[Record]:
    """Records from `query_id`, `query` (or `instruction`) and `sample_0`, `sample_1`, ..., with the golden answer first.

    Missing samples, queries without samples, samples without a golden answer and golden answers without samples are
    counted.

    Raises:
        ValueError: a row without its query, or a query that comes twice with different samples.
    """
    golden = context.golden
    records: dict[str, Record] = {}
    most = max((sum(bool(_SAMPLE.fullmatch(name)) for name in row) for row in rows), default=0)
    for number, row in enumerate(rows):
        query = row.get("query") if row.get("query") is not None else row.get("instruction")
        if row.get("query_id") is None or not isinstance(query, str):
            raise ValueError(f"Samples, row {number}: `query_id` and `query` are needed, found {sorted(row)}.")
        name = str(row["query_id"])
        if golden is not None and name not in golden:
            context.counts["queries dropped: no golden answer"] += 1
            continue
        candidates = _samples(row, context, most)
        if not candidates:
            context.counts["queries dropped: no sample"] += 1
            continue
        if golden is not None:
            candidates.insert(0, make_candidate(clean_response(golden[name]), source=GOLDEN))
        record = make_record(name, query, candidates)
        if records.setdefault(name, record) != record:
            raise ValueError(f"Samples, row {number}: the query {name!r} comes a second time with other samples.")
    if golden is not None:
        context.counts["golden answers without samples"] += len(set(golden) - set(records))
    return list(records.values())


def _samples(row: Row, context: Context, most: int) -> list[dict[str, Any]]:
    names = sorted((name for name in row if _SAMPLE.fullmatch(name)), key=lambda name: int(name[7:]))
    held = [name for name in names if isinstance(row[name], str)]
    context.counts["samples missing"] += most - len(held)
    return [make_candidate(clean_response(row[name]), source="sample", k=int(name[7:])) for name in held]


def write_samples(records: Sequence[Record], context: Context) -> list[Row]:
    """`query_id`, `query`, `sample_0`, ...; a golden answer under `golden`."""
    rows = []
    for record in records:
        row: Row = {"query_id": record["prompt_id"], "query": _query(record)}
        others = [candidate for candidate in record["candidates"] if candidate["source"] != GOLDEN]
        golden = [candidate["text"] for candidate in record["candidates"] if candidate["source"] == GOLDEN]
        row |= {f"sample_{k}": candidate["text"] for k, candidate in enumerate(others)}
        rows.append(row | ({GOLDEN: golden[0]} if golden else {}))
    return rows


def write_adversarial_pairs(records: Sequence[Record], context: Context) -> list[Row]:
    """A comparison of the golden answer (score 1) with each sample (score 0), marked as adversarial.

    Samples that are empty or the golden answer itself, and rows whose text holds the separator, are left out and
    counted.

    Raises:
        ValueError: a record without a golden answer.
    """
    rows = []
    for record in records:
        golden = next((c["text"] for c in record["candidates"] if c["source"] == GOLDEN), None)
        if golden is None:
            raise ValueError(
                f"Record {record['prompt_id']!r} has no golden answer; give the file of golden answers as `golden`."
            )
        samples = [c["text"] for c in record["candidates"] if c["source"] != GOLDEN]
        if context.one_sample and samples:
            samples = [random.Random(content_hash(context.seed, record["prompt_id"])).choice(samples)]
        for sample in samples:
            reason = _fault(_query(record), golden, sample)
            if reason:
                context.counts[f"pairs dropped: {reason}"] += 1
            else:
                rows.append({**_comparison(record, [golden, sample], [1.0, 0.0]), "type": ADVERSARIAL_TYPE})
    return rows


def _fault(query: str, golden: str, sample: str) -> str | None:
    if not sample.strip() or not golden.strip():
        return "empty answer"
    if sample.strip() == golden.strip():
        return "the sample is the golden answer"
    return "a text holds <sep>" if any(SEPARATOR in text for text in (query, golden, sample)) else None


def write_comparisons(records: Sequence[Record], context: Context) -> list[Row]:
    """`text` ("query<sep>response" for each candidate), `scores` and `query_id`; a text with the separator is counted.

    Raises:
        ValueError: candidates without scores.
    """
    name = score_name(records, context.score)
    if name is None:
        raise ValueError("The records have no scores; run `prefopt rank` first.")
    rows = []
    for record in records:
        texts = [candidate["text"] for candidate in record["candidates"]]
        if any(SEPARATOR in text for text in (_query(record), *texts)):
            context.counts["records dropped: a text holds <sep>"] += 1
        else:
            rows.append(_comparison(record, texts, scores_of(record, name)))
    return rows


def _comparison(record: Record, texts: Sequence[str], scores: Sequence[float]) -> Row:
    query = _query(record)
    return {
        "text": [f"{query}{SEPARATOR}{text}" for text in texts],
        "scores": list(scores),
        "query_id": record["prompt_id"],
    }


def read_comparisons(rows: Sequence[Row], context: Context) -> list[Record]:
    """Records from `text` and `scores`, whatever the number of responses; rows of one query are not joined.

    Raises:
        ValueError: not exactly one separator in a text, several queries in a row, or unequal lengths.
    """
    records = []
    for number, row in enumerate(rows):
        texts, scores = row.get("text"), row.get("scores")
        if not isinstance(texts, list) or not isinstance(scores, list) or len(texts) != len(scores) or not texts:
            raise ValueError(f"Row {number}: `text` and `scores` must be lists of one length, at least 1.")
        if any(text.count(SEPARATOR) != 1 for text in texts):
            raise ValueError(f"Row {number}: each text needs exactly one {SEPARATOR!r} between query and response.")
        queries, responses = zip(*(text.split(SEPARATOR) for text in texts))
        if len(set(queries)) != 1:
            raise ValueError(f"Row {number} holds responses to {len(set(queries))} different queries.")
        sources = [GOLDEN if row.get("type") == ADVERSARIAL_TYPE and k == 0 else "sample" for k in range(len(texts))]
        candidates = [
            make_candidate(text, source=source, k=k, scores={"score": float(score)})
            for k, (text, source, score) in enumerate(zip(responses, sources, scores))
        ]
        # rows of one query are different comparisons
        records.append(make_record(row_id(queries[0], list(responses), {"row": number}), queries[0], candidates))
    return records


def _query(record: Record) -> str:
    """The prompt as these files hold it, a text.

    Raises:
        ValueError: a prompt of several turns.
    """
    prompt = record["prompt"]
    return prompt if isinstance(prompt, str) else to_dialogue(prompt) + "\n\nAssistant:"


SCORE = "rm_scores"
_GENERATED = re.compile(r"generate_(\d+)")


def read_generated(rows: Sequence[Row], context: Context) -> list[Record]:
    """Records from `prompt`, `generate_0`, ..., `generate_<K-1>` and, where there are any, `rm_scores`.

    The published tables of the first iteration score two responses more than they hold; the scores of those that are
    held
    come last. Such rows are counted. `probability` follows from the scores and is not kept. Every row is a record,
    those of a
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

    Formula: P_ij = 1 / (1 + exp(s_j - s_i)), P_ii = 0.5; a table of logits is aggregated to s_i = (1/K) sum_j (c_ij -
    c_ji).

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
