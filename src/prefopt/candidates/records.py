"""The record of on-policy data: a prompt and its candidates, sampled or from a dataset, scored or not yet."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias, overload

from datasets import Dataset, Features, Json, List, Value

from prefopt.arguments import HubArguments
from prefopt.candidates import tables
from prefopt.candidates.pairs import aggregate_scores
from prefopt.candidates.tables import Again, infer_features, open_rows, write_parquet
from prefopt.data.messages import TextOrMessages, as_messages, clean_text
from prefopt.data.rows import CONTEXT_COLUMNS, Row
from prefopt.data.sources import DataSource, load_source
from prefopt.files import write_jsonl

Candidate: TypeAlias = dict[str, Any]
Record: TypeAlias = dict[str, Any]

RECORD_FILES = ("candidates.parquet", "candidates.jsonl")
# why a candidate ended; None where nobody knows, as for the responses of a dataset
FINISH_REASONS = ("stop", "length", None)
TEXT_KEYS = ("text", "response", "content", "output")
SOURCE_KEYS = ("source", "model")
MESSAGE = {"role": Value("string"), "content": Value("string")}
CANDIDATE = {
    "source": Value("string"),
    "k": Value("int32"),
    "text": Value("string"),
    "finish_reason": Value("string"),
    "num_tokens": Value("int32"),
}


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
    if not isinstance(record.get("tables") or {}, Mapping):
        raise ValueError(f"{where}: `tables` is not a mapping from names to tables of logits.")
    clean["tables"] = {name: table for name, table in (record.get("tables") or {}).items() if table is not None}
    for name, table in clean["tables"].items():
        is_square = isinstance(table, list) and all(isinstance(line, list) and len(line) == size for line in table)
        if not is_square or len(table) != size:
            raise ValueError(f"{where}: the table {name!r} does not have {size} rows of {size} logits.")
        check_finite([value for line in table for value in line], f"{where}: the table {name!r}")
    return clean


def _check_candidate(candidate: Any, where: str) -> Candidate:
    if not isinstance(candidate, Mapping) or not isinstance(candidate.get("text"), str):
        raise ValueError(f"{where} has no `text`.")
    if candidate.get("finish_reason") not in FINISH_REASONS:
        raise ValueError(f"{where}: finish_reason is {candidate.get('finish_reason')!r}, not one of {FINISH_REASONS}.")
    for name in ("k", "num_tokens"):
        value = candidate.get(name)
        if value is not None and (not isinstance(value, int) or not 0 <= value < 2**31):
            raise ValueError(f"{where}: {name} is {str(value)[:80]!r}, not a whole number.")
    scores = _scores(candidate.get("scores"), where)
    return make_candidate(
        candidate["text"],
        source=str(candidate.get("source") or "unknown"),
        k=candidate.get("k") or 0,
        finish_reason=candidate.get("finish_reason"),
        num_tokens=candidate.get("num_tokens"),
        scores=scores,
    )


def check_finite(values: Any, what: str) -> list[float]:
    """Return scores as floats.

    Raises:
        ValueError: they are no list, or one of them is no finite number.
    """
    if not isinstance(values, (list, tuple)):
        raise ValueError(f"{what} is {str(values)[:80]!r}, where a list of numbers is expected.")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
            raise ValueError(f"{what} is {repr(value)[:80]}, not a finite number.")
    return [float(value) for value in values]


def _scores(scores: Any, where: str) -> dict[str, float]:
    """Check a mapping from rankers to scores, and drop the None entries that Arrow adds."""
    if not isinstance(scores or {}, Mapping):
        raise ValueError(
            f"{where}: `scores` is {str(scores)[:80]!r}, where a mapping from names to numbers is expected."
        )
    found = {name: score for name, score in (scores or {}).items() if score is not None}
    check_finite(list(found.values()), f"{where}: a score")
    return found


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


class Records(Sequence[Record]):
    """Records of a file or dataset, checked once, and read anew whenever they are asked for.

    Attributes:
        score_names: the names of scores and tables, each with the prompt_id of the first record that has it.

    Raises:
        ValueError: nothing there, or a row that is not a record; two records of one prompt_id.
    """

    def __init__(self, path: str | Path, *, split: str = "train") -> None:
        self.path = path
        self.rows = open_rows(DataSource(file_of(path), split=split))
        self.score_names: dict[str, str] = {}
        seen: set[int] = set()  # hashes, as a million ids would take a hundred megabytes more
        for number, record in enumerate(self):
            identity = record["prompt_id"]
            if hash(identity) in seen and any(other["prompt_id"] == identity for other in islice(self, number)):
                raise ValueError(f"{path}, row {number}: a second record of the prompt_id {identity!r}.")
            seen.add(hash(identity))
            for name in score_names(record):
                self.score_names.setdefault(name, identity)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Record]:
        return (self._checked(row, number) for number, row in enumerate(self.rows))

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            start = index.indices(len(self))[0]
            return [self._checked(row, start + number) for number, row in enumerate(self.rows[index])]
        return self._checked(self.rows[index], index)

    def _checked(self, row: Row, number: int) -> Record:
        return check_record(row, f"{self.path}, row {number}")


def read_records(path: str | Path, *, split: str = "train") -> list[Record]:
    """Read and check records from a parquet or jsonl file, a folder that a command wrote, or a hub dataset.

    Raises:
        ValueError: nothing there, or a row that is not a record; two records of one prompt_id.
    """
    return list(Records(path, split=split))


@dataclass
class PromptKind:
    """What a column of prompts holds: a column has one type, so that one list of messages makes all prompts lists."""

    messages: bool = False
    further_keys: bool = False

    def add(self, prompt: TextOrMessages) -> None:
        """Take a prompt into account."""
        if isinstance(prompt, list):
            self.messages = True
            self.further_keys |= any(set(message) != set(MESSAGE) for message in prompt)

    def form(self, prompt: TextOrMessages) -> TextOrMessages:
        """Return a prompt in the form that all have; a string becomes one user turn."""
        return as_messages(prompt) if self.messages else prompt

    @property
    def feature(self) -> Any:
        """The column's type: text, messages, or JSON where messages have further keys (tool calls)."""
        if not self.messages:
            return Value("string")
        return Json() if self.further_keys else List(MESSAGE)


