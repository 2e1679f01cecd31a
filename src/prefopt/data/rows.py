"""The row schema: whatever shape a preference dataset has, its rows become `prompt`, `chosen`, `rejected`.

Strings stay strings and message lists stay message lists. Columns that a loss can use are kept under one name each.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias

from datasets import Dataset, Features, Json, List, Value

from prefopt.data.messages import (
    ASSISTANT,
    BadRow,
    Fault,
    TextOrMessages,
    as_messages,
    check_answers,
    clean_template_kwargs,
    clean_text,
    clean_tools,
    is_blank,
    plain_words,
    split_prompt,
)
from prefopt.files import content_hash

Kind: TypeAlias = Literal["pairs", "comparisons", "prompts", "any"]
Row: TypeAlias = dict[str, Any]
PromptAndResponses: TypeAlias = tuple[TextOrMessages, list[TextOrMessages]]

IDS = List(Value("int32"))
# ranges [begin, end) of a completion's ids that are read and not scored; only sets that have any have the columns
RANGES = List(List(Value("int32")))
SKIPPED_COLUMNS = ("chosen_skipped", "rejected_skipped")
# numbers that losses and caches read; the references' are a number, or one number for each reference
METHOD_COLUMNS = (
    "chosen_win_prob",
    "rejected_win_prob",
    "chosen_over_rejected_prob",
    "chosen_score",
    "rejected_score",
    "margin",
)
REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps", "ref_chosen_counts", "ref_rejected_counts")
# the SPPO repository's names
COLUMN_ALIASES = {
    "chosen_probs": "chosen_over_rejected_prob",
    "chosen_probs_win": "chosen_win_prob",
    "chosen_probs_lose": "rejected_win_prob",
}
# where a recipe's `columns` puts a system turn, and further columns that belong to the prompt
SYSTEM_COLUMN = "system_turn"
PROMPT_PARTS = ("prompt_part_2", "prompt_part_3", "prompt_part_4")
# columns that hold a question or what belongs to one: by their name, or by a word of it that is not about metadata
PROMPT_LIKE = frozenset({
    "user", "user_prompt", "user_message", "prompts", "prompt_text", "problem", "human", "passage", "document",
    "background", "article", "post", "history", "messages", "conversation", "conversations", "dialogue", "dialog",
})  # fmt: skip
PROMPT_WORDS = frozenset({
    "question", "questions", "instruction", "instructions", "input", "inputs", "query", "context", "system"
})  # fmt: skip
METADATA_WORDS = frozenset({
    "id", "ids", "source", "type", "lang", "language", "score", "length", "len", "tokens", "name", "model", "category",
    "hash", "idx", "index", "url", "version", "dataset", "difficulty", "quality", "topic", "tags", "label", "key",
})  # fmt: skip
# where the text of a message stands: ShareGPT's is a `value`, that of a part a `text`
MESSAGE_TEXTS = ("content", "value", "text")
SAMPLED_ROWS = 1000
CONTEXT_COLUMNS = ("tools", "chat_template_kwargs")
COMPLETION_COLUMNS = {"pairs": ("chosen", "rejected"), "comparisons": ("responses",), "prompts": ()}

TOKENISED_SHAPES = {
    "pairs": ("prompt_ids", "chosen_ids", "rejected_ids"),
    "comparisons": ("prompt_ids", "response_ids", "scores"),
}
_PAIR_SHAPES = (("prompt", "chosen", "rejected"), ("chosen", "rejected"), ("messages", "rejected_response"))
ACCEPTED_SHAPES: dict[str, tuple[tuple[str, ...], ...]] = {
    "pairs": (*_PAIR_SHAPES, TOKENISED_SHAPES["pairs"]),
    "comparisons": (
        ("prompt", "responses", "scores"),
        ("text", "scores"),
        TOKENISED_SHAPES["comparisons"],
        *_PAIR_SHAPES,
    ),
    "prompts": (("prompt",), ("messages",), *_PAIR_SHAPES[1:]),
}
# what a recipe's `columns` may map to
READ_COLUMNS = (
    *(
        "system",
        "prompt",
        "chosen",
        "rejected",
        "messages",
        "rejected_response",
        "responses",
        "scores",
        "text",
        "type",
    ),
    *(*CONTEXT_COLUMNS, "is_adversarial", *METHOD_COLUMNS, *REFERENCE_COLUMNS),
)
# one comparison of APO's form: strings of query and response around this mark, of `type` "apo" where adversarial
SEPARATOR = "<sep>"
ADVERSARIAL_TYPE = "apo"


def is_tokenised(columns: Iterable[str], kind: Kind = "pairs") -> bool:
    """Return True where rows of `kind` with these columns hold token ids already."""
    return kind in TOKENISED_SHAPES and set(columns).issuperset(TOKENISED_SHAPES[kind])


def check_columns(columns: Iterable[str], kind: Kind, *, where: str = "The dataset") -> None:
    """Check that a dataset with these columns can be read as rows of `kind`.

    Raises:
        ValueError: images, both names of one column, or no accepted set of columns; the message lists what was found.
    """
    present = set(columns)
    pictures = sorted(present & {"image", "images", "videos", "audios"})
    if pictures:
        raise ValueError(
            f"{where} has the column {pictures[0]!r}: only text is supported. If the column is not needed, leave it "
            "out with `columns`."
        )
    for alias, name in COLUMN_ALIASES.items():
        if {alias, name} <= present:
            raise ValueError(
                f"{where} has both {alias!r} and {name!r}, two names of one column; keep one with `columns`."
            )
    if kind == "any" or any(present.issuperset(shape) for shape in ACCEPTED_SHAPES[kind]):
        return
    accepted = "; ".join(" + ".join(shape) for shape in ACCEPTED_SHAPES[kind])
    raise ValueError(f"{where} has the columns {sorted(present)}. Rows of {kind} need one of: {accepted}.")


def check_unused_text(dataset: Dataset, kind: Kind, *, where: str = "The dataset") -> None:
    """Check that no text that belongs to the prompts stands in a column that nothing reads.

    Raises:
        ValueError: a column with the name of a question, an instruction, a system turn, ... holds text that is in none
            of the columns that are read.
    """
    names = set(dataset.column_names)
    read = {*READ_COLUMNS, SYSTEM_COLUMN, *PROMPT_PARTS} - {"system"}
    if "chosen" in names or "responses" in names:
        read -= {"messages"}
    suspects = [name for name in dataset.column_names if name not in read and _is_prompt_like(name)]
    if not suspects or is_tokenised(names, kind) or kind not in ("pairs", "comparisons"):
        return
    known = [name for name in dataset.column_names if name in read]
    # from all parts of the set: the rows of one source may be the only ones with a system turn
    places = range(0, len(dataset), max(len(dataset) // SAMPLED_ROWS, 1))
    for row in dataset.select_columns([*suspects, *known]).select(places):
        shown = " ".join(text for name in known for text in _plain_texts(row[name]))
        for name in suspects:
            if text := next((text for text in _plain_texts(row[name]) if text not in shown), None):
                role = "system" if "system" in name.lower() else "prompt"
                raise ValueError(
                    f"{where} has text in the column {name!r} that nothing reads ({text[:60]!r}). Map it, as in "
                    f"`columns: {{{role}: {name}}}` (several columns of one prompt: `prompt: [instruction, input]`), "
                    f"or leave it out: `columns: {{{name}: null}}`. In Python, rename or remove the column."
                )


def _is_prompt_like(name: str) -> bool:
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()  # systemPrompt
    words = set(re.split(r"[^a-z]+", name))
    return name in PROMPT_LIKE or bool(words & PROMPT_WORDS and not words & METADATA_WORDS)


def _plain_texts(value: Any) -> Iterator[str]:
    """Yield the texts of a text or of (lists of) messages in any of their forms, for comparisons."""
    if isinstance(value, list):
        for item in value:
            yield from _plain_texts(item)
    elif isinstance(value, dict):
        yield from _plain_texts(next((value[key] for key in MESSAGE_TEXTS if value.get(key)), None))
    elif isinstance(value, str) and (text := plain_words(value)):
        yield text


def kept_features(features: Mapping[str, Any], kind: Kind, contents: Mapping[str, Any]) -> Features:
    """Return the columns of rows in the schema: `row_id`, their `contents` (texts or ids), and the numbers they keep.

    Args:
        features: of the rows as they are given; rows of kind "prompts" keep all of them.
        kind: of the rows.
        contents: features of the columns that hold texts or token ids.
    """
    names = {COLUMN_ALIASES.get(name, name) for name in features}
    kept = {**(features if kind == "prompts" else {}), "row_id": Value("string"), **contents}
    if kind == "pairs":
        kept |= {name: Value("float64") for name in METHOD_COLUMNS if name in names}
        kept |= {name: features[name] for name in REFERENCE_COLUMNS if name in names}
        kept |= dict.fromkeys(SKIPPED_COLUMNS, RANGES) if names.issuperset(SKIPPED_COLUMNS) else {}
    elif kind == "comparisons":
        kept |= {"scores": List(Value("float64")), "is_adversarial": Value("bool")}
        kept |= {"margin": Value("float64")} if "margin" in names else {}
    return Features(kept)


def text_features(features: Mapping[str, Any], kind: Kind, *, is_messages: bool) -> Features:
    """Return the columns of normalised rows: texts, or messages as JSON, which may have different keys."""
    text = Json() if is_messages else Value("string")
    contents = {"prompt": text, **dict.fromkeys(COMPLETION_COLUMNS[kind], text)}
    if kind == "comparisons":
        contents["responses"] = List(text)
    context = {name: Json() for name in CONTEXT_COLUMNS if name in features}
    faults = {"fault": Value("string"), "fault_detail": Value("string")}
    return Features({**kept_features(features, kind, contents), **context, **faults})


def id_features(features: Mapping[str, Any], kind: Kind) -> Features:
    """Return the columns of tokenised rows."""
    contents: dict[str, Any] = {"prompt_ids": IDS, **dict.fromkeys(map(id_column, COMPLETION_COLUMNS[kind]), IDS)}
    if kind == "pairs":
        contents |= {"chosen_bytes": Value("int64"), "rejected_bytes": Value("int64")}
    elif kind == "comparisons":
        contents["response_ids"] = List(IDS)
    return kept_features(features, kind, contents)


def id_column(part: str) -> str:
    """Return the column that holds the token ids of "prompt", "chosen", "rejected" or "responses"."""
    return f"{part.removesuffix('s')}_ids"


def normalise(row: Row, kind: Kind, columns: Sequence[str], *, is_messages: bool | None = None) -> Row:
    """Return a row in the schema of `kind`; one that cannot be used has the reason in `fault` and `fault_detail`.

    Args:
        row: in any accepted shape; a tokenised row is checked.
        kind: "pairs", "comparisons" or "prompts".
        columns: of the schema, see `text_features`.
        is_messages: what the rows before were, messages or strings, which this one must be, too.
    """
    tokenised = is_tokenised(row, kind)
    kept = row if tokenised or kind == "prompts" else {}
    try:
        clean = normalise_ids(row, kind) if tokenised else _READERS[kind](row)
        if is_messages is not None and isinstance(clean["prompt"], list) != is_messages:
            other = "a string" if is_messages else "a list of messages"
            raise BadRow(Fault.WRONG_TYPE, f"`prompt` is {other}, unlike the rows before")
    except BadRow as fault:
        name = content_hash(repr(sorted(row.items(), key=str)))[:16]
        clean = {"prompt": None, "row_id": name, "fault": fault.reason, "fault_detail": fault.detail}
    clean = {**dict.fromkeys(CONTEXT_COLUMNS), **clean}
    return {name: clean[name] if name in clean else kept.get(name) for name in columns}


def normalise_pair(row: Mapping[str, Any]) -> Row:
    """Return one preference row in the schema: `row_id`, `prompt`, `chosen`, `rejected`, context and method columns.

    Args:
        row: explicit (`prompt`, `chosen`, `rejected`) or implicit prompt (`chosen`, `rejected`), strings or message
            lists; or `messages` and `rejected_response`.

    Raises:
        BadRow: a field is missing, of the wrong type or empty, or both completions are the same.
    """
    raise_recorded_fault(row)
    prompt, (chosen, rejected) = _pair_texts(row)
    if is_blank(chosen) or is_blank(rejected):
        raise BadRow(Fault.EMPTY_COMPLETION, f"`{'chosen' if is_blank(chosen) else 'rejected'}` is empty")
    if chosen == rejected:
        raise BadRow(Fault.IDENTICAL_COMPLETIONS, "`chosen` and `rejected` are the same")
    if isinstance(prompt, list) and not prompt:
        raise BadRow(Fault.EMPTY_PROMPT, "`chosen` and `rejected` share no turn, and there is no `prompt`")
    if is_blank(prompt) and "prompt" in row:  # whole texts without a common beginning are kept, as TRL keeps them
        raise BadRow(Fault.EMPTY_PROMPT, "`prompt` is blank")
    check_answers(prompt, [chosen, rejected])
    context = context_of(row)
    texts = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    # scores of whole completions, which earlier versions kept under the row's name, are no scores of its answers alone
    several = isinstance(prompt, list) and any(len(each) > 1 for each in (chosen, rejected))
    marked = {**context, "scored": "answers"} if several else context
    return {"row_id": row_id(prompt, [chosen, rejected], marked), **texts, **context, **method_values(row)}


def normalise_prompt(row: Mapping[str, Any]) -> Row:
    """Return the prompt of a row of any shape: `row_id`, `prompt` and its context. `messages` lose a final answer.

    Raises:
        BadRow: the prompt is missing, of the wrong type or empty.
    """
    raise_recorded_fault(row)
    context = context_of(row)
    if row.get("chosen") is not None and row.get("rejected") is not None:
        prompt = _pair_texts(row)[0]
    elif "prompt" in row or "messages" not in row:
        prompt, _ = _with_system(row, _prompt(row), [])
    else:
        messages = _text(row, "messages")
        answered = isinstance(messages, list) and messages and messages[-1]["role"] == "assistant"
        prompt, _ = _with_system(row, messages[:-1] if answered else messages, [])
    if is_blank(prompt):
        raise BadRow(Fault.EMPTY_PROMPT, "`prompt` is empty")
    return {"row_id": row_id(prompt, [], context), "prompt": prompt, **context}


def normalise_comparison(row: Mapping[str, Any]) -> Row:
    """Return one comparison row: `row_id`, `prompt`, `responses`, `scores`, `is_adversarial`, `margin` if it has one.

    Args:
        row: `prompt`, `responses`, `scores`; or `text` ("query<sep>response" strings) and `scores`, with
            `type: "apo"` for adversarial rows; or a preference pair, whose scores become 1 and 0.

    Raises:
        BadRow: fewer than two responses, unequal lengths, a missing separator, an empty response, scores that are
            not finite or are all the same.
    """
    raise_recorded_fault(row)
    scores = row.get("scores")
    if "responses" not in row and "text" not in row:
        pair = normalise_pair(row)
        prompt, responses, scores = pair["prompt"], [pair["chosen"], pair["rejected"]], [1.0, 0.0]
    elif row.get("responses") is not None:
        prompt, responses = _from_responses(row)
    else:
        prompt, responses = _from_separated(row)
    scores = check_scores(scores, len(responses))
    for place, response in enumerate(responses):
        if is_blank(response):
            raise BadRow(Fault.EMPTY_RESPONSE, f"response {place} of {len(responses)} is empty")
    if is_blank(prompt):
        raise BadRow(Fault.EMPTY_PROMPT, "`prompt` is blank")
    check_answers(prompt, responses)
    context = context_of(row)
    identity = row_id(prompt, responses, {**context, "scores": scores})
    values = {"scores": scores, **comparison_values(row)}
    return {"row_id": identity, "prompt": prompt, "responses": responses, **values, **context}


def normalise_ids(row: Mapping[str, Any], kind: Kind) -> Row:
    """Check a pair or comparison that is tokenised already; return its numbers, and its `row_id` or a new one.

    Raises:
        BadRow: ids are missing, or the scores cannot be used.
    """
    raise_recorded_fault(row)
    names = [id_column(part) for part in ("prompt", *COMPLETION_COLUMNS[kind])]
    for name in names:
        if row[name] is None:
            raise BadRow(Fault.MISSING_FIELD, f"`{name}` is missing")
    prompt, *completions = (row[name] for name in names)
    if not prompt:
        raise BadRow(Fault.MISSING_FIELD, "`prompt_ids` is empty")
    if kind == "comparisons":
        (completions,) = completions
        scores = {"scores": check_scores(row["scores"], len(completions))}
        values = {**scores, **comparison_values(row)}
    else:
        scores, values = {}, method_values(row) | {name: row[name] for name in SKIPPED_COLUMNS if row.get(name)}
    return {"row_id": row.get("row_id") or row_id(prompt, completions, scores), **values}


def skipped_ranges(row: Mapping[str, Any], kind: Kind) -> tuple[tuple[tuple[int, int], ...], ...]:
    """Return of each completion of a tokenised pair the ranges that are not scored; () where there are none."""
    if kind != "pairs" or not any(row.get(name) for name in SKIPPED_COLUMNS):
        return ()
    return tuple(tuple((begin, end) for begin, end in row.get(name) or ()) for name in SKIPPED_COLUMNS)


_READERS = {"pairs": normalise_pair, "comparisons": normalise_comparison, "prompts": normalise_prompt}


def raise_recorded_fault(row: Mapping[str, Any]) -> None:
    """Raise the fault that an earlier normalisation recorded in the row, if there is one."""
    if row.get("fault"):
        raise BadRow(str(row["fault"]), str(row.get("fault_detail") or ""))


def context_of(row: Mapping[str, Any]) -> Row:
    """Return the cleaned `tools` and `chat_template_kwargs` of a row, each only where it has one."""
    readers = zip(CONTEXT_COLUMNS, (clean_tools, clean_template_kwargs))
    found = {name: read(row[name]) for name, read in readers if row.get(name) is not None}
    return {name: value for name, value in found.items() if value is not None}


def row_id(prompt: TextOrMessages, responses: list[TextOrMessages], context: Mapping[str, Any]) -> str:
    """Return a stable name of a row: 16 hex digits of a hash of its content, whatever its place or other columns.

    Raises:
        BadRow: a text holds half a character, as a JSON escape can write it, which no tokenizer takes.
    """
    try:
        return content_hash(prompt, responses, *([dict(context)] if context else []))[:16]
    except UnicodeEncodeError as error:
        raise BadRow(Fault.WRONG_TYPE, f"a text holds half a character, {error.object[error.start]!a}") from error


def method_values(row: Mapping[str, Any]) -> Row:
    """Return a row's method columns under their own names, as floats (or lists of floats, one for each reference)."""
    columns = (*METHOD_COLUMNS, *REFERENCE_COLUMNS, *COLUMN_ALIASES)
    return {COLUMN_ALIASES.get(name, name): number(row[name], name) for name in columns if name in row}


