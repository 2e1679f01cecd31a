"""Data formats of other projects: each is read into candidate records or into pairs, and written from them."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from prefopt.candidates.pairs import win_probabilities
from prefopt.candidates.records import (
    Candidate,
    Record,
    answer_text,
    check_finite,
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

GOLDEN = "golden"
SCORE = "rm_scores"
ROLES = {"Human": "user", "Assistant": "assistant"}
SPEAKERS = {role: speaker for speaker, role in ROLES.items()}
ULTRAFEEDBACK_SCORES = {"score_chosen": "chosen_score", "score_rejected": "rejected_score"}
# why a golden answer and a sample make no comparison
BLANK_GOLDEN = "blank golden answer"
BLANK_SAMPLE = "blank sample"
SAME_ANSWER = "sample equals the golden answer"
_NO_COMPARISON = {
    BLANK_GOLDEN: "empty answer",
    BLANK_SAMPLE: "empty answer",
    SAME_ANSWER: "the sample is the golden answer",
}
_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
# a further turn of the dialogue that the model wrote itself; "\nHumans are" is none
_NEXT_TURN = re.compile(r"\n\s*Human\s*:")
_SAMPLE = re.compile(r"sample_(\d+)")
_GENERATED = re.compile(r"generate_(\d+)")


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

    def drop(self, reason: str, what: str = "rows") -> None:
        """Count something that is left out."""
        self.counts[f"{what} dropped: {reason}"] += 1


# Rows are read and written one at a time; writers iterate over them more than once where they need to.
Converter: TypeAlias = Callable[[Iterable[Row], Context], Iterator[Row]]


@dataclass(frozen=True)
class Format:
    """One format: what it holds, and how it is read and written (None: it is not)."""

    kind: Literal["records", "pairs"]
    read: Converter | None
    write: Converter | None


# Pairs.


def as_they_are(rows: Iterable[Row], context: Context) -> Iterator[Row]:
    """Pass rows on unchanged."""
    return iter(rows)


def read_pairs(rows: Iterable[Row], context: Context) -> Iterator[Row]:
    """Read pairs of any shape that the trainers take: prompt, chosen, rejected, method columns and `prompt_id`."""
    for row in rows:
        try:
            pair = normalise_pair(row)
        except BadRow as fault:
            context.drop(fault.reason)
        else:
            yield pair if row.get("prompt_id") is None else {**pair, "prompt_id": str(row["prompt_id"])}


def pairs_to_records(pairs: Iterable[Row]) -> Iterator[Record]:
    """Make a record of two candidates, `chosen` and `rejected`, from each pair; pairs of one prompt share a record.

    Args:
        pairs: are iterated over twice: a record is held until the last pair of its prompt has come.
    """
    left = Counter(hash(_record_of(pair)["prompt_id"]) for pair in pairs)
    records: dict[str, Record] = {}
    for pair in pairs:
        record = _record_of(pair)
        left[hash(record["prompt_id"])] -= 1
        record = records.setdefault(record["prompt_id"], record)
        known = {candidate["text"] for candidate in record["candidates"]}
        for candidate in off_policy_candidates(pair, ["chosen", "rejected"]):
            if candidate["text"] not in known:
                same = [c for c in record["candidates"] if c["source"] == candidate["source"]]
                record["candidates"].append({**candidate, "k": len(same)})
                known.add(candidate["text"])
        while records and not left[hash(next(iter(records)))]:
            yield records.pop(next(iter(records)))


def _record_of(pair: Row) -> Record:
    prompt = as_messages(pair["prompt"]) if isinstance(pair["chosen"], list) else pair["prompt"]
    return make_record(normalise_prompt({"prompt": prompt})["row_id"], prompt, [])


def conversation(prompt: TextOrMessages, response: TextOrMessages) -> list[Message]:
    """Join prompt and response to one conversation."""
    answer = [{"role": "assistant", "content": response}] if isinstance(response, str) else response
    return [*as_messages(prompt), *answer]


def conversations(pair: Row) -> Row:
    """Return both sides of a pair as conversations."""
    return {side: conversation(pair["prompt"], pair[side]) for side in ("chosen", "rejected")}


def plain_prompt(prompt: TextOrMessages) -> TextOrMessages:
    """Return the text of a prompt that is one user turn; any other prompt unchanged."""
    if isinstance(prompt, list) and len(prompt) == 1 and prompt[0]["role"] == "user":
        return str(prompt[0]["content"])
    return prompt


# Dialogues of HH.


def from_dialogue(text: str) -> list[Message]:
    """Split a dialogue into its turns, without surrounding white space; an open last "Assistant:" is left out.

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
    """Write turns as one text; a system turn stands before the first, without a speaker.

    Raises:
        ValueError: a turn of another role.
    """
    text = ""
    for number, message in enumerate(messages):
        if not isinstance(message.get("content"), str):
            raise ValueError(f"A dialogue cannot hold the turn {str(message)[:80]!r}, which has no text.")
        if message["role"] == "system" and number == 0:
            text += f"\n\n{message['content']}"
        elif message["role"] in SPEAKERS:
            text += f"\n\n{SPEAKERS[message['role']]}: {message['content']}"
        else:
            raise ValueError(
                f"A dialogue has turns of Human and Assistant; there is none for the role {message['role']!r}."
            )
    return text


