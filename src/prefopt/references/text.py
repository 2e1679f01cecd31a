"""Score the *text* of preference rows under any model, with that model's own tokenizer and chat template.

Prompt and completion are tokenised together and the completion starts where they part (`prefopt.data`), so nothing is
sliced by counting, and a row that the model would have to cut is noted and not scored.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from datasets import Dataset
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase

from prefopt.data.encoding import load_tokenizer, prepare_tokenizer, tokenizer_fingerprint
from prefopt.data.loading import normalise_rows
from prefopt.data.tokenization import tokenize_pairs
from prefopt.files import read_object, write_json
from prefopt.references.cache import (
    SIDES,
    UNSCORABLE,
    ScoreCache,
    Scorer,
    Scores,
    describe_scorers,
    ids_digest,
    text_keys,
)
from prefopt.references.filling import (
    ReferenceModel,
    ScoreGroups,
    UnscoredGroup,
    fill,
    group_scorer,
    on_all_ranks,
    pair_lengths,
    prepare_model,
    shared_lookup,
    unscored_groups,
)
from prefopt.references.fingerprints import adapted_model, files_fingerprint, model_folder, module_fingerprint
from prefopt.references.health import HealthCard, health_cards
from prefopt.scoring.layouts import Group
from prefopt.scoring.packing import choose_layout, nearest_to_probe, probe_group
from prefopt.waiting import announced_wait

logger = logging.getLogger(__name__)

CHECKED_ROWS = 8  # rows that are scored again one by one, to compare with their batched scores
HASHES_FILE = "file_hashes.json"
CHECKS_FILE = "checks.json"


@dataclass(frozen=True)
class ScoringSettings:
    """Settings of scoring references.

    Attributes:
        root: folder of the score cache.
        max_length: longest prompt + completion in each model's own tokens; None for the model's context alone.
        dtype: of weights and computation ("bfloat16", "float32", ...).
        batch_layout: "auto", "packed" or "padded".
        max_tokens: tokens of one forward.
        num_proc: processes that tokenise.
        show_progress: with rate and time left.
    """

    root: Path
    max_length: int | None = None
    dtype: str = "bfloat16"
    batch_layout: str = "auto"
    max_tokens: int = 16384
    num_proc: int | None = None
    show_progress: bool = True


@dataclass
class ScoringReport:
    """Counts of what scoring one reference did.

    Attributes:
        name: the reference.
        rows: rows that were given.
        scored: completions scored now.
        found: completions that the cache held already.
        too_long: rows that the model would have to cut.
        refused: rows that its chat template or tokenizer cannot take.
        not_prefix: rows whose prompt alone is not a token prefix of prompt + completion.
        batched_vs_single: largest |batched - single| / (1 + |single|) of the summed log-probs of the checked rows.
    """

    name: str
    rows: int
    scored: int = 0
    found: int = 0
    too_long: int = 0
    refused: int = 0
    not_prefix: int = 0
    batched_vs_single: float | None = None


def text_scorer(
    reference: str | ReferenceModel, root: Path, *, dtype: str
) -> tuple[Scorer, PreTrainedTokenizerBase | None]:
    """Return the cache's name for `reference` as a scorer of text, and its tokenizer, without loading its weights.

    Where the model's files are not on this machine, the scores that the cache holds under its name are used, with a
    warning, and the tokenizer is None.

    Raises:
        ValueError: the model is not here, and the cache holds no scores under that name, or several models'.
    """
    if isinstance(reference, ReferenceModel):
        weights = module_fingerprint(reference.model, reference.model.config)
        dtype = str(reference.model.dtype).removeprefix("torch.")
        tokenizer = reference.tokenizer
        return Scorer(reference.name, weights, tokenizer_fingerprint(tokenizer), dtype), tokenizer
    try:
        folder = model_folder(reference, download=False)
    except FileNotFoundError as error:
        known = [s for s in describe_scorers(root) if (s.name, s.dtype) == (reference, dtype)]
        if len(known) != 1:
            raise ValueError(
                f"The reference {reference} is not on this machine, and {root} has the scores of {len(known)} models "
                f"of that name in {dtype} (one is needed): {error}"
            ) from error
        logger.warning("The files of %s are not on this machine: its scores are taken by name, unchecked.", reference)
        return known[0], None
    weights = files_fingerprint(folder, remembered=root / HASHES_FILE)
    tokenizer = load_tokenizer(reference)
    return Scorer(reference, weights, tokenizer_fingerprint(tokenizer), dtype), tokenizer


def score_reference(
    rows: Dataset,
    reference: str | ReferenceModel,
    settings: ScoringSettings,
    *,
    accelerator: Accelerator | None = None,
) -> ScoringReport:
    """Score the text of all rows under one reference into the cache; what it holds already is not scored again.

    All ranks call it with the same rows. The model is loaded only if something is missing, and freed at the end.

    Args:
        rows: preference rows in any form that `prefopt.data` reads, as texts or messages.
        reference: a hub name, a folder, or a model in memory.
        settings: see `ScoringSettings`.
        accelerator: needed under DeepSpeed only, where the model is sharded.

    Raises:
        ValueError: no chat template for messages, a damaged cache, a score that is not finite.
    """
    if not isinstance(reference, str):
        prepare_tokenizer(reference.tokenizer)
    else:
        base = adapted_model(model_folder(reference, download=True))
        if base is not None:
            model_folder(base, download=True)
    scorer, tokenizer = text_scorer(reference, settings.root, dtype=settings.dtype)
    assert tokenizer is not None and isinstance(tokenizer.pad_token_id, int)
    rows = normalise_rows(rows, "pairs", num_proc=settings.num_proc)
    tokenised, counts = tokenize_pairs(rows, tokenizer, max_length=None, num_proc=settings.num_proc, name=scorer.name)
    config = AutoConfig.from_pretrained(base or reference) if isinstance(reference, str) else reference.model.config
    cache = ScoreCache(settings.root, scorer)
    report = ScoringReport(scorer.name, len(rows), not_prefix=counts.not_prefix)
    groups = _plan(cache, rows, tokenised, _limits(config, settings.max_length), report)
    # the main process has written its notes, and all ranks read the same records from here on
    with announced_wait("the first rank to look up what is scored"):
        PartialState().wait_for_everyone()
    if groups:
        on_all_ranks(lambda: cache.check_writable(2 * len(groups)))  # before anything is loaded
        _score(cache, groups, reference, tokenizer.pad_token_id, settings, report, accelerator)
        _write_checks(cache, report)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return report


def _score(
    cache: ScoreCache,
    groups: Sequence[UnscoredGroup],
    reference: str | ReferenceModel,
    pad_token_id: int,
    settings: ScoringSettings,
    report: ScoringReport,
    accelerator: Accelerator | None,
) -> None:
    """Load the reference, score the groups, and compare a few scores with those of single texts."""
    model, config = prepare_model(reference, dtype=cache.scorer.dtype, accelerator=accelerator)
    device = PartialState().device
    tried = groups[nearest_to_probe([each.group.shared_length for each in groups])].group
    layout, reason = choose_layout(
        settings.batch_layout,
        config,
        pad_token_id=pad_token_id,
        longest_sequence=max(max(each.lengths) for each in groups),
        probe=lambda packed: probe_group(model, tried, packed, device=device),
    )
    if reason is not None:
        logger.info("References are scored padded, not packed: %s.", reason)
    score = group_scorer(model, layout, device=device)
    padded, shown = layout.name == "padded", settings.show_progress
    fill(cache, groups, score, max_tokens=settings.max_tokens, padded=padded, show_progress=shown)
    report.batched_vs_single = _compare_single(cache, groups, score)


def _limits(config: PretrainedConfig, max_length: int | None) -> tuple[float, float]:
    """Return the limit of this run and the model's own, in tokens."""
    context = config.get_text_config().to_dict().get("max_position_embeddings") or np.inf
    return min(context, np.inf if max_length is None else max_length), context


