"""The adversarial preference optimization repository's files: golden answers, samples, and `text`/`scores` comparisons."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any

from prefopt.candidates.formats import Context, score_name, scores_of
from prefopt.candidates.records import Record, make_candidate, make_record
from prefopt.data.comparisons import ADVERSARIAL_TYPE, SEPARATOR
from prefopt.data.rows import Row, row_id
from prefopt.files import content_hash

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

    Missing samples, queries without samples, samples without a golden answer and golden answers without samples are counted.

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

    Samples that are empty or the golden answer itself, and rows whose text holds the separator, are left out and counted.

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
    from prefopt.candidates.formats.dialogues import to_dialogue

    prompt = record["prompt"]
    return prompt if isinstance(prompt, str) else to_dialogue(prompt) + "\n\nAssistant:"