def read_hh(rows: Iterable[Row], context: Context) -> Iterator[Row]:
    """Read pairs from dialogues with a common beginning (`chosen`, `rejected`), or `prompt`, `chosen`, `rejected`."""
    for pair in read_pairs(rows, context):
        if not context.as_messages or not isinstance(pair["prompt"], str):  # messages already
            yield pair
            continue
        try:
            turns = from_dialogue(pair["prompt"] if _is_open(pair["prompt"]) else pair["prompt"] + HH_TURN)
        except ValueError:
            context.drop("not a dialogue")
            continue
        answers = {side: [{"role": "assistant", "content": pair[side].strip()}] for side in ("chosen", "rejected")}
        yield {**pair, "prompt": turns, **answers}


def _is_open(prompt: str) -> bool:
    return prompt.rstrip().endswith("Assistant:")


def write_hh(pairs: Iterable[Row], context: Context) -> Iterator[Row]:
    """Write `chosen` and `rejected`, each the whole dialogue."""
    for pair in pairs:
        if isinstance(pair["prompt"], str) and _is_open(pair["prompt"]):
            yield {side: pair["prompt"] + pair[side] for side in ("chosen", "rejected")}
        else:
            yield {side: to_dialogue(turns) for side, turns in conversations(pair).items()}


# UltraFeedback, and any dataset with responses.


def read_ultrafeedback(rows: Iterable[Row], context: Context) -> Iterator[Row]:
    """Read pairs from `prompt`, `chosen` and `rejected` (conversations), with `score_chosen` and `score_rejected`."""
    renamed = ({ULTRAFEEDBACK_SCORES.get(name, name): value for name, value in row.items()} for row in rows)
    return read_pairs(renamed, context)


def write_ultrafeedback(pairs: Iterable[Row], context: Context) -> Iterator[Row]:
    """Write `prompt`, `chosen`, `rejected`, `messages` (the chosen conversation), and the scores if there are any."""
    for pair in pairs:
        sides = conversations(pair)
        yield {
            "prompt": plain_prompt(pair["prompt"]),
            "prompt_id": pair.get("prompt_id") or pair["row_id"],
            **sides,
            "messages": sides["chosen"],
            **{theirs: pair[ours] for theirs, ours in ULTRAFEEDBACK_SCORES.items() if ours in pair},
        }


def read_completions(rows: Iterable[Row], context: Context) -> Iterator[Record]:
    """Read records from `instruction` and `completions` with `model`, `response` and numbers (`overall_score`)."""
    named = ({**row, "prompt": row.get("instruction")} for row in rows)
    return read_responses(named, Context(columns=["completions"], counts=context.counts))


def write_completions(records: Iterable[Record], context: Context) -> Iterator[Row]:
    """Write `instruction`, `models`, `completions` with `model`, `response` and the chosen score."""
    name = score_name(records, context.score)
    for record in records:
        completions = [
            {"model": c["source"], "response": c["text"], **({name: c["scores"].get(name)} if name else {})}
            for c in record["candidates"]
        ]
        yield {
            "instruction": plain_prompt(record["prompt"]),
            "models": [completion["model"] for completion in completions],
            "completions": completions,
        }


