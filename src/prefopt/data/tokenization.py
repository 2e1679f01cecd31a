"""Rows become token ids in one pass: normalised, templated, encoded, split and cut, and every lost row is counted.

`tokenize_pairs` and its neighbours are the interface. `RowTokenizer.tokenize_batch` is what happens to a row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch.distributed
from accelerate import PartialState
from datasets import Dataset, DatasetDict, Features, IterableDataset, Json
from transformers import PreTrainedTokenizerBase

from prefopt.data.encoding import (
    MESSAGES,
    STRINGS,
    EncodedGroup,
    TextGroup,
    TextMode,
    Truncation,
    encode_groups,
    fit,
    tokenizer_fingerprint,
)
from prefopt.data.holdout import PromptName, prompt_name
from prefopt.data.messages import BadRow, Fault, OnBadRow, as_messages, check_on_bad_row
from prefopt.data.rows import (
    COMPLETION_COLUMNS,
    CONTEXT_COLUMNS,
    RANGES,
    SKIPPED_COLUMNS,
    Kind,
    Row,
    check_columns,
    check_unused_text,
    id_column,
    id_features,
    is_tokenised,
    normalise,
    skipped_ranges,
    text_features,
)
from prefopt.files import content_hash
from prefopt.waiting import announced_wait

# part of the cache key: raise it whenever the same input would give other ids
VERSION = 5
OUTCOME = "_outcome"
# settings of models that compute positions from a formula, and go beyond those that they were trained on
OTHER_POSITIONS = ("rope_parameters", "rope_theta", "rope_scaling", "rotary_pct", "alibi")


def tokenize_pairs(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    max_prompt_length: int | None = None,
    truncation_mode: str = "keep_start",
    on_bad_row: OnBadRow = "drop",
    strict_prefix: bool = False,
    text_mode: TextMode | None = None,
    num_proc: int | None = None,
    name: str = "train",
) -> tuple[Dataset, TokenizationReport]:
    """Tokenise, split and cut preference rows of any accepted shape; report what happened to them.

    Args:
        dataset: rows as in `prefopt.data.rows`, or rows that are tokenised already, which are only checked and cut.
        tokenizer: gives ids, chat template, BOS and end token.
        max_length: tokens of prompt and completion together; None cuts nothing.
        max_prompt_length: tokens of a prompt that has to be cut; None follows `truncation_mode`.
        truncation_mode: "keep_start", "keep_end", "drop" or "trl09"; see `Truncation`.
        on_bad_row: "drop" counts and leaves out a row that cannot be used, "raise" stops at the first.
        strict_prefix: treat a row whose prompt is not a token prefix of prompt + completion as one that cannot be
            used.
        text_mode: how texts become ids; None: as TRL does today.
        num_proc: processes.
        name: what the report calls this set.

    Returns:
        A data set with `row_id`, `prompt_ids`, `chosen_ids`, `rejected_ids`, `chosen_bytes`, `rejected_bytes` (UTF-8
        bytes of the scored text without special tokens) and the method columns that it had; and the report. Where a
        completion has turns that are not scored, also `chosen_skipped` and `rejected_skipped`, ranges [begin, end) of
        its ids. A set that was made here with the same settings is returned unchanged, with its report.

    Raises:
        ValueError: wrong columns, images, a streamed set, no chat template for messages, no usable row, wrong lengths.
    """
    truncation = Truncation(max_length, max_prompt_length, truncation_mode)
    tokenize = RowTokenizer(tokenizer, "pairs", truncation, strict_prefix, text_mode=text_mode or TextMode())
    return tokenize(dataset, on_bad_row=on_bad_row, num_proc=num_proc, name=name)


def tokenize_comparisons(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    max_prompt_length: int | None = None,
    truncation_mode: str = "keep_start",
    on_bad_row: OnBadRow = "drop",
    num_proc: int | None = None,
    name: str = "train",
) -> tuple[Dataset, TokenizationReport]:
    """Tokenise comparison rows (a prompt and R >= 2 scored responses, or pairs); the rest as in `tokenize_pairs`.

    Returns:
        A data set with `row_id`, `prompt_ids`, `response_ids` (a list for each response), `scores`, `is_adversarial`,
        and `margin` where it had one; and the report.
    """
    tokenize = RowTokenizer(tokenizer, "comparisons", Truncation(max_length, max_prompt_length, truncation_mode))
    return tokenize(dataset, on_bad_row=on_bad_row, num_proc=num_proc, name=name)


def tokenize_prompts(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    template_strings: bool = False,
    on_bad_row: OnBadRow = "drop",
    num_proc: int | None = None,
    name: str = "prompts",
) -> tuple[Dataset, TokenizationReport]:
    """Tokenise prompts for generation, with generation prompt and one BOS: the ids `tokenize_pairs` gives that prompt.

    Args:
        dataset: rows with a `prompt`, or any preference rows, whose prompts are taken.
        tokenizer: gives ids and chat template.
        max_length: a longer prompt is a row that cannot be used; prompts are never cut here.
        template_strings: read a string prompt as one user turn of a conversation.
        on_bad_row: as in `tokenize_pairs`.
        num_proc: processes.
        name: what the report calls this set.

    Returns:
        The data set with all its columns, and `row_id` (of the prompt) and `prompt_ids`; and the report.
    """
    tokenize = RowTokenizer(tokenizer, "prompts", Truncation(max_length), template_strings=template_strings)
    return tokenize(dataset, on_bad_row=on_bad_row, num_proc=num_proc, name=name)


@dataclass(frozen=True)
class Outcome:
    """What became of one row. A map can only return columns, so it travels in one (`_outcome`) until it is counted.

    Attributes:
        fault: why the row cannot be used; None where it can.
        detail: what was found there.
        is_messages: whether the row came as messages; None where it came as token ids.
        is_prefix: whether the prompt alone is a token prefix of prompt + completion.
        cut: the parts that were cut ("prompt", "chosen", "rejected", "responses").
        prompt: names of its prompt, for hold-outs.
        other_turns: whether turns of others are scored with its answers.
        skipped: of each completion the ranges of ids that are not scored; see `EncodedGroup.skipped`.
    """

    fault: str | None
    detail: str | None
    is_messages: bool | None
    is_prefix: bool
    cut: list[str]
    prompt: PromptName
    other_turns: bool = False
    skipped: list[list[list[int]]] | None = None


# what the tokenised sets of this process were made with, and what was reported then, by fingerprint; whatever changes
# a set gives it another fingerprint
_MADE: dict[str, tuple[str, TokenizationReport]] = {}


@dataclass(frozen=True)
class RowTokenizer:
    """Turns rows of one kind into token ids.

    Attributes:
        tokenizer: gives ids, chat template, BOS and end token.
        kind: "pairs", "comparisons" or "prompts".
        truncation: how a row is made to fit.
        strict_prefix: a row whose prompt is not a token prefix of prompt + completion cannot be used.
        template_strings: read a string prompt as one user turn of a conversation.
        text_mode: how texts become ids.
    """

    tokenizer: PreTrainedTokenizerBase
    kind: Kind
    truncation: Truncation
    strict_prefix: bool = False
    template_strings: bool = False
    text_mode: TextMode = field(default_factory=TextMode)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all that decides which ids a row gets; a tokenizer that has been used gives the same."""
        settings = [self.kind, asdict(self.truncation), self.strict_prefix, self.template_strings]
        if self.text_mode != TextMode():
            settings.append(asdict(self.text_mode))
        return content_hash(tokenizer_fingerprint(self.tokenizer), settings, VERSION)

    @property
    def parts(self) -> tuple[str, ...]:
        """Names under which the lengths and cuts of a row's parts are reported."""
        return ("prompt", *COMPLETION_COLUMNS[self.kind])

    def __call__(
        self, dataset: Dataset, *, on_bad_row: OnBadRow, num_proc: int | None, name: str
    ) -> tuple[Dataset, TokenizationReport]:
        """Tokenise a dataset; one that was made here with the same settings is returned unchanged, with its report."""
        check_on_bad_row(on_bad_row)
        check_dataset(dataset, name)
        if dataset._fingerprint in _MADE:
            made_with, report = _MADE[dataset._fingerprint]
            if made_with == self.fingerprint:
                return dataset, replace(report, name=name)
        with main_process_first():
            mapped = self.map(dataset, num_proc=num_proc, where=f"The {name} set")
        return self.settle(mapped, on_bad_row=on_bad_row, name=name)

    def map(self, dataset: Dataset, *, num_proc: int | None, where: str) -> Dataset:
        """Tokenise every row of a dataset, faulty ones included; `settle` drops and counts those.

        Returns:
            The kept columns, and `_outcome`; see `Outcome`.
        """
        check_columns(dataset.column_names, self.kind, where=where)
        dataset = dataset.with_format(None)
        check_unused_text(dataset, self.kind, where=where)
        columns = id_features(dataset.features, self.kind)
        tokenised = is_tokenised(dataset.column_names, self.kind)
        faults = ("fault", "fault_detail")
        schema = [*columns, *faults] if tokenised else text_features(dataset.features, self.kind, is_messages=False)
        return dataset.map(
            self.tokenize_batch,
            batched=True,
            batch_size=200,  # a batch's token ids are Python integers: this bounds the memory of a process
            fn_kwargs={"columns": list(columns), "schema": list(schema)},
            remove_columns=[column for column in dataset.column_names if column not in columns],
            features=Features({**columns, OUTCOME: Json()}),
            num_proc=num_proc and min(num_proc, len(dataset)),
            # `datasets` would hash the tokenizer with the state that use leaves in it
            new_fingerprint=content_hash(dataset._fingerprint, self.fingerprint)[:32],
            desc=f"Tokenizing ({where})",
        )

    def tokenize_batch(
        self, batch: dict[str, list[Any]], columns: Sequence[str], schema: Sequence[str]
    ) -> dict[str, list[Any]]:
        """Read, encode and cut the rows of a batch; return what is kept of them and their outcomes.

        Args:
            batch: column -> values.
            columns: the columns to return, beside that of the outcomes.
            schema: the columns of a normalised row.
        """
        rows = [dict(zip(batch, values)) for values in zip(*batch.values())]
        clean, read = zip(*(self.read(row, schema) for row in rows))
        mode = self.text_mode if self.kind == "pairs" else None
        groups = [self._fit(group) for group in encode_groups(read, self.tokenizer, strict=True, mode=mode)]
        ids = id_columns(groups, self.kind, self.tokenizer)
        # prompts keep the columns of their rows as they were
        kept = [{**row, "row_id": c["row_id"]} for row, c in zip(rows, clean)] if self.kind == "prompts" else clean
        outcomes = [self._outcome(*each) for each in zip(clean, groups)]
        return {name: ids[name] if name in ids else [row.get(name) for row in kept] for name in columns} | {
            OUTCOME: [asdict(outcome) for outcome in outcomes]
        }

    def read(self, row: Row, schema: Sequence[str]) -> tuple[Row, TextGroup | EncodedGroup | BadRow]:
        """Return a row in the schema, and its prompt and completions: as texts, or as ids if they are given so."""
        clean = normalise(row, self.kind, schema)
        if clean["fault"] is not None:
            return clean, BadRow(clean["fault"], clean["fault_detail"])
        tokenised = is_tokenised(row, self.kind)
        prompt, *completions = (clean[id_column(part) if tokenised else part] for part in self.parts)
        if self.kind == "comparisons":
            (completions,) = completions
        if tokenised:
            return clean, EncodedGroup(prompt, completions, skipped=skipped_ranges(clean, self.kind))
        prompt = as_messages(prompt) if self.template_strings else prompt
        return clean, TextGroup(prompt, completions, *(clean.get(name) for name in CONTEXT_COLUMNS))

    def _fit(self, group: EncodedGroup | BadRow) -> EncodedGroup | BadRow:
        if isinstance(group, BadRow):
            return group
        if self.strict_prefix and not group.prompt_is_prefix:
            return BadRow(Fault.NOT_A_PREFIX, f"they part after {len(group.prompt_ids)} tokens")
        try:
            return fit(group, self.truncation, self.tokenizer.bos_token_id)
        except BadRow as fault:
            return fault

    def _outcome(self, clean: Row, group: EncodedGroup | BadRow) -> Outcome:
        name = prompt_name(clean, self.tokenizer)
        prompt = clean.get("prompt")
        is_messages = None if prompt is None else isinstance(prompt, list)
        if isinstance(group, BadRow):
            return Outcome(group.reason, group.detail, is_messages, True, [], name)
        cut = dict.fromkeys(self.parts[min(place, len(self.parts) - 1)] for place in group.cut)
        skipped = [[list(each) for each in ranges] for ranges in group.skipped] or None
        return Outcome(None, None, is_messages, group.prompt_is_prefix, list(cut), name, group.other_turns, skipped)

    def settle(
        self, mapped: Dataset, *, on_bad_row: OnBadRow, name: str, one_form: bool = False
    ) -> tuple[Dataset, TokenizationReport]:
        """Drop the rows of a mapped dataset that cannot be used, or raise at the first, and count everything.

        Args:
            mapped: as `map` returns it.
            on_bad_row: "drop" or "raise".
            name: what the report calls this set.
            one_form: strings among messages, and messages among strings, cannot be used either.
        """
        outcomes = outcomes_of(mapped)
        if one_form:
            outcomes = with_one_form(outcomes)
        report = TokenizationReport(name, len(outcomes), sum(outcome.fault is None for outcome in outcomes))
        for row, outcome in enumerate(outcomes):
            if outcome.fault is None:
                report.rows_cut += bool(outcome.cut)
                report.not_prefix += not outcome.is_prefix
                report.other_turns += outcome.other_turns
                report.skipped_turns += outcome.skipped is not None
                continue
            if on_bad_row == "raise":
                raise ValueError(
                    f"Row {row} of the {name} set: {outcome.fault} ({outcome.detail}). Fix it, or set "
                    "`on_bad_row: drop`."
                )
            report.examples.setdefault(outcome.fault, (row, outcome.detail or ""))
            report.dropped[outcome.fault] = report.dropped.get(outcome.fault, 0) + 1
            report.dropped_rows.append({"row": row, "reason": outcome.fault, "detail": outcome.detail})
        if not report.rows_kept:
            raise ValueError(f"No row of the {name} set can be used.\n{report.table()}")
        kept = mapped.remove_columns([OUTCOME, *(name for name in SKIPPED_COLUMNS if name in mapped.column_names)])
        if report.dropped:
            kept = kept.select([row for row, outcome in enumerate(outcomes) if outcome.fault is None])
        if report.skipped_turns:
            kept = with_skipped(kept, [outcome for outcome in outcomes if outcome.fault is None])
        names = mapped.select_columns("row_id").select([dropped["row"] for dropped in report.dropped_rows])
        report.dropped_rows = [{**row, **dropped} for row, dropped in zip(names, report.dropped_rows)]
        cuts = Counter(part for outcome in outcomes for part in outcome.cut)
        report.cut = {part: cuts[part] for part in self.parts}
        report.lengths = {part: LengthSummary.of(token_counts(kept, part)) for part in self.parts}
        form = form_of(outcomes)
        report.form = None if form is None else MESSAGES if form else STRINGS
        _MADE[kept._fingerprint] = self.fingerprint, report
        return kept, report