def _plan(
    cache: ScoreCache, rows: Dataset, tokenised: Dataset, limits: tuple[float, float], report: ScoringReport
) -> list[UnscoredGroup]:
    """Return the groups to score; note in the cache the rows that cannot be scored whole (main process)."""
    limit, context = limits
    row_ids, lengths = tokenised["row_id"], pair_lengths(tokenised).max(axis=0)
    keys = text_keys(row_ids)
    known = [shared_lookup(cache, side_keys) for side_keys in keys]
    fits = lengths <= limit
    unscored = [fits & (~side.found | side.truncated) for side in known]
    _check_ids(cache, tokenised, known, [fits & ~side for side in unscored])
    report.too_long = int((~fits).sum())
    report.scored = int(sum(side.sum() for side in unscored))
    report.found = 2 * int(fits.sum()) - report.scored
    too_long = np.where(lengths > context, UNSCORABLE, lengths)
    notes = {row_ids[row]: int(too_long[row]) for row in np.flatnonzero(~fits)}
    faults = rows["fault"] if "fault" in rows.column_names else [None] * len(rows)
    refused = {row_id for row_id, fault in zip(rows["row_id"], faults) if not fault} - set(row_ids)
    report.refused = len(refused)
    on_all_ranks(lambda: _note(cache, notes | dict.fromkeys(sorted(refused), UNSCORABLE)))
    return unscored_groups(tokenised, keys, unscored)