def read_responses(rows: Iterable[Row], context: Context) -> Iterator[Record]:
    """Read records from any dataset with a prompt and columns of responses (`context.columns`).

    Raises:
        ValueError: no columns are named, or one holds no responses.
    """
    if not context.columns:
        raise ValueError("Name the columns that hold responses with `columns`.")
    seen: set[int] = set()  # hashes take a fraction of the memory
    for number, row in enumerate(rows):
        try:
            clean = normalise_prompt(row)
        except BadRow as fault:
            context.drop(fault.reason)
            continue
        name = str(row.get("prompt_id") or clean["row_id"])
        if hash(name) in seen:
            context.drop("prompt seen before")
            continue
        seen.add(hash(name))
        try:
            candidates = off_policy_candidates(row, context.columns)
        except ValueError as error:
            raise ValueError(f"Row {number}: {error}") from error
        yield make_record(name, clean["prompt"], candidates)


# APO.


def clean_response(text: str) -> str:
    """Return the response up to a further turn of the user, stripped there; unchanged where there is none."""
    found = _NEXT_TURN.search(text)
    return text[: found.start()].strip() if found else text


def golden_fault(golden: str, sample: str) -> str | None:
    """Return why a golden answer and a sample make no comparison; None where they do."""
    if not golden.strip():
        return BLANK_GOLDEN
    if not sample.strip():
        return BLANK_SAMPLE
    return SAME_ANSWER if sample.strip() == golden.strip() else None


def sample_columns(row: Iterable[str]) -> list[str]:
    """Return the columns `sample_0`, `sample_1`, ... by their numbers."""
    return sorted(filter(_SAMPLE.fullmatch, row), key=lambda name: int(name[7:]))


