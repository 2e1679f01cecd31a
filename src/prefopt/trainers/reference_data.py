"""The data of DPO against several references: scores attached and checked, a held-out part, advice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from prefopt.data.holdout import fill_with_prompts, prompt_name
from prefopt.data.rows import REFERENCE_COLUMNS
from prefopt.references.cache import SIDES, Scorer, default_folder
from prefopt.references.columns import JoinReport, join_reference_scores
from prefopt.references.health import cards_table, health_cards
from prefopt.references.text import read_checks, text_scorer
from prefopt.references.weights import fixed_weights
from prefopt.trainers.base import TRAINING
from prefopt.trainers.multi_reference_config import MultiReferenceDPOConfig
from prefopt.trainers.reference import is_number
from prefopt.trainers.reference_weighting import ReferenceTable

SMALL_SPREAD = 0.05  # nats; below it sigma(beta * margin) moves by about 1 % from one reference to another


def reference_spread(dataset: Dataset, *, beta: float, normalize: str) -> float:
    """Compute the mean over pairs of the standard deviation over references of beta times the loss's margin."""
    table = ReferenceTable.of(dataset, unit="byte" if normalize == "byte" else "token")
    chosen, rejected = table.sums if normalize == "none" else table.means
    return float(beta * (chosen - rejected).std(dim=0, correction=0).mean())


def reference_names(args: MultiReferenceDPOConfig, num_references: int) -> list[str]:
    """Return the names of the references; their numbers where the data brought its scores along."""
    return args.references or [str(k) for k in range(num_references)]


def short_names(references: Sequence[str]) -> list[str]:
    """Return the last parts of the names where they differ, else the whole names."""
    short = [Path(name).name for name in references]
    return short if len(set(short)) == len(short) else list(references)


def score_folder(args: MultiReferenceDPOConfig) -> Path:
    """Return the folder of the score cache."""
    return Path(args.ref_logps_dir) if args.ref_logps_dir else default_folder()


def scorers_of(args: MultiReferenceDPOConfig) -> list[Scorer]:
    """Return the references' identities in the cache: weights, tokenizer, template and dtype."""
    root = score_folder(args)
    return [text_scorer(name, root, dtype=args.reference_dtype)[0] for name in args.references or ()]


def with_scores(dataset: Dataset, args: MultiReferenceDPOConfig, name: str) -> tuple[Dataset, JoinReport | None]:
    """Attach the references' scores to tokenised pairs (from the cache where `references` are named) and check them.

    Args:
        dataset: tokenised pairs, uncut.
        args: names the references and the cache.
        name: of the set; the references' health is checked on the training set.

    Raises:
        ValueError: scores are missing or not usable, or a reference is quarantined.
    """
    report = checks = None
    if args.references is not None:
        root, scorers = score_folder(args), scorers_of(args)
        dataset, report = join_reference_scores(dataset, scorers, root, max_length=args.max_length, name=name)
        checks = [read_checks(root, scorer) for scorer in scorers]
        if args.process_index == 0:
            print(f"{name}: scores of {len(scorers)} references taken from {root}; {report}.", flush=True)
    check_scores(dataset, args, name)
    if name == TRAINING:
        check_health(dataset, args, checks)
    return dataset, report


def check_scores(dataset: Dataset, args: MultiReferenceDPOConfig, name: str) -> None:
    """Raise where scores are missing, not finite, or of another number of references."""
    count = len(args.references or ())
    for column in REFERENCE_COLUMNS:
        if column not in dataset.column_names:
            raise ValueError(
                f"The {name} data has no column {column!r}. Name the `references` and `ref_logps_dir`, or give data "
                "with their scores."
            )
        values = list(dataset[column])
        if not isinstance(values[0], list) or not values[0]:
            raise ValueError(
                f"Column {column!r} of the {name} data must hold a list with one number for each reference."
            )
        count = count or len(values[0])  # without names, of the first row
        least = 0.0 if column.endswith("counts") else -math.inf
        wrong = next((row for row, numbers in enumerate(values) if not _are_numbers(numbers, count, least)), None)
        if wrong is not None:
            raise ValueError(
                f"Column {column!r} of the {name} data, row_id {dataset[wrong]['row_id']}: {values[wrong]} should be "
                f"{count} finite numbers" + (", above 0." if least == 0 else ".")
            )
    if args.reference_weights is not None:
        fixed_weights(args.reference_weights, count)