def scored_ids(group: EncodedGroup, place: int) -> list[int]:
    """Return the ids of a completion that are scored."""
    skipped = {index for begin, end in group.skipped[place] for index in range(begin, end)}
    return [each for index, each in enumerate(group.completion_ids[place]) if index not in skipped]


def id_columns(
    groups: Sequence[EncodedGroup | BadRow], kind: Kind, tokenizer: PreTrainedTokenizerBase
) -> dict[str, list[Any]]:
    """Return the columns of ids of a batch, and for pairs the UTF-8 bytes of the scored texts; faults have none."""
    usable = [None if isinstance(group, BadRow) else group for group in groups]
    columns: dict[str, list[Any]] = {"prompt_ids": [group.prompt_ids if group else [] for group in usable]}
    if kind == "pairs":
        for place, name in enumerate(COMPLETION_COLUMNS[kind]):
            ids = [group.completion_ids[place] if group else [] for group in usable]
            scored = [scored_ids(group, place) if group and group.skipped else own for group, own in zip(usable, ids)]
            texts = tokenizer.batch_decode(scored, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            columns |= {id_column(name): ids, f"{name}_bytes": [len(text.encode("utf-8")) for text in texts]}
    elif kind == "comparisons":
        columns["response_ids"] = [group.completion_ids if group else [] for group in usable]
    return columns


def with_skipped(dataset: Dataset, outcomes: Sequence[Outcome]) -> Dataset:
    """Add the columns of what is not scored, which only sets with a completion of several turns have."""
    for place, name in enumerate(SKIPPED_COLUMNS):
        values = [outcome.skipped[place] if outcome.skipped else [] for outcome in outcomes]
        dataset = dataset.add_column(name, values, feature=RANGES)
    return dataset


def outcomes_of(mapped: Dataset) -> list[Outcome]:
    """Read the outcomes of a mapped dataset, in its order."""
    column = mapped.select_columns(OUTCOME)[:][OUTCOME]
    return [Outcome(**{**values, "prompt": PromptName(**values["prompt"])}) for values in column]


def form_of(outcomes: Sequence[Outcome]) -> bool | None:
    """Return whether the first usable row is a conversation; None where no row can be used, or all are token ids."""
    return next((outcome.is_messages for outcome in outcomes if outcome.fault is None), None)


def with_one_form(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Mark strings among messages, and messages among strings, as faulty; the first usable row decides."""
    form = form_of(outcomes)
    detail = f"`prompt` is {'a string' if form else 'a list of messages'}, unlike the rows before"
    return [
        outcome
        if outcome.fault is not None or outcome.is_messages == form
        else replace(outcome, fault=str(Fault.WRONG_TYPE), detail=detail, cut=[])
        for outcome in outcomes
    ]


def token_counts(dataset: Dataset, part: str) -> Any:
    """Count the tokens of one part in every row (of "responses": of every response)."""
    name = id_column(part)
    values = dataset.select_columns(name).with_format("arrow")[:][name]
    return pc.list_value_length(pc.list_flatten(values) if part == "responses" else values).to_numpy()


def check_fits_model(dataset: Dataset, config: Any, name: str, *, model: str = "model") -> None:
    """Check that a model has an embedding for every token id, and a position for every token if it learns positions.

    Args:
        dataset: tokenised pairs or comparisons.
        config: of the model.
        name: of the set, in errors.
        model: what errors call the model.

    Raises:
        ValueError: it has not; on a GPU this would be a device assertion in the middle of training.
    """
    config = config.get_text_config()
    parts = [part for part in ("prompt", "chosen", "rejected", "responses") if id_column(part) in dataset.column_names]
    table = dataset.select_columns([id_column(part) for part in parts]).with_format("arrow")[:]
    largest = max(pc.max(pc.list_flatten(column, recursive=True)).as_py() or 0 for column in table.columns)
    if largest >= config.vocab_size:
        raise ValueError(
            f"The {name} set has the token id {largest}, but the {model} has {config.vocab_size} embeddings: the "
            "tokenizer belongs to another model, or has tokens that it was never resized for."
        )
    limit = getattr(config, "max_position_embeddings", None)
    if limit is None or config.model_type == "xglm" or any(hasattr(config, sign) for sign in OTHER_POSITIONS):
        return
    if "responses" in parts:
        answers = np.array([max(map(len, row)) for row in dataset["response_ids"]])
    else:
        answers = np.maximum(token_counts(dataset, "chosen"), token_counts(dataset, "rejected"))
    longest = int((token_counts(dataset, "prompt") + answers).max())
    if longest > limit:
        raise ValueError(
            f"The {name} set has a row of {longest} tokens, but the {model} has learned {limit} positions: set "
            f"`max_length` to at most {limit}."
        )


def check_dataset(dataset: Any, name: str) -> None:
    """Raise a ValueError for anything but a `datasets.Dataset` with rows."""
    if isinstance(dataset, IterableDataset):
        raise ValueError(f"The {name} set is streamed (IterableDataset): load it without streaming.")
    if isinstance(dataset, DatasetDict):
        raise ValueError(f"The {name} set is a DatasetDict: pick one of its splits {sorted(dataset)}.")
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"The {name} set is a {type(dataset).__name__}; pass a datasets.Dataset (Dataset.from_list makes one)."
        )
    if len(dataset) == 0:
        raise ValueError(f"The {name} set has no rows.")


@contextmanager
def main_process_first() -> Iterator[None]:
    """Let the main process, then each node's main process, fill the data cache before the others read it."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        yield
        return
    state = PartialState()
    with ExitStack() as turns:
        with announced_wait("the first rank of all, or of this node, to read and tokenise the data"):
            turns.enter_context(state.main_process_first())
            turns.enter_context(state.local_main_process_first())
        yield
        with announced_wait("the other ranks to read the data"):
            turns.close()


@dataclass(frozen=True)
class LengthSummary:
    """Lengths in tokens over the kept rows, after cutting."""

    mean: float
    p50: float
    p95: float
    max: int

    @classmethod
    def of(cls, lengths: Sequence[int] | np.ndarray) -> LengthSummary:
        """Summary of at least one length."""
        values = np.asarray(lengths)
        return cls(
            float(values.mean()), float(np.percentile(values, 50)), float(np.percentile(values, 95)), int(values.max())
        )


@dataclass
class TokenizationReport:
    """Counts of one data set.

    Args:
        name: which set ("train", "eval", ...).
        rows_in: rows before anything was dropped.
        rows_kept: rows that are used.
        dropped: rows left out, for each reason.
        examples: for each reason, the first such row (counted from 0) and what was found there.
        cut: kept rows in which this part was cut ("prompt", "chosen", "rejected", "responses").
        rows_cut: kept rows in which anything was cut.
        not_prefix: kept rows whose prompt alone is not a token prefix of prompt + completion.
        other_turns: kept rows in which turns of others stand between those of an answer; all their tokens are scored.
        skipped_turns: kept rows of which only the assistant's turns are scored (with `completion_turns: last`, the
            last one).
        dropped_rows: of every dropped row its number, `row_id`, reason and detail.
        lengths: tokens of each part.
        form: "strings" or "messages", as the rows came; None for token ids.
        shown: whether it has been printed.
    """

    name: str
    rows_in: int
    rows_kept: int
    dropped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, tuple[int, str]] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)
    rows_cut: int = 0
    not_prefix: int = 0
    other_turns: int = 0
    skipped_turns: int = 0
    dropped_rows: list[dict[str, Any]] = field(default_factory=list)
    lengths: dict[str, LengthSummary] = field(default_factory=dict)
    form: str | None = None
    shown: bool = field(default=False, compare=False)

    @property
    def rows_dropped(self) -> int:
        """Rows left out for any reason."""
        return sum(self.dropped.values())

    def table(self) -> str:
        """The counts as lines of text."""
        lines = [
            f"{self.name}: {self.rows_in} rows read, {self.rows_kept} kept, {self.rows_dropped} dropped, "
            f"{self.rows_cut} cut"
        ]
        for reason, count in sorted(self.dropped.items(), key=lambda item: (-item[1], item[0])):
            row, detail = self.examples[reason]
            lines.append(f"  dropped  {count:>8}  {reason} (first: row {row}, {detail})")
        for part, count in self.cut.items():
            if count:
                lines.append(f"  cut      {count:>8}  {part}")
        if self.not_prefix:
            lines.append(
                f"  note     {self.not_prefix:>8}  prompts are not a token prefix of prompt + completion; split where "
                "they part"
            )
        if self.other_turns:
            lines.append(
                f"  note     {self.other_turns:>8}  completions hold turns of others between their answers, and all "
                "their tokens are scored: the template does not show where the answers are ({% generation %} would)"
            )
        if self.skipped_turns:
            lines.append(
                f"  note     {self.skipped_turns:>8}  completions have several turns, of which only the assistant's "
                "are scored (`completion_turns`)"
            )
        if self.lengths:
            lines.append(f"  {'tokens':<10}{'mean':>10}{'p50':>8}{'p95':>8}{'max':>8}")
            for part, summary in self.lengths.items():
                lines.append(
                    f"  {part:<10}{summary.mean:>10.1f}{summary.p50:>8.0f}{summary.p95:>8.0f}{summary.max:>8}"
                )
        return "\n".join(lines)