def number(value: Any, column: str) -> float | list[float | None] | None:
    """Return a value as a float, or (of a reference column) as a list of them; None stays None.

    Raises:
        BadRow: it is no number, or not a finite one.
    """
    is_flat = isinstance(value, list) and not any(isinstance(item, list) for item in value)
    if is_flat and column in REFERENCE_COLUMNS:
        return [number(item, column) for item in value]  # type: ignore[misc]
    if value is None:
        return None
    try:
        converted = float(value)
    except (TypeError, ValueError) as error:
        raise BadRow(Fault.WRONG_TYPE, f"`{column}` is not a number: {value!r}") from error
    if not math.isfinite(converted):
        raise BadRow(Fault.BAD_NUMBER, f"`{column}` is {converted}")
    return converted


def check_scores(value: Any, num_responses: int) -> list[float]:
    """Return the scores of `num_responses` responses as floats.

    Raises:
        BadRow: they are no numbers, not as many as the responses, not finite, or all the same.
    """
    if value is None:
        raise BadRow(Fault.MISSING_FIELD, "`scores` is missing")
    if not isinstance(value, list) or not all(isinstance(score, (int, float)) or score is None for score in value):
        raise BadRow(Fault.WRONG_TYPE, f"`scores` is not a list of numbers: {value!r}")
    if len(value) != num_responses:
        raise BadRow(Fault.LENGTH_MISMATCH, f"{num_responses} responses, {len(value)} scores")
    if num_responses < 2:
        raise BadRow(Fault.SINGLE_RESPONSE, f"{num_responses} response(s)")
    if not all(score is not None and math.isfinite(score) for score in value):
        raise BadRow(Fault.BAD_SCORE, f"scores {value!r}")
    if len(set(value)) == 1:
        raise BadRow(Fault.ALL_TIED, f"every score is {value[0]}")
    return [float(score) for score in value]


