"""Score the *text* of preference rows under any model, with that model's own tokenizer and chat template.

The text is tokenised jointly and the completion starts where prompt and whole part (`prefopt.data`), so nothing is
sliced
by counting, and a row that the model would have to cut is noted and not scored.
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
from transformers import (
    AutoConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from prefopt.data.encoding import prepare_tokenizer, tokenizer_fingerprint
from prefopt.data.loading import normalise_rows
from prefopt.data.tokenization import tokenize_pairs
from prefopt.files import read_json, write_json
from prefopt.references.cache import (
    SCORER_VERSION,
    UNSCORABLE,
    ScoreCache,
    Scorer,
    Scores,
    describe_scorers,
    ids_digest,
    text_key,
)
from prefopt.references.filling import (
    Job,
    ReferenceModel,
    ScoreGroups,
    fill,
    group_scorer,
    load_tokenizer,
    prepare_model,
    read_all,
    shared_lookup,
)
from prefopt.references.fingerprints import adapted_model, files_fingerprint, model_folder, module_fingerprint
from prefopt.references.health import HealthCard, health_cards
from prefopt.scoring.layouts import Group
from prefopt.scoring.packing import choose_layout, nearest_to_probe, probe_group

logger = logging.getLogger(__name__)

CHECKED_ROWS = 8  # rows that are scored again one by one, to compare with their batched scores
HASHES_FILE = "file_hashes.json"
CHECKS_FILE = "checks.json"
SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class ScoringSettings:
    """How references are scored.

    Attributes:
        root: folder of the score cache.
        max_length: longest prompt + completion in each model's own tokens; None for the model's context alone.
        dtype: of weights and computation ("bfloat16", "float32", ...).
        batch_layout: "auto", "packed" or "padded".
        max_tokens: tokens of one forward.
        num_proc: processes that tokenise.
    """

    root: Path
    max_length: int | None = None
    dtype: str = "bfloat16"
    batch_layout: str = "auto"
    max_tokens: int = 16384
    num_proc: int | None = None


@dataclass
class ScoringReport:
    """What scoring one reference did.

    Attributes:
        name: the reference.
        rows: rows that were given.
        scored: completions scored now.
        found: completions whose scores were there.
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
    """Who scores when `reference` scores text, without loading the weights of one that is given by name.

    Where the model's files are not on this machine, the cache may still know one model of that name: then it is
    taken, which is said, and the tokenizer is None.

    Raises:
        ValueError: nothing is known of the model here.
    """
    if isinstance(reference, ReferenceModel):
        weights, tokenizer, name = (
            module_fingerprint(reference.model, reference.model.config),
            reference.tokenizer,
            reference.name,
        )
        dtype = str(reference.model.dtype).removeprefix("torch.")
        return Scorer(name, weights, tokenizer_fingerprint(tokenizer), dtype, version=SCORER_VERSION), tokenizer
    try:
        folder = model_folder(reference, download=False)
    except FileNotFoundError as error:
        known = [s for s in describe_scorers(root) if (s.name, s.dtype) == (reference, dtype)]
        if len(known) != 1:
            raise ValueError(
                f"The reference {reference} is not on this machine, and {root} has the scores of {len(known)} models "
                "of that "
                f"name in {dtype} (one is needed): {error}"
            ) from error
        logger.warning("The files of %s are not on this machine: its scores are taken by name, unchecked.", reference)
        return known[0], None
    weights = files_fingerprint(folder, remembered=root / HASHES_FILE)
    tokenizer = load_tokenizer(reference)
    return Scorer(reference, weights, tokenizer_fingerprint(tokenizer), dtype, version=SCORER_VERSION), tokenizer


def score_reference(
    rows: Dataset,
    reference: str | ReferenceModel,
    settings: ScoringSettings,
    *,
    accelerator: Accelerator | None = None,
) -> ScoringReport:
    """Score the text of all rows under one reference into the cache; what is there already is left as it is.

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
    assert tokenizer is not None
    rows = normalise_rows(rows, "pairs", num_proc=settings.num_proc)
    tokenised, told = tokenize_pairs(rows, tokenizer, max_length=None, num_proc=settings.num_proc, name=scorer.name)
    config = AutoConfig.from_pretrained(base or reference) if isinstance(reference, str) else reference.model.config
    cache = ScoreCache(settings.root, scorer)
    report = ScoringReport(scorer.name, len(rows), not_prefix=told.not_prefix)
    jobs = _plan(cache, rows, tokenised, _limit(config, settings.max_length), report)
    # the main process has written its notes, and everyone looks at the same records from here on
    PartialState().wait_for_everyone()
    if jobs:
        model, config = prepare_model(reference, dtype=scorer.dtype, accelerator=accelerator)
        longest = max(max(job.lengths()) for job in jobs)
        pad = tokenizer.pad_token_id
        assert isinstance(pad, int)
        device = PartialState().device
        tried = jobs[nearest_to_probe([job.group.shared_length for job in jobs])].group
        layout, reason = choose_layout(
            settings.batch_layout,
            config,
            pad_token_id=pad,
            longest_sequence=longest,
            probe=lambda packed: probe_group(model, tried, packed, device=device),
        )
        if reason is not None:
            logger.info("References are scored padded, not packed: %s.", reason)
        score = group_scorer(model, layout, device=device)
        fill(cache, jobs, score, max_tokens=settings.max_tokens, padded=layout.name == "padded")
        report.batched_vs_single = _compare_single(cache, jobs, score)
        _write_checks(cache, report)
        del model, score
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return report


def _limit(config: PretrainedConfig, max_length: int | None) -> tuple[float, float]:
    """The limit of this run and the model's own, in tokens."""
    context = config.get_text_config().to_dict().get("max_position_embeddings") or np.inf
    return (min(context, np.inf if max_length is None else max_length), context)


