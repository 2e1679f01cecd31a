"""For each kind of row: how it becomes a group of texts, what may be wrong with its ids, and the columns that come out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from datasets import Features, List, Value
from transformers import PreTrainedTokenizerBase

from prefopt.data.comparisons import check_scores, normalise_comparison
from prefopt.data.encoding import EncodedGroup, Group
from prefopt.data.faults import (
    EMPTY_COMPLETION,
    IDENTICAL_AFTER_CUT,
    IDENTICAL_COMPLETIONS,
    MISSING_FIELD,
    NO_ROOM,
    PROMPT_TOO_LONG,
    BadRow,
)
from prefopt.data.messages import as_messages
from prefopt.data.rows import (
    COLUMN_ALIASES,
    METHOD_COLUMNS,
    REFERENCE_COLUMNS,
    Kind,
    Row,
    is_tokenised,
    method_values,
    normalise_pair,
    normalise_prompt,
    number,
    raise_recorded_fault,
    row_id,
)
from prefopt.data.truncation import Truncation

IDS = List(Value("int32"))
# the names under which lengths and cuts of a group's parts are reported
PARTS: dict[str, tuple[str, ...]] = {
    "pairs": ("prompt", "chosen", "rejected"),
    "comparisons": ("prompt", "responses"),
    "prompts": ("prompt",),
}


def read_row(
    row: Mapping[str, Any], kind: Kind, *, template_strings: bool = False
) -> tuple[Row, Group | EncodedGroup]:
    """The columns that a row keeps, and its prompt and completions as texts, or as ids where it is tokenised already."""
    raise_recorded_fault(row)
    if is_tokenised(row, kind):
        return _read_ids(row, kind)
    if kind == "pairs":
        clean = normalise_pair(row)
        completions = [clean.pop("chosen"), clean.pop("rejected")]
    elif kind == "comparisons":
        clean = normalise_comparison(row)
        completions = clean.pop("responses")
    else:
        clean, completions = normalise_prompt(row), []
    prompt = clean.pop("prompt")
    if template_strings:
        prompt = as_messages(prompt)
    group = Group(prompt, completions, clean.pop("tools", None), clean.pop("chat_template_kwargs", None))
    return clean, group


def _read_ids(row: Mapping[str, Any], kind: Kind) -> tuple[Row, EncodedGroup]:
    names = ("prompt_ids", "chosen_ids", "rejected_ids") if kind == "pairs" else ("prompt_ids", "response_ids")
    for name in names:
        if row[name] is None:
            raise BadRow(MISSING_FIELD, f"`{name}` is missing")
    prompt = list(row["prompt_ids"])
    if not prompt:
        raise BadRow(MISSING_FIELD, "`prompt_ids` is empty")
    if kind == "pairs":
        completions = [list(row["chosen_ids"]), list(row["rejected_ids"])]
        kept = {"row_id": row.get("row_id") or row_id(prompt, completions, {}), **method_values(row)}  # type: ignore[arg-type]
    else:
        completions = [list(ids) for ids in row["response_ids"]]
        scores = check_scores(row["scores"], len(completions))
        identity = row.get("row_id") or row_id(prompt, completions, {"scores": scores})  # type: ignore[arg-type]
        kept = {"row_id": identity, "scores": scores, "is_adversarial": bool(row.get("is_adversarial"))}
        if row.get("margin") is not None:
            kept["margin"] = number(row["margin"], "margin")
    return kept, EncodedGroup(prompt, completions)


def fit(encoded: EncodedGroup, truncation: Truncation, bos_token_id: int | None) -> tuple[EncodedGroup, list[int]]:
    """The group as it is trained on, and the places of the parts that were cut (0 is the prompt).

    Raises:
        BadRow: nothing is left to tell the completions apart.
    """
    if not encoded.completion_ids:
        limit = truncation.max_length
        if limit is not None and len(encoded.prompt_ids) > limit:
            raise BadRow(PROMPT_TOO_LONG, f"{len(encoded.prompt_ids)} tokens, max_length {limit}")
        return encoded, []
    if not all(encoded.completion_ids):
        raise BadRow(EMPTY_COMPLETION, "a completion has no token of its own")
    if _all_same(encoded.completion_ids):
        raise BadRow(IDENTICAL_COMPLETIONS, "all completions have the same tokens")
    prompt, completions = truncation.cut(encoded.prompt_ids, encoded.completion_ids, bos_token_id)
    if not all(completions):
        raise BadRow(NO_ROOM, f"{len(encoded.prompt_ids)} prompt tokens, max_length {truncation.max_length}")
    if _all_same(completions):
        raise BadRow(IDENTICAL_AFTER_CUT, f"the kept {len(completions[0])} tokens of all completions are the same")
    before, after = [encoded.prompt_ids, *encoded.completion_ids], [prompt, *completions]
    cut = [place for place, (whole, kept) in enumerate(zip(before, after)) if len(kept) < len(whole)]
    return EncodedGroup(prompt, completions, encoded.prompt_is_prefix), cut


def _all_same(completions: Sequence[Sequence[int]]) -> bool:
    return len(completions) > 1 and all(list(ids) == list(completions[0]) for ids in completions[1:])


def columns_of(
    groups: Sequence[EncodedGroup | None], kind: Kind, tokenizer: PreTrainedTokenizerBase
) -> dict[str, list[Any]]:
    """The id columns of a batch; a faulty row (None) gets empty ones."""
    columns: dict[str, list[Any]] = {"prompt_ids": [group.prompt_ids if group else [] for group in groups]}
    if kind == "pairs":
        for place, name in enumerate(("chosen", "rejected")):
            ids = [group.completion_ids[place] if group else [] for group in groups]
            columns[f"{name}_ids"] = ids
            columns[f"{name}_bytes"] = [len(text.encode("utf-8")) for text in scored_texts(ids, tokenizer)]
    elif kind == "comparisons":
        columns["response_ids"] = [group.completion_ids if group else [] for group in groups]
    return columns


def scored_texts(ids: list[list[int]], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of each list of ids, special tokens left out."""
    return list(tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def output_features(features: Mapping[str, Any], kind: Kind) -> Features:
    """The columns of a tokenised data set, given those of its rows."""
    out: dict[str, Any] = {"row_id": Value("string"), "prompt_ids": IDS}
    names = {COLUMN_ALIASES.get(name, name) for name in features}
    if kind == "pairs":
        out |= {
            "chosen_ids": IDS,
            "rejected_ids": IDS,
            "chosen_bytes": Value("int64"),
            "rejected_bytes": Value("int64"),
        }
        out |= {name: Value("float64") for name in METHOD_COLUMNS if name in names}
        out |= {name: features[name] for name in REFERENCE_COLUMNS if name in names}
    elif kind == "comparisons":
        out |= {"response_ids": List(IDS), "scores": List(Value("float64")), "is_adversarial": Value("bool")}
        out |= {"margin": Value("float64")} if "margin" in names else {}
    else:
        out = {**features, **out}
    return Features(out)


def placeholder(name: str) -> Any:
    """What a faulty row holds in a kept column until it is dropped."""
    return {"row_id": "", "scores": [], "is_adversarial": False}.get(name)


def parts_of(cut: Iterable[int], kind: Kind) -> str:
    """The reported names of cut parts, joined by commas."""
    names = PARTS[kind]
    return ",".join(dict.fromkeys(names[min(place, len(names) - 1)] for place in cut))