def read_golden(rows: Iterable[Row]) -> dict[str, str]:
    """Read golden answers by query_id.

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


def read_samples(rows: Iterable[Row], context: Context) -> Iterator[Record]:
    """Read records from `query_id`, `query` (or `instruction`) and `sample_0`, ..., with the golden answer first.

    Missing samples, queries without samples, samples without a golden answer and golden answers without samples are
    counted.

    Raises:
        ValueError: a row without its query, or a query that comes twice with different samples.
    """
    golden = context.golden
    seen: dict[str, str] = {}
    most = held = read = 0
    for number, row in enumerate(rows):
        columns = sample_columns(row)
        most = max(most, len(columns))
        query = row.get("query") if row.get("query") is not None else row.get("instruction")
        if row.get("query_id") is None or not isinstance(query, str):
            raise ValueError(f"Samples, row {number}: `query_id` and `query` are needed, found {sorted(row)}.")
        name = str(row["query_id"])
        if golden is not None and name not in golden:
            context.drop("no golden answer", "queries")
            continue
        candidates = _samples(row, columns)
        read, held = read + 1, held + len(candidates)
        if not candidates:
            context.drop("no sample", "queries")
            continue
        if golden is not None:
            candidates.insert(0, make_candidate(clean_response(golden[name]), source=GOLDEN))
        record = make_record(name, query, candidates)
        content = content_hash(record)
        if seen.get(name, content) != content:
            raise ValueError(f"Samples, row {number}: the query {name!r} comes a second time with other samples.")
        if name not in seen:
            seen[name] = content
            yield record
    context.counts["samples missing"] += most * read - held
    if golden is not None:
        context.counts["golden answers without samples"] += len(set(golden) - set(seen))


def _samples(row: Row, columns: Sequence[str]) -> list[Candidate]:
    return [
        make_candidate(clean_response(row[name]), source="sample", k=int(name[7:]))
        for name in columns
        if isinstance(row[name], str)
    ]


def write_samples(records: Iterable[Record], context: Context) -> Iterator[Row]:
    """Write `query_id`, `query`, `sample_0`, ...; a golden answer under `golden`."""
    for record in records:
        golden, samples = _golden_and_samples(record)
        row: Row = {"query_id": record["prompt_id"], "query": _query(record)}
        row |= {f"sample_{k}": text for k, text in enumerate(samples)}
        yield row if golden is None else {**row, GOLDEN: golden}


def _golden_and_samples(record: Record) -> tuple[str | None, list[str]]:
    golden = next((c["text"] for c in record["candidates"] if c["source"] == GOLDEN), None)
    return golden, [c["text"] for c in record["candidates"] if c["source"] != GOLDEN]


def write_adversarial_pairs(records: Iterable[Record], context: Context) -> Iterator[Row]:
    """Compare the golden answer (score 1) with each sample (score 0), in rows marked as adversarial.

    Samples that are empty or the golden answer itself, and rows whose text holds the separator, are left out and
    counted.

    Raises:
        ValueError: a record without a golden answer.
    """
    for record in records:
        golden, samples = _golden_and_samples(record)
        if golden is None:
            raise ValueError(
                f"Record {record['prompt_id']!r} has no golden answer; give the file of golden answers as `golden`."
            )
        if context.one_sample and samples:
            samples = [random.Random(content_hash(context.seed, record["prompt_id"])).choice(samples)]
        for sample in samples:
            if fault := golden_fault(golden, sample):
                context.drop(_NO_COMPARISON[fault], "pairs")
            elif any(SEPARATOR in text for text in (_query(record), golden, sample)):
                context.drop(f"a text holds {SEPARATOR}", "pairs")
            else:
                yield {**_comparison(record, [golden, sample], [1.0, 0.0]), "type": ADVERSARIAL_TYPE}


def write_comparisons(records: Iterable[Record], context: Context) -> Iterator[Row]:
    """Write `text` ("query<sep>response" for each candidate), `scores` and `query_id`.

    Records with the separator in a text are left out and counted.

    Raises:
        ValueError: candidates without scores.
    """
    name = score_name(records, context.score)
    if name is None:
        raise ValueError("The records have no scores; run `prefopt rank` first.")
    for record in records:
        texts = [candidate["text"] for candidate in record["candidates"]]
        if any(SEPARATOR in text for text in (_query(record), *texts)):
            context.drop(f"a text holds {SEPARATOR}", "records")
        else:
            yield _comparison(record, texts, scores_of(record, name))


def _comparison(record: Record, texts: Sequence[str], scores: Sequence[float]) -> Row:
    query = _query(record)
    return {
        "text": [f"{query}{SEPARATOR}{text}" for text in texts],
        "scores": list(scores),
        "query_id": record["prompt_id"],
    }


def _query(record: Record) -> str:
    """Return the prompt as these files hold it: a text, or a dialogue that is open at its end."""
    prompt = record["prompt"]
    return prompt if isinstance(prompt, str) else to_dialogue(prompt) + HH_TURN


def read_comparisons(rows: Iterable[Row], context: Context) -> Iterator[Record]:
    """Read records from `text` and `scores`, whatever the number of responses; rows of one query are not joined.

    Raises:
        ValueError: not exactly one separator in a text, several queries in a row, or unequal lengths.
    """
    for number, row in enumerate(rows):
        texts, scores = row.get("text"), row.get("scores")
        if not isinstance(texts, list) or not isinstance(scores, list) or len(texts) != len(scores) or not texts:
            raise ValueError(f"Row {number}: `text` and `scores` must be lists of one length, at least 1.")
        if any(not isinstance(text, str) or text.count(SEPARATOR) != 1 for text in texts):
            raise ValueError(f"Row {number}: each text needs exactly one {SEPARATOR!r} between query and response.")
        queries, responses = zip(*(text.split(SEPARATOR) for text in texts))
        if len(set(queries)) != 1:
            raise ValueError(f"Row {number} holds responses to {len(set(queries))} different queries.")
        numbers = check_finite(scores, f"Row {number}: a score")
        sources = [GOLDEN if row.get("type") == ADVERSARIAL_TYPE and k == 0 else "sample" for k in range(len(texts))]
        candidates = [
            make_candidate(text, source=source, k=k, scores={"score": score})
            for k, (text, source, score) in enumerate(zip(responses, sources, numbers))
        ]
        # rows of one query are different comparisons
        yield make_record(row_id(queries[0], list(responses), {"row": number}), queries[0], candidates)


# SPPO.


def read_generated(rows: Iterable[Row], context: Context) -> Iterator[Record]:
    """Read records from `prompt`, `generate_0`, ..., `generate_<K-1>` and, where there are any, `rm_scores`.

    The published tables of the first iteration score two responses more than they hold; the scores of those that are
    held come last. Such rows are counted. `probability` follows from the scores and is not kept. Every row is a
    record, those of a prompt that comes again too.

    Raises:
        ValueError: no `generate_k` columns, a gap among them, or fewer scores than responses.
    """
    seen: set[str] = set()
    for number, row in enumerate(rows):
        columns = sorted(filter(_GENERATED.fullmatch, row), key=lambda name: int(name[9:]))
        if [int(name[9:]) for name in columns] != list(range(len(columns))) or not columns:
            raise ValueError(f"Row {number} has the columns {sorted(row)}; generate_0, generate_1, ... are needed.")
        try:
            prompt = clean_text(row.get("prompt"), "prompt")
        except BadRow as fault:
            context.drop(fault.reason)
            continue
        texts = [answer_text(row[name], f"Row {number}, {name}") for name in columns]
        if None in texts:
            raise ValueError(
                f"Row {number}: {columns[texts.index(None)]} holds neither a text nor a conversation that ends with "
                "an answer."
            )
        scores: list[dict[str, float]] = [{} for _ in columns]
        if row.get(SCORE) is not None:
            numbers = check_finite(row[SCORE], f"Row {number}: {SCORE}")
            if len(numbers) < len(columns):
                raise ValueError(f"Row {number} has {len(columns)} responses but {len(numbers)} {SCORE}.")
            if len(numbers) > len(columns):
                context.counts["rows with rm_scores of responses that they do not hold"] += 1
            scores = [{SCORE: value} for value in numbers[-len(columns) :]]
        candidates = [
            make_candidate(str(text), source=name, scores=score) for text, name, score in zip(texts, columns, scores)
        ]
        name = str(row.get("prompt_id") or row_id(prompt, [], {}))
        if name in seen:
            name = row_id(prompt, [candidate["text"] for candidate in candidates], {"row": number})
        seen.add(name)
        yield make_record(name, prompt, candidates)


def write_generated(records: Iterable[Record], context: Context) -> Iterator[Row]:
    """Write `prompt`, `prompt_id`, `generate_k` as conversations; with scores also `rm_scores` and `probability`.

    Formula: P_ij = 1 / (1 + exp(s_j - s_i)), P_ii = 0.5, (K, K), from the scores s (K,); a table of logits is
    aggregated to s_i = (1/K) sum_j (c_ij - c_ji).

    Raises:
        ValueError: records with different numbers of candidates, which these columns cannot hold.
    """
    sizes = {len(record["candidates"]) for record in records}
    if len(sizes) != 1:
        raise ValueError(
            f"The records have {sorted(sizes)} candidates; generate_k columns need the same number for all."
        )
    name = score_name(records, context.score)
    for record in records:
        row: Row = {"prompt_id": record["prompt_id"], "prompt": plain_prompt(record["prompt"])}
        for k, candidate in enumerate(record["candidates"]):
            row[f"generate_{k}"] = conversation(record["prompt"], candidate["text"])
        if name is not None:
            scores = scores_of(record, name)
            row |= {"probability": win_probabilities(scores).tolist(), SCORE: scores}
        yield row


def write_pairs(pairs: Iterable[Row], context: Context) -> Iterator[Row]:
    """Write `prompt`, conversations `chosen` and `rejected`, `chosen_probs`, `chosen_probs_win`, `chosen_probs_lose`.

    Raises:
        ValueError: a pair without its probabilities.
    """
    for number, pair in enumerate(pairs):
        missing = [name for name in COLUMN_ALIASES.values() if pair.get(name) is None]
        if missing:
            raise ValueError(f"Pair {number} has no {missing[0]}; build the pairs with the policy sppo or sppo_paper.")
        probabilities = {theirs: pair[ours] for theirs, ours in COLUMN_ALIASES.items()}
        yield {"prompt": plain_prompt(pair["prompt"]), **conversations(pair), **probabilities}


FORMATS: dict[str, Format] = {
    "records": Format("records", as_they_are, as_they_are),
    "pairs": Format("pairs", read_pairs, as_they_are),
    "responses": Format("records", read_responses, None),
    "sppo_generated": Format("records", read_generated, write_generated),
    "sppo": Format("pairs", read_pairs, write_pairs),
    "apo_samples": Format("records", read_samples, write_samples),
    "apo_comparisons": Format("records", read_comparisons, write_comparisons),
    "apo_pairs": Format("records", None, write_adversarial_pairs),
    "ultrafeedback": Format("pairs", read_ultrafeedback, write_ultrafeedback),
    "ultrafeedback_completions": Format("records", read_completions, write_completions),
    "hh": Format("pairs", read_hh, write_hh),
}