def _check_ids(cache: ScoreCache, tokenised: Dataset, known: Sequence[Scores], scored: Sequence[np.ndarray]) -> None:
    """Raise where a text has other token ids than when it was scored."""
    prompts = tokenised["prompt_ids"]
    for side, scores, wanted in zip(SIDES, known, scored):
        completions = tokenised[f"{side}_ids"]
        for row in np.flatnonzero(wanted):
            if int(scores.ids[row]) != ids_digest(prompts[row], completions[row]):
                raise ValueError(
                    f"{cache.scorer.name} splits row {tokenised['row_id'][row]} into other tokens than when it was "
                    "scored, although its tokenizer looks the same (does its template write today's date?). "
                    f"Delete {cache.folder} to score it again."
                )


def _note(cache: ScoreCache, notes: dict[str, int]) -> None:
    """Record the length of rows that were not scored; a score that was made under a larger limit stays."""
    if PartialState().is_main_process:
        for keys in text_keys(list(notes)):
            for key, length, there in zip(keys, notes.values(), cache.lookup(keys).found):
                if not there:
                    cache.add(key, logps=float("nan"), tokens=0, num_bytes=0, length=length, truncated=True)
        cache.flush()


def _compare_single(cache: ScoreCache, groups: Sequence[UnscoredGroup], score: ScoreGroups) -> float:
    """Score a few completions one by one on every rank alike, and compare with what their batches gave."""
    sample = groups[:: max(1, len(groups) // CHECKED_ROWS)][:CHECKED_ROWS]
    alone = [
        Group(group.prompt, [ids], group.skipped[place : place + 1])
        for group in (each.group for each in sample)
        for place, ids in enumerate(group.completions)
    ]
    single = [score([group]).item() for group in alone]
    batched = shared_lookup(cache, [key for each in sample for key in each.keys], just_written=True).logps
    return float(np.max(np.abs(batched - np.array(single)) / (1 + np.abs(single))))


def _write_checks(cache: ScoreCache, report: ScoringReport) -> None:
    if PartialState().is_main_process:
        found = {"rows": report.rows, "not_prefix": report.not_prefix, "batched_vs_single": report.batched_vs_single}
        write_json(cache.folder / CHECKS_FILE, found)


def read_checks(root: Path, scorer: Scorer) -> dict[str, Any]:
    """Return the notes beside the scores: `rows`, `not_prefix`, `batched_vs_single`; empty without any."""
    path = root / scorer.key / CHECKS_FILE
    return read_object(path, remedy="delete this file") if path.exists() else {}


def found_scores(rows: Dataset, references: list[str], root: Path, *, dtype: str) -> list[tuple[Scorer, list[Scores]]]:
    """Return for each reference its scorer and what the cache holds of the rows' chosen and rejected completions."""
    keys = text_keys(normalise_rows(rows, "pairs")["row_id"])
    scorers = [text_scorer(reference, root, dtype=dtype)[0] for reference in references]
    caches = [ScoreCache(root, scorer) for scorer in scorers]
    return [(cache.scorer, [cache.lookup(side) for side in keys]) for cache in caches]


def cards_of(rows: Dataset, references: list[str], root: Path, *, dtype: str) -> list[HealthCard]:
    """Make the health cards of references from the cache, over the rows that all of them have scored.

    Raises:
        ValueError: there is no such row.
    """
    scorers, found = zip(*found_scores(rows, references, root, dtype=dtype))
    usable = np.all([side.found & ~side.truncated for sides in found for side in sides], axis=0)
    if not usable.any():
        raise ValueError("No row was scored whole by all references: raise `max_length`.")

    def table(column: str) -> tuple[np.ndarray, np.ndarray]:
        chosen, rejected = (np.stack([getattr(sides[i], column)[usable] for sides in found]) for i in (0, 1))
        return chosen, rejected

    return health_cards(
        [scorer.name for scorer in scorers],
        logps=table("logps"),
        tokens=table("tokens"),
        num_bytes=table("bytes"),
        checks=[read_checks(root, scorer) for scorer in scorers],
    )