def _plan(
    cache: ScoreCache, rows: Dataset, tokenised: Dataset, limits: tuple[float, float], report: ScoringReport
) -> list[Job]:
    """The groups to score; rows that cannot be scored whole are noted in the cache (by the main process)."""
    limit, context = limits
    notes: list[tuple[str, int]] = []
    jobs: list[Job] = []
    columns = [
        tokenised[name]
        for name in ("row_id", "prompt_ids", "chosen_ids", "rejected_ids", "chosen_bytes", "rejected_bytes")
    ]
    keys = [[text_key(row_id, side) for row_id in columns[0]] for side in SIDES]
    known = [shared_lookup(cache, side) for side in keys]
    for row, (row_id, prompt, chosen, rejected, *sizes) in enumerate(zip(*columns)):
        length = len(prompt) + max(len(chosen), len(rejected))
        if length > limit:
            report.too_long += 1
            notes.append((row_id, length if length <= context else UNSCORABLE))
            continue
        digests = [ids_digest(prompt, ids) for ids in (chosen, rejected)]
        wanted = []
        for side in (0, 1):
            if not known[side].found[row] or known[side].truncated[row]:
                wanted.append(side)
            elif int(known[side].ids[row]) != digests[side]:
                raise ValueError(
                    f"{cache.scorer.name} splits row {row_id} into other tokens than when it was scored, although its "
                    "tokenizer "
                    f"looks the same (does its template write today's date?). Delete {cache.folder} to score it again."
                )
        report.found += 2 - len(wanted)
        report.scored += len(wanted)
        if wanted:
            texts = [list((chosen, rejected)[side]) for side in wanted]
            jobs.append(
                Job(
                    Group(list(prompt), texts),
                    keys=tuple(keys[side][row] for side in wanted),
                    num_bytes=tuple(int(sizes[side]) for side in wanted),
                    ids=tuple(digests[side] for side in wanted),
                )
            )
    refused = sorted(set(_usable_ids(rows)) - set(columns[0]))
    report.refused = len(refused)
    _note(cache, [*notes, *((row_id, UNSCORABLE) for row_id in refused)])
    return jobs


def _usable_ids(rows: Dataset) -> list[str]:
    """Ids of the rows that hold a pair at all."""
    if "fault" not in rows.column_names:
        return list(rows["row_id"])
    return [row_id for row_id, fault in zip(rows["row_id"], rows["fault"]) if not fault]


def _note(cache: ScoreCache, notes: Sequence[tuple[str, int]]) -> None:
    if not PartialState().is_main_process:
        return
    for side in SIDES:
        keys = [text_key(row_id, side) for row_id, _ in notes]
        there = cache.lookup(keys)
        for number, (key, (_, length)) in enumerate(zip(keys, notes)):
            # a score that was made under a larger limit stays
            if not there.found[number]:
                cache.add(key, logps=float("nan"), tokens=0, num_bytes=0, length=length, truncated=True)
    cache.flush()


def _compare_single(cache: ScoreCache, jobs: Sequence[Job], score: ScoreGroups) -> float:
    """Score a few completions one by one on every rank alike, and compare with what their batches gave."""
    step = max(1, len(jobs) // CHECKED_ROWS)
    sample = list(jobs[::step])[:CHECKED_ROWS]
    single = [score([Group(job.group.prompt, [ids])]).item() for job in sample for ids in job.group.completions]
    batched = read_all(cache, [key for job in sample for key in job.keys]).logps
    return float(np.max(np.abs(batched - np.array(single)) / (1 + np.abs(single))))


def _write_checks(cache: ScoreCache, report: ScoringReport) -> None:
    if PartialState().is_main_process:
        found = {"rows": report.rows, "not_prefix": report.not_prefix, "batched_vs_single": report.batched_vs_single}
        write_json(cache.folder / CHECKS_FILE, found)


def read_checks(root: Path, scorer: Scorer) -> dict[str, Any]:
    """What scoring noted beside the scores: `rows`, `not_prefix`, `batched_vs_single`; empty where there is nothing."""
    path = root / scorer.key / CHECKS_FILE
    return dict(read_json(path)) if path.exists() else {}


def found_scores(rows: Dataset, references: list[str], root: Path, *, dtype: str) -> list[tuple[Scorer, list[Scores]]]:
    """For each reference, who scores and what the cache holds of the rows' chosen and rejected completions."""
    row_ids = normalise_rows(rows, "pairs")["row_id"]
    found = []
    for reference in references:
        scorer = text_scorer(reference, root, dtype=dtype)[0]
        cache = ScoreCache(root, scorer)
        found.append((scorer, [cache.lookup([text_key(row_id, side) for row_id in row_ids]) for side in SIDES]))
    return found


def cards_of(rows: Dataset, references: list[str], root: Path, *, dtype: str) -> list[HealthCard]:
    """Health cards of references from the cache, over the rows that all of them have scored.

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

    checks = [read_checks(root, scorer) for scorer in scorers]
    return health_cards(
        [scorer.name for scorer in scorers],
        logps=table("logps"),
        tokens=table("tokens"),
        num_bytes=table("bytes"),
        checks=checks,
    )