def _are_numbers(values: Any, count: int, least: float) -> bool:
    right = isinstance(values, list) and len(values) == count
    return right and all(is_number(each) and least < each < math.inf for each in values)


def hold_out_by_prompt(
    dataset: Dataset, rows: int, seed: int, tokenizer: PreTrainedTokenizerBase | None = None
) -> tuple[Dataset, Dataset]:
    """Split tokenised rows into training rows and at least `rows` validation rows, no prompt in both."""
    if rows >= len(dataset):
        raise ValueError(
            f"`validation_rows` is {rows}, but the train set has {len(dataset)} rows: none would be left."
        )
    prompts = [prompt_name({"prompt_ids": ids}, tokenizer).same for ids in dataset["prompt_ids"]]
    different = list(dict.fromkeys(prompts))
    order = torch.randperm(len(different), generator=torch.Generator().manual_seed(seed)).tolist()
    (held,) = fill_with_prompts(prompts, [rows], [different[number] for number in order])
    kept = sorted(set(range(len(dataset))) - set(held))
    if not kept:
        raise ValueError(f"`validation_rows: {rows}` leaves no training rows, since rows of one prompt stay together.")
    return dataset.select(kept), dataset.select(sorted(held))


def check_health(dataset: Dataset, args: MultiReferenceDPOConfig, checks: Sequence[dict[str, Any]] | None) -> None:
    """Print the references' health cards and raise where a score cannot be right, unless `accept_outliers` is set.

    Raises:
        ValueError: names each such reference and the reason.
    """
    table = ReferenceTable.of(dataset, unit="token")
    sizes = [np.array(dataset[f"{side}_bytes"]) for side in SIDES]
    cards = health_cards(
        reference_names(args, table.sums.shape[1]),
        logps=(table.sums[0].numpy(), table.sums[1].numpy()),
        tokens=(table.lengths[0].numpy(), table.lengths[1].numpy()),
        num_bytes=(sizes[0], sizes[1]),
        checks=checks,
    )
    if args.process_index == 0:
        print(cards_table(cards), flush=True)
    bad = [f"{card.name} ({card.quarantine})" for card in cards if card.quarantine]
    if bad and not args.accept_outliers:
        raise ValueError(
            f"Quarantined: {'; '.join(bad)}. Take it out of `references` or score it again; `accept_outliers: true` "
            "trains with it."
        )


def advise(dataset: Dataset, args: MultiReferenceDPOConfig, *, has_anchor: bool) -> list[str]:
    """Return warnings about settings with which the references matter less than the user may think."""
    advice = []
    if len(dataset[0]["ref_chosen_logps"]) > 1:
        spread = reference_spread(dataset, beta=args.beta, normalize=args.normalize)
        if spread < SMALL_SPREAD:
            other = " or set `normalize: none`" if args.normalize != "none" else ""
            advice.append(
                f"The references' margins times beta differ by only {spread:.3g} nats in the mean, so which "
                f"references are used will hardly matter; raise `beta`{other}."
            )
    if not has_anchor:
        advice.append(
            "The policy's own initial model is not among the references (`anchor`): its DPO is the baseline to beat."
        )
    if args.mode == "forward_kl":
        capped = " On sums most pairs are beyond `max_exponent` and get no gradient."
        advice.append(f"`mode: forward_kl` is experimental.{capped if args.normalize == 'none' else ''}")
    if args.mode in ("harmonic", "arithmetic") and args.normalize != "byte":
        advice.append(
            f"`mode: {args.mode}` on scores that are not per byte follows one reference nearly alone (see "
            "references/harmonic_dominance)."
        )
    return advice
