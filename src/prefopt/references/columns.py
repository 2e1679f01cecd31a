"""From the score cache to the columns that training reads: `ref_chosen_logps`, ... beside the tokenised pairs.

Two ways in. A reference of any family scored the *text*: its records are found by the row's identity and joined as
lists of K numbers. The policy's own initial model scored the policy's *token ids*: its records are found by the ids,
and what is missing is scored on the spot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from datasets import Dataset
from torch import nn
from transformers import PretrainedConfig

from prefopt.references.cache import SIDES, UNSCORABLE, ScoreCache, Scorer, Scores, explain_missing, ids_key, text_keys
from prefopt.references.filling import ScoreGroups, fill, on_all_ranks, pair_lengths, shared_lookup, unscored_groups
from prefopt.references.fingerprints import module_fingerprint


def token_scorer(
    model: nn.Module,
    config: PretrainedConfig,
    *,
    name: str,
    dtype: str,
    adapter: str | None = None,
    quantization: str = "",
) -> Scorer:
    """Return the cache's name for the policy's initial model as the scorer of its own token ids; all ranks call it.

    Args:
        model: with the weights that score, wrapped or not.
        config: the base model's.
        name: for people.
        dtype: of the weights, and of the computation where autocast makes it another ("float32/bfloat16").
        adapter: an adapter that is on while it scores.
        quantization: such as "bnb-nf4".
    """
    weights = module_fingerprint(model, config, adapter=adapter)
    return Scorer(name, weights, tokenizer="", dtype=dtype, quantization=quantization)


def cached_reference_scores(
    dataset: Dataset,
    score: ScoreGroups,
    scorer: Scorer,
    root: str | Path,
    *,
    max_tokens: int,
    padded: bool,
    show_progress: bool = True,
) -> tuple[Dataset, int]:
    """Attach `ref_chosen_logps` and `ref_rejected_logps` of one reference that reads the policy's token ids.

    All ranks call it with the same data. What the cache holds is read; the rest is scored by all ranks and kept.

    Args:
        dataset: tokenised pairs.
        score: one forward of the reference (`filling.group_scorer`); not called where nothing is missing.
        scorer: who scores, with everything that alters a score.
        root: folder of the cache.
        max_tokens: tokens of one forward.
        padded: whether the forward is padded (tokens count per completion) or packed (a prompt counts once).
        show_progress: on the main process, with rate and time left.

    Returns:
        The data set with both columns (float32 values), and how many completions had to be scored.

    Raises:
        ValueError: a damaged cache, a folder that nodes do not share, or a score that is not finite.
    """
    cache = ScoreCache(root, scorer)
    parts = ("ids", "bytes", "skipped") if "chosen_skipped" in dataset.column_names else ("ids", "bytes")
    columns = [zip(dataset["prompt_ids"], *(dataset[f"{side}_{part}"] for part in parts)) for side in SIDES]
    keys = [[ids_key(*row) for row in side] for side in columns]
    unscored = [~shared_lookup(cache, side).found for side in keys]
    if groups := unscored_groups(dataset, keys, unscored):
        on_all_ranks(lambda: cache.check_writable(2 * len(groups)))
        fill(cache, groups, score, max_tokens=max_tokens, padded=padded, show_progress=show_progress)
    for side, side_keys in zip(SIDES, keys):
        name = f"ref_{side}_logps"
        if name in dataset.column_names:
            dataset = dataset.remove_columns(name)
        dataset = dataset.add_column(name, shared_lookup(cache, side_keys, just_written=True).logps)
    return dataset, sum(len(group.keys) for group in groups)


@dataclass
class JoinReport:
    """Counts of rows kept and dropped when K references' scores were joined.

    Attributes:
        rows_in: rows before.
        rows_kept: rows that every model has scored whole.
        too_long: for each model, rows that it would have had to cut (a row may count for several).
    """

    rows_in: int
    rows_kept: int
    too_long: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        dropped = "; ".join(f"{count} too long for {name}" for name, count in self.too_long.items() if count)
        return f"{self.rows_kept} of {self.rows_in} rows have whole scores" + (f" ({dropped})" if dropped else "")


def join_reference_scores(
    dataset: Dataset, scorers: Sequence[Scorer], root: str | Path, *, max_length: int | None, name: str = "train"
) -> tuple[Dataset, JoinReport]:
    """Attach lists of K scores and token counts to tokenised pairs; drop the rows that any model would truncate.

    Args:
        dataset: tokenised pairs, uncut, with the `row_id` that tokenisation gave them.
        scorers: the K references, in order.
        root: folder of the cache.
        max_length: tokens of prompt and completion together, in every model's own tokens (the policy's included).
        name: what messages call this set.

    Returns:
        The data set with `ref_chosen_logps`, `ref_rejected_logps`, `ref_chosen_counts`, `ref_rejected_counts`, each a
        list of K numbers a row; and the report.

    Raises:
        ValueError: a reference has no scores, or not for all rows; the message says which, how many and why.
    """
    limit = np.inf if max_length is None else max_length
    usable = pair_lengths(dataset).max(axis=0) <= limit
    report = JoinReport(len(dataset), 0, {"the policy": int((~usable).sum())})
    columns: dict[str, list[np.ndarray]] = {}
    for scorer in scorers:
        sides = _scores_of(dataset, scorer, root, name)
        fits = np.ones(len(dataset), np.bool_)
        for side, scores in zip(SIDES, sides):
            _check_notes(scorer, scores, limit, name)
            fits &= ~scores.truncated & (scores.length <= limit)
            columns.setdefault(f"ref_{side}_logps", []).append(scores.logps)
            columns.setdefault(f"ref_{side}_counts", []).append(scores.tokens.astype(np.float32))
        report.too_long[scorer.name] = int((~fits).sum())
        usable &= fits
    report.rows_kept = int(usable.sum())
    if not report.rows_kept:
        raise ValueError(f"No row of the {name} set is left: {report}. Raise `max_length`.")
    dataset = dataset.remove_columns([column for column in columns if column in dataset.column_names])
    dataset = dataset.select(np.flatnonzero(usable))
    for column, values in columns.items():
        dataset = dataset.add_column(column, list(np.stack(values, axis=1)[usable]))
    return dataset, report


def _scores_of(dataset: Dataset, scorer: Scorer, root: str | Path, name: str) -> list[Scores]:
    cache = ScoreCache(root, scorer)
    if not len(cache):
        raise ValueError(
            f"{root} has no scores of the reference {scorer.name}: {explain_missing(root, scorer)}. "
            "Run `prefopt score-references` with this recipe."
        )
    sides = [cache.lookup(keys) for keys in text_keys(dataset["row_id"])]
    missing = ~(sides[0].found & sides[1].found)
    if missing.any():
        first = dataset["row_id"][int(missing.argmax())]
        raise ValueError(
            f"The reference {scorer.name} has no scores for {int(missing.sum())} of {len(dataset)} rows of the {name} "
            f"set (the first: row_id {first}). Run `prefopt score-references` with this recipe: it scores only those."
        )
    return sides


def _check_notes(scorer: Scorer, scores: Scores, limit: float, name: str) -> None:
    """Raise where a text is noted as too long for an earlier limit and fits this one."""
    stale = scores.truncated & (scores.length <= limit) & (scores.length < UNSCORABLE)
    if stale.any():
        raise ValueError(
            f"{int(stale.sum())} completions of the {name} set were too long for the limit under which {scorer.name} "
            "was scored, and fit now. Run `prefopt score-references` with this recipe: it scores only those."
        )