def comparison_values(row: Mapping[str, Any]) -> Row:
    """Return what a comparison row says beside its scores: `is_adversarial`, and `margin` where it has one."""
    marked = row.get("is_adversarial")
    if marked not in (None, True, False):  # "false" as text would be true
        raise BadRow(Fault.WRONG_TYPE, f"`is_adversarial` is neither true nor false: {marked!r}")
    values: Row = {"is_adversarial": bool(marked) or row.get("type") == ADVERSARIAL_TYPE}
    return values if row.get("margin") is None else {**values, "margin": number(row["margin"], "margin")}


def _pair_texts(row: Mapping[str, Any]) -> PromptAndResponses:
    if "chosen" not in row and "messages" in row:
        return _from_conversation(row)
    chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
    return _with_system(row, *split_prompt(_prompt(row) if "prompt" in row else None, [chosen, rejected]))


def _prompt(row: Mapping[str, Any]) -> TextOrMessages:
    """Return the prompt of a row, with the further columns that a recipe has mapped to it."""
    prompt = _text(row, "prompt")
    parts = [row[name] for name in PROMPT_PARTS if row.get(name)]
    if not parts:
        return prompt
    if not all(isinstance(part, str) for part in (prompt, *parts)):
        raise BadRow(Fault.WRONG_TYPE, "`prompt` is made of several columns, and one of them is no string")
    return "\n\n".join(part for part in (prompt, *parts) if part.strip())


