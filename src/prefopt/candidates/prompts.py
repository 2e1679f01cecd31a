"""Load and tokenise prompts for generation; every skipped prompt is recorded with its reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from prefopt.candidates.records import Candidate, off_policy_candidates
from prefopt.data.encoding import TextGroup, check_chat_template, encode_groups
from prefopt.data.messages import BadRow, Fault, as_messages
from prefopt.data.rows import CONTEXT_COLUMNS, Row, normalise_prompt
from prefopt.data.sources import DataSource, load_source


@dataclass
class PromptSet:
    """The prompts of a run.

    Attributes:
        items: `prompt_id`, `prompt`, `prompt_ids` and the row's `tools` and `chat_template_kwargs`, where it has them.
        off_policy: prompt_id -> the responses that the dataset already had.
        skipped: for every row without samples its number, `prompt_id` (where it has one), reason and detail.
        duplicates: rows whose prompt had come before; their responses join the first.
    """

    items: list[Row] = field(default_factory=list)
    off_policy: dict[str, list[Candidate]] = field(default_factory=dict)
    skipped: list[Row] = field(default_factory=list)
    duplicates: int = 0

    def skip(self, number: int, prompt_id: str | None, reason: str, detail: str) -> None:
        """Record that a row gets no samples."""
        self.skipped.append({"row": number, "prompt_id": prompt_id, "reason": reason, "detail": detail})

    def reasons(self) -> Counter[str]:
        """Count the skipped rows by reason."""
        return Counter(row["reason"] for row in self.skipped)


def load_prompts(source: DataSource, *, column: str, off_policy_columns: Sequence[str]) -> PromptSet:
    """Read the prompts of a dataset and the responses that it already has.

    Args:
        source: where the rows are.
        column: holds the prompt, a string or a list of messages. A dataset without a `prompt` column gives the prompts
            of its conversations (`messages`) or pairs (`chosen`, `rejected`).
        off_policy_columns: columns of responses, see `off_policy_candidates`.

    Raises:
        ValueError: no such dataset or column; two different prompts with one `prompt_id`; a response that cannot be
            read.
    """
    prompts = PromptSet()
    rows = load_source(source)
    if column not in rows.column_names and column != "prompt":
        raise ValueError(f"Dataset {source} has no column {column!r}; it has {sorted(rows.column_names)}.")
    seen: dict[str, tuple[int, Any]] = {}
    for number, row in enumerate(rows):
        named = None if row.get("prompt_id") is None else str(row["prompt_id"])
        try:
            clean = _read_prompt(row, column)
        except BadRow as fault:
            prompts.skip(number, named, fault.reason, fault.detail)
            continue
        prompt_id = named or str(clean["row_id"])
        prompt = clean["prompt"]
        first, before = seen.setdefault(prompt_id, (number, prompt))
        if before != prompt:
            raise ValueError(
                f"Dataset {source}: rows {first} and {number} have the prompt_id {prompt_id!r}, but other prompts."
            )
        context = {name: clean[name] for name in CONTEXT_COLUMNS if name in clean}
        if first == number:
            prompts.items.append({"prompt_id": prompt_id, "prompt": prompt, "row": number, **context})
        else:
            prompts.duplicates += 1
        given = prompts.off_policy.setdefault(prompt_id, [])
        try:
            given += _renumbered(given, off_policy_candidates(row, off_policy_columns))
        except ValueError as error:
            raise ValueError(f"Dataset {source}, row {number}: {error}") from error
    return prompts


def _read_prompt(row: Row, column: str) -> Row:
    if column not in row:
        return normalise_prompt(row)
    return normalise_prompt({"prompt": row[column], **{name: row[name] for name in CONTEXT_COLUMNS if name in row}})


def _renumbered(given: list[Candidate], more: list[Candidate]) -> list[Candidate]:
    """Return those of `more` that are new, numbered on within each source."""
    texts = {(candidate["source"], candidate["text"]) for candidate in given}
    counts = Counter(candidate["source"] for candidate in given)
    new = []
    for candidate in more:
        if (candidate["source"], candidate["text"]) not in texts:
            new.append({**candidate, "k": counts[candidate["source"]]})
            counts[candidate["source"]] += 1
    return new


def tokenize(
    prompts: PromptSet, tokenizer: PreTrainedTokenizerBase, *, template: bool, context: int | None
) -> PromptSet:
    """Add token ids to the prompts; those that cannot be sampled join the skipped.

    Args:
        prompts: as read.
        tokenizer: gives ids and chat template.
        template: read a string as a user's turn; else strings are continued as they are.
        context: tokens of prompt and answer that the model takes together; None where unknown.

    Raises:
        ValueError: no prompt is left, or messages without a chat template.
    """
    items, prompts.items = prompts.items, []
    if template:
        check_chat_template(tokenizer)
        items = [{**item, "prompt": as_messages(item["prompt"])} for item in items]
    groups = [TextGroup(item["prompt"], [], *(item.get(name) for name in CONTEXT_COLUMNS)) for item in items]
    for item, encoded in zip(items, encode_groups(groups, tokenizer, strict=True)):
        if isinstance(encoded, BadRow):
            prompts.skip(item["row"], item["prompt_id"], encoded.reason, encoded.detail)
        elif context is not None and len(encoded.prompt_ids) >= context:
            found = f"{len(encoded.prompt_ids)} tokens leave no room for an answer in a context of {context}"
            prompts.skip(item["row"], item["prompt_id"], str(Fault.PROMPT_TOO_LONG), found)
        else:
            kept = {name: value for name, value in item.items() if name != "row"}
            prompts.items.append({**kept, "prompt_ids": encoded.prompt_ids})
    prompts.skipped.sort(key=lambda row: row["row"])
    if not prompts.items:
        reasons = ", ".join(f"{count} rows: {reason}" for reason, count in prompts.reasons().most_common())
        raise ValueError(f"No prompt can be used ({reasons}).")
    return prompts
