"""The record of on-policy data: a prompt and its candidates, sampled or from a dataset, scored or not yet."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from datasets import Dataset, Features, Json, List, Value

from prefopt.arguments import HubArguments
from prefopt.candidates.pairs import aggregate_scores
from prefopt.data.messages import TextOrMessages, clean_text, without_none
from prefopt.data.rows import CONTEXT_COLUMNS
from prefopt.data.sources import DataSource, load_source
from prefopt.files import atomic_path, read_jsonl, write_jsonl

Candidate: TypeAlias = dict[str, Any]
Record: TypeAlias = dict[str, Any]

RECORD_FILES = ("candidates.parquet", "candidates.jsonl")
# why a candidate ended; None where nobody knows, as for the responses of a dataset
FINISH_REASONS = ("stop", "length", None)
TEXT_KEYS = ("text", "response", "content", "output")
SOURCE_KEYS = ("source", "model")
_MESSAGE = {"role": Value("string"), "content": Value("string")}


def make_candidate(
    text: str,
    *,
    source: str,
    k: int = 0,
    finish_reason: str | None = None,
    num_tokens: int | None = None,
    scores: Mapping[str, float] | None = None,
) -> Candidate:
    """Make one candidate of a record.

    Args:
        text: the response.
        source: who wrote it: a model, or `dataset[column]` for a response that a dataset had.
        k: number among the candidates of this source, from 0.
        finish_reason: "stop", "length" (cut off by the token limit) or None (unknown).
        num_tokens: tokens generated, the stop token included; None where unknown.
        scores: ranker -> finite score, higher is better.
    """
    return {
        "source": source,
        "k": k,
        "text": text,
        "finish_reason": finish_reason,
        "num_tokens": num_tokens,
        "scores": dict(scores or {}),
    }


def make_record(prompt_id: str, prompt: TextOrMessages, candidates: Sequence[Candidate], **context: Any) -> Record:
    """Make a record; `context` is the row's `tools` and `chat_template_kwargs`, where it has them."""
    return {"prompt_id": prompt_id, "prompt": prompt, "candidates": list(candidates), "tables": {}, **context}


def context_as_text(record: Mapping[str, Any]) -> dict[str, str]:
    """Return a record's `tools` and `chat_template_kwargs`, where it has them, as JSON.

    A column has one type, and these differ in their keys from row to row.
    """
    given = {name: record[name] for name in CONTEXT_COLUMNS if record.get(name) is not None}
    return {
        name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for name, value in given.items()
    }


def check_record(record: Mapping[str, Any], where: str) -> Record:
    """Check a record and return its full form: optional fields filled in, None entries of scores dropped.

    Fields: `prompt_id`, `prompt` (string or messages), `candidates` (see `make_candidate`), `tables` (ranker -> (R, R)
    logits that candidate i, shown first, beats candidate j), and other columns as they are.

    Raises:
        ValueError: a field is missing or of the wrong type, a score is not finite; says where.
    """
    for name in ("prompt_id", "prompt", "candidates"):
        if record.get(name) is None:
            raise ValueError(
                f"{where} has no `{name}`; a record of candidates needs prompt_id, prompt and candidates."
            )
    if not isinstance(record["candidates"], list):
        raise ValueError(f"{where}: `candidates` is not a list.")
    clean: Record = {**record, "prompt_id": str(record["prompt_id"]), "prompt": clean_text(record["prompt"], "prompt")}
    clean["candidates"] = [
        _check_candidate(candidate, f"{where}, candidate {number}")
        for number, candidate in enumerate(record["candidates"])
    ]
    size = len(clean["candidates"])
    clean["tables"] = {name: table for name, table in (record.get("tables") or {}).items() if table is not None}
    for name, table in clean["tables"].items():
        if len(table) != size or any(len(line) != size for line in table):
            raise ValueError(f"{where}: the table {name!r} does not have {size} rows of {size} logits.")
        _check_finite([value for line in table for value in line], f"{where}: the table {name!r}")
    return clean


def _check_candidate(candidate: Any, where: str) -> Candidate:
    if not isinstance(candidate, Mapping) or not isinstance(candidate.get("text"), str):
        raise ValueError(f"{where} has no `text`.")
    if candidate.get("finish_reason") not in FINISH_REASONS:
        raise ValueError(f"{where}: finish_reason is {candidate.get('finish_reason')!r}, not one of {FINISH_REASONS}.")
    scores = {name: score for name, score in (candidate.get("scores") or {}).items() if score is not None}
    _check_finite(scores.values(), f"{where}: a score")
    return make_candidate(
        candidate["text"],
        source=str(candidate.get("source") or "unknown"),
        k=int(candidate.get("k") or 0),
        finish_reason=candidate.get("finish_reason"),
        num_tokens=candidate.get("num_tokens"),
        scores=scores,
    )