def describe_sample(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any]) -> str:
    """One tokenised row as text, special tokens shown and the scored tokens between ⟦ and ⟧.

    Args:
        tokenizer: the tokenizer that made the ids.
        row: a row of tokenised pairs (`prompt_ids`, `chosen_ids`, `rejected_ids`) or comparisons (`response_ids`).
    """
    prompt = list(row["prompt_ids"])
    if "response_ids" in row:
        parts = {
            f"response {number} (score {score:g})": ids
            for number, (ids, score) in enumerate(zip(row["response_ids"], row["scores"]))
        }
    else:
        parts = {"chosen": row["chosen_ids"], "rejected": row["rejected_ids"]}
    lines = [f"row {row['row_id']}: {len(prompt)} prompt tokens, then the scored tokens between ⟦ and ⟧"]
    context = str(tokenizer.decode(prompt))
    lines.append(f"prompt\n{context}")
    for name, ids in parts.items():
        if skipped := row.get(f"{name}_skipped"):
            text = _marked(tokenizer, list(ids), skipped)
        else:
            whole = str(tokenizer.decode([*prompt, *ids]))
            text = whole[len(context) :] if whole.startswith(context) else str(tokenizer.decode(list(ids)))
            text = f"⟦{text}⟧"
        lines.append(f"{name}, {len(ids)} tokens\n{text}")
    return "\n".join(lines)


def _marked(tokenizer: PreTrainedTokenizerBase, ids: list[int], skipped: Sequence[Sequence[int]]) -> str:
    """Return a completion as text, with the ranges that are scored between ⟦ and ⟧."""
    edges = [0, *(edge for each in skipped for edge in each), len(ids)]
    texts = [str(tokenizer.decode(ids[begin:end])) for begin, end in pairwise(edges)]
    return "".join(f"⟦{text}⟧" if text and place % 2 == 0 else text for place, text in enumerate(texts))