def _with_system(
    row: Mapping[str, Any], prompt: TextOrMessages, responses: list[TextOrMessages]
) -> PromptAndResponses:
    """Put the mapped system turn before the prompt; the row is a conversation then, with or without one."""
    if SYSTEM_COLUMN not in row:
        return prompt, responses
    system, turns = row[SYSTEM_COLUMN] or "", as_messages(prompt)
    if not isinstance(system, str):
        raise BadRow(Fault.WRONG_TYPE, "the column of the system turn is no string")
    if system.strip() and turns[:1] and turns[0]["role"] != "system":
        turns = [{"role": "system", "content": system}, *turns]
    return turns, [[{"role": ASSISTANT, "content": r}] if isinstance(r, str) else r for r in responses]


def _text(row: Mapping[str, Any], field: str) -> TextOrMessages:
    return clean_text(row.get(field), field, clean_tools(row.get("tools")))


def _from_conversation(row: Mapping[str, Any]) -> PromptAndResponses:
    """Read `messages`, which end with the chosen answer, beside `rejected_response` (ms-swift's form)."""
    messages, rejected = _text(row, "messages"), _text(row, "rejected_response")
    if isinstance(messages, str) or not messages or messages[-1]["role"] != "assistant":
        raise BadRow(Fault.MISSING_FIELD, "`messages` does not end with an assistant turn, the chosen answer")
    answer: TextOrMessages = [{"role": "assistant", "content": rejected}] if isinstance(rejected, str) else rejected
    return _with_system(row, messages[:-1], [messages[-1:], answer])