def _check_finite(values: Iterable[Any], what: str) -> None:
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"{what} is {value!r}, not a finite number.")


def output_file(folder: str | Path, output_format: str, *, stem: str = "candidates") -> Path:
    """Return `<stem>.<output_format>` in `folder`.

    Raises:
        ValueError: the folder holds such a file in the other format, which a reader would take for this one.
    """
    path = Path(folder) / f"{stem}.{output_format}"
    other = path.with_suffix(".jsonl" if output_format == "parquet" else ".parquet")
    if other.exists():
        raise ValueError(
            f"{other} is there already, and would be mixed up with {path.name}; remove it or give another output_dir."
        )
    return path


def file_of(path: str | Path) -> str:
    """Return the file of records in a folder that a command wrote; any other path unchanged."""
    found = (Path(path) / name for name in RECORD_FILES)
    return str(next((file for file in found if file.is_file()), path))


def read_records(path: str | Path, *, split: str = "train") -> list[Record]:
    """Read and check records from a parquet or jsonl file, a folder that a command wrote, or a hub dataset.

    Raises:
        ValueError: nothing there, or a row that is not a record; two records of one prompt_id.
    """
    name = file_of(path)
    rows: Iterable[Record]
    if Path(name).is_file() and name.endswith((".jsonl", ".jsonl.gz")) and split == "train":
        rows = read_jsonl(name)  # the JSON reader of `datasets` may change the last digit of a score
    else:
        rows = load_source(DataSource(name, split=split))
    records = [check_record(row, f"{path}, row {number}") for number, row in enumerate(rows)]
    seen: set[str] = set()
    for number, record in enumerate(records):
        if record["prompt_id"] in seen:
            raise ValueError(f"{path}, row {number}: a second record of the prompt_id {record['prompt_id']!r}.")
        seen.add(record["prompt_id"])
        if isinstance(record["prompt"], list):
            record["prompt"] = without_none(record["prompt"])
    return records


def write_records(path: str | Path, records: Sequence[Record]) -> None:
    """Write records to a .parquet, .jsonl or .jsonl.gz file, atomically; `datasets` reads all three.

    Raises:
        ValueError: another kind of file, no records, or an invalid record.
    """
    if not records:
        raise ValueError(f"{path}: there are no records to write.")
    rows = [
        _for_file(check_record(record, f"Record {number}")) for number, record in enumerate(_uniform_prompts(records))
    ]
    name = str(path)
    if name.endswith((".jsonl", ".jsonl.gz")):
        write_jsonl(path, rows)
    elif name.endswith(".parquet"):
        with atomic_path(path) as temporary:
            to_dataset(records).to_parquet(str(temporary))
    else:
        raise ValueError(f"{path}: candidates are written as .parquet, .jsonl or .jsonl.gz.")


def to_dataset(records: Sequence[Record]) -> Dataset:
    """Convert records to a `datasets.Dataset`, with one struct for the scores of all rankers."""
    rows = [_for_file(check_record(record, f"Record {n}")) for n, record in enumerate(_uniform_prompts(records))]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return Dataset.from_dict(
        {name: [row.get(name) for row in rows] for name in columns}, features=_features(rows, columns)
    )


def push_to_hub(args: HubArguments, dataset: Callable[[], Dataset]) -> None:
    """Push what a command wrote, where its settings ask for it."""
    if args.push_to_hub:
        assert args.hub_dataset_id is not None
        dataset().push_to_hub(args.hub_dataset_id, private=args.hub_private_repo)


def _for_file(record: Record) -> Record:
    """Drop empty `scores` and `tables`: parquet has no column for a struct without fields."""
    candidates = [
        {name: value for name, value in candidate.items() if name != "scores" or value}
        for candidate in record["candidates"]
    ]
    return {name: value for name, value in {**record, "candidates": candidates}.items() if name != "tables" or value}


def _uniform_prompts(records: Sequence[Record]) -> list[Record]:
    """Turn strings into one user turn where any prompt is a list of messages: a column has one type."""
    if not any(isinstance(record["prompt"], list) for record in records):
        return list(records)
    return [
        {**record, "prompt": [{"role": "user", "content": record["prompt"]}]}
        if isinstance(record["prompt"], str)
        else record
        for record in records
    ]


def _features(rows: Sequence[Record], columns: Sequence[str]) -> Features | None:
    """Return column types that do not depend on which rows happen to be empty; other columns are inferred."""
    known: dict[str, Any] = {"prompt_id": Value("string"), "prompt": prompt_feature(rows)}
    candidate: dict[str, Any] = {
        "source": Value("string"),
        "k": Value("int32"),
        "text": Value("string"),
        "finish_reason": Value("string"),
        "num_tokens": Value("int32"),
    }
    score_names = sorted({name for row in rows for c in row["candidates"] for name in c.get("scores", ())})
    if score_names:
        candidate["scores"] = {name: Value("float64") for name in score_names}
    known["candidates"] = List(candidate)
    table_names = sorted({name for row in rows for name in row.get("tables", ())})
    known["tables"] = {name: List(List(Value("float64"))) for name in table_names}
    known |= {name: Json() for name in ("tools", "chat_template_kwargs")}
    others = [name for name in columns if name not in known]
    inferred = Dataset.from_dict({name: [row.get(name) for row in rows] for name in others}).features if others else {}
    return Features({name: known[name] if name in known else inferred[name] for name in columns})