def write_records(path: str | Path, records: Iterable[Record]) -> None:
    """Write records to a .parquet, .jsonl or .jsonl.gz file, atomically; `datasets` reads all three.

    Args:
        path: the file.
        records: are iterated over more than once.

    Raises:
        ValueError: another kind of file, no records, or an invalid record.
    """
    name = str(path)
    if not name.endswith((".jsonl", ".jsonl.gz", ".parquet")):
        raise ValueError(f"{path}: candidates are written as .parquet, .jsonl or .jsonl.gz.")
    rows, features = _file_rows(records, where=str(path))
    if name.endswith(".parquet"):
        write_parquet(path, rows, features())
    else:
        write_jsonl(path, rows)


def to_dataset(records: Iterable[Record]) -> Dataset:
    """Convert records to a `datasets.Dataset`, with one struct for the scores of all rankers."""
    rows, features = _file_rows(records, where="dataset")
    return tables.to_dataset(rows, features())


def push_to_hub(args: HubArguments, written: Path, dataset: Callable[[], Dataset]) -> None:
    """Push what a command wrote, where its settings ask for it.

    Args:
        args: the settings.
        written: the file, which is pushed as it is if it is parquet.
        dataset: makes the dataset from the rows otherwise, since the types of jsonl would be guessed again.
    """
    if args.push_to_hub:
        assert args.hub_dataset_id is not None
        rows = load_source(DataSource(str(written))) if written.suffix == ".parquet" else dataset()
        rows.push_to_hub(args.hub_dataset_id, private=args.hub_private_repo)


def _file_rows(records: Iterable[Record], *, where: str) -> tuple[Iterable[Row], Callable[[], Features]]:
    """Return records as the rows of a file, to be iterated over again, and a function that makes their column types.

    The types do not depend on which rows happen to be empty; those of further columns are inferred.
    """
    prompts = PromptKind()
    columns: dict[str, None] = {}
    scores: set[str] = set()
    score_tables: set[str] = set()
    for number, record in enumerate(records):
        clean = _for_file(check_record(record, f"Record {number}"))
        prompts.add(clean["prompt"])
        columns |= dict.fromkeys(clean)
        score_tables |= clean.get("tables", {}).keys()
        for candidate in clean["candidates"]:
            scores |= candidate.get("scores", {}).keys()
    if not columns:
        raise ValueError(f"{where}: there are no records to write.")

    def rows() -> Iterator[Row]:
        for number, record in enumerate(records):
            row = _for_file(check_record(record, f"Record {number}"))
            yield {**row, "prompt": prompts.form(row["prompt"])}

    def features() -> Features:
        candidate: dict[str, Any] = {**CANDIDATE}
        if scores:
            candidate["scores"] = {name: Value("float64") for name in sorted(scores)}
        known: dict[str, Any] = {
            "prompt_id": Value("string"),
            "prompt": prompts.feature,
            "candidates": List(candidate),
            "tables": {name: List(List(Value("float64"))) for name in sorted(score_tables)},
            "tools": Json(),
            "chat_template_kwargs": Json(),
        }
        others = [name for name in columns if name not in known]
        inferred = infer_features(rows(), others) if others else {}
        return Features({name: known.get(name) or inferred[name] for name in columns})

    return Again(rows), features


def _for_file(record: Record) -> Record:
    """Drop empty `scores` and `tables`: parquet has no column for a struct without fields."""
    candidates = [
        {name: value for name, value in candidate.items() if name != "scores" or value}
        for candidate in record["candidates"]
    ]
    return {name: value for name, value in {**record, "candidates": candidates}.items() if name != "tables" or value}


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


def answer_text(value: Any, where: str) -> str | None:
    """Return the text of a response: a string, or the last turn of a conversation; None for anything else.

    Raises:
        ValueError: the conversation does not end with an answer, or that is no text.
    """
    if isinstance(value, list) and _is_conversation(value):
        last = value[-1]
        if last["role"] != "assistant" or not isinstance(last.get("content"), str):
            raise ValueError(f"{where}: the conversation ends with {last['role']!r}, not with an answer of text.")
        return str(last["content"])
    return value if isinstance(value, str) else None


def _response(value: Any, column: str) -> Candidate:
    source, where = f"dataset[{column}]", f"Column {column!r}"
    if (text := answer_text(value, where)) is not None:
        return make_candidate(text, source=source)
    if isinstance(value, Mapping):
        text = next((value[key] for key in TEXT_KEYS if isinstance(value.get(key), str)), None)
        if text is not None:
            writer = next((str(value[key]) for key in SOURCE_KEYS if value.get(key)), source)
            numbers = {
                key: number
                for key, number in value.items()
                if isinstance(number, (int, float)) and not isinstance(number, bool) and key not in ("k", "num_tokens")
            }
            scores = {name: float(number) for name, number in _scores(numbers, where).items()}
            return make_candidate(text, source=writer, scores={**scores, **_scores(value.get("scores"), where)})
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