def _from_responses(row: Mapping[str, Any]) -> PromptAndResponses:
    if not isinstance(row["responses"], list):
        raise BadRow(Fault.WRONG_TYPE, f"`responses` is not a list: {row['responses']!r}")
    tools = clean_tools(row.get("tools"))
    responses = [clean_text(response, "responses", tools) for response in row["responses"]]
    prompt = _prompt(row)
    return _with_system(row, *(split_prompt(prompt, responses) if responses else (prompt, [])))


def _from_separated(row: Mapping[str, Any]) -> PromptAndResponses:
    texts = row.get("text")
    if texts is None:
        raise BadRow(Fault.MISSING_FIELD, "`text` is missing")
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise BadRow(Fault.WRONG_TYPE, f'`text` is not a list of "query{SEPARATOR}response" strings')
    for text in texts:
        if text.count(SEPARATOR) != 1:
            raise BadRow(Fault.BAD_SEPARATOR, f"{SEPARATOR!r} stands {text.count(SEPARATOR)} times in {text[:60]!r}")
    halves = [text.split(SEPARATOR) for text in texts]
    prompts = {query for query, _ in halves}
    if len(prompts) > 1:
        raise BadRow(Fault.DIFFERENT_PROMPTS, f"{len(prompts)} different queries in one row")
    responses: list[TextOrMessages] = [response for _, response in halves]
    return (prompts.pop() if prompts else ""), responses