def prompt_feature(rows: Sequence[Record]) -> Any:
    """Return the column type of prompts: text, messages, or JSON where messages have further keys (tool calls)."""
    if not isinstance(rows[0]["prompt"], list):
        return Value("string")
    plain = all(set(message) == set(_MESSAGE) for row in rows for message in row["prompt"])
    return List(_MESSAGE) if plain else Json()


def off_policy_candidates(row: Mapping[str, Any], columns: Sequence[str]) -> list[Candidate]:
    """Read the responses that a dataset's row already has, as candidates of the source `dataset[column]`.

    Args:
        row: the row.
        columns: each holds a response or a list of responses. A response is a string, a conversation (its last,
            assistant's turn counts), or a mapping with its text under text, response, content or output, its writer
            under source or model, and numbers, which become scores.

    Raises:
        ValueError: a column is missing or holds something else, or a number is not finite.
    """
    found: list[Candidate] = []
    for column in columns:
        if column not in row:
            raise ValueError(f"The dataset has no column {column!r} of responses; it has {sorted(row)}.")
        value = row[column]
        if value is None:
            continue
        responses = value if isinstance(value, list) and not _is_conversation(value) else [value]
        found += [_response(response, column) for response in responses if response is not None]
    numbered: dict[str, int] = {}
    for candidate in found:
        candidate["k"] = numbered.get(candidate["source"], 0)
        numbered[candidate["source"]] = candidate["k"] + 1
    return found


def _is_conversation(value: list[Any]) -> bool:
    return bool(value) and all(isinstance(item, Mapping) and "role" in item for item in value)


def _response(value: Any, column: str) -> Candidate:
    source = f"dataset[{column}]"
    if isinstance(value, str):
        return make_candidate(value, source=source)
    if isinstance(value, list) and _is_conversation(value):
        last = value[-1]
        if last["role"] != "assistant" or not isinstance(last.get("content"), str):
            raise ValueError(f"Column {column!r}: the conversation ends with {last['role']!r}, not with an answer.")
        return make_candidate(last["content"], source=source)
    if isinstance(value, Mapping):
        text = next((value[key] for key in TEXT_KEYS if isinstance(value.get(key), str)), None)
        if text is not None:
            writer = next((str(value[key]) for key in SOURCE_KEYS if value.get(key)), source)
            numbers = {
                key: float(number)
                for key, number in value.items()
                if isinstance(number, (int, float)) and not isinstance(number, bool) and key not in ("k", "num_tokens")
            }
            scores = {**numbers, **without_none(value.get("scores") or {})}
            _check_finite(scores.values(), f"Column {column!r}: a score")
            return make_candidate(text, source=writer, scores=scores)
    raise ValueError(
        f"Column {column!r} holds no response: a string, a conversation, or a mapping with one of "
        f"{', '.join(TEXT_KEYS)} is expected, not {str(value)[:80]!r}."
    )


def join_candidates(record: Record, candidates: Sequence[Candidate]) -> Record:
    """Append candidates to a record that has no table of scores yet."""
    assert not record["tables"], "join before ranking"
    return {**record, "candidates": [*record["candidates"], *candidates]}


def score_names(record: Record) -> set[str]:
    """Return the names of the scores and tables of one record."""
    return {*record["tables"], *(name for candidate in record["candidates"] for name in candidate["scores"])}


def score_name(records: Iterable[Record], wanted: str | None) -> str | None:
    """Choose the name of the scores to use; None where the records have none.

    Raises:
        ValueError: there are several and none is chosen, or none of that name.
    """
    names = sorted({name for record in records for name in score_names(record)})
    if wanted is not None and wanted not in names:
        raise ValueError(f"The records have no scores named {wanted!r}; they have {names}.")
    if wanted is None and len(names) > 1:
        raise ValueError(f"The records have several kinds of scores, {names}; choose one with `score`.")
    return wanted or (names[0] if names else None)


def scores_of(record: Record, name: str) -> list[float]:
    """Return one score a candidate; a table of logits is aggregated.

    Raises:
        ValueError: a candidate without the score.
    """
    if name in record["tables"]:
        return [float(score) for score in aggregate_scores(record["tables"][name])]
    scores: list[Any] = [candidate["scores"].get(name) for candidate in record["candidates"]]
    if None in scores:
        raise ValueError(f"Record {record['prompt_id']!r}: candidate {scores.index(None)} has no score {name!r}.")
    return scores
