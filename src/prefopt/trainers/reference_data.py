"""What DPO against several references asks of its data: whole scores, a held-out part, references that differ."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from prefopt.data.rows import REFERENCE_COLUMNS
from prefopt.references.cache import default_folder
from prefopt.references.columns import JoinReport, join_reference_scores
from prefopt.references.health import cards_table, health_cards
from prefopt.references.text import read_checks, text_scorer
from prefopt.references.weights import fixed_weights
from prefopt.trainers.multi_reference_config import MultiReferenceDPOConfig
from prefopt.trainers.reference_weighting import ReferenceTable

SMALL_SPREAD = 0.05  # nats; below it sigma(beta * margin) moves by about 1 % from one reference to another


def reference_spread(dataset: Dataset, *, beta: float, normalize: str) -> float:
    """Mean over pairs of the standard deviation over references of beta * (chosen - rejected), in the unit of the loss."""
    table = ReferenceTable.of(dataset, unit="byte" if normalize == "byte" else "token")
    chosen, rejected = (table.chosen, table.rejected) if normalize == "none" else table.means
    return float(beta * (chosen - rejected).std(dim=0, correction=0).mean())


def short_names(references: Sequence[str]) -> list[str]:
    """Last parts of the names where they differ, else the whole names."""
    short = [Path(name).name for name in references]
    return short if len(set(short)) == len(short) else list(references)


def with_scores(dataset: Dataset, args: MultiReferenceDPOConfig, name: str) -> tuple[Dataset, JoinReport | None]:
    """Tokenised pairs with the references' scores, from the cache unless they hold them already; checked, and said.

    Args:
        dataset: tokenised pairs, uncut.
        args: names the references and the cache.
        name: of the set; of "train" the references' health is looked at.

    Raises:
        ValueError: scores are missing or not usable, or a reference is quarantined.
    """
    report = checks = None
    if args.references is not None:
        root = Path(args.ref_logps_dir) if args.ref_logps_dir else default_folder()
        scorers = [text_scorer(reference, root, dtype=args.reference_dtype)[0] for reference in args.references]
        dataset, report = join_reference_scores(dataset, scorers, root, max_length=args.max_length, name=name)
        checks = [read_checks(root, scorer) for scorer in scorers]
        if args.process_index == 0:
            print(f"{name}: scores of {len(scorers)} references taken from {root}; {report}.", flush=True)
    check_scores(dataset, args, name)
    if name == "train":
        check_health(dataset, args, checks)
    return dataset, report


def check_scores(dataset: Dataset, args: MultiReferenceDPOConfig, name: str) -> None:
    """Refuse data whose scores are missing, not finite, or of another number of references."""
    for column in REFERENCE_COLUMNS:
        if column not in dataset.column_names:
            raise ValueError(
                f"The {name} data has no column {column!r}. Name the `references` and `ref_logps_dir`, or give data "
                "with their scores."
            )
        values = dataset[column]
        if not isinstance(values[0], list):
            raise ValueError(
                f"Column {column!r} of the {name} data must hold a list with one number for each reference."
            )
        count = len(args.references) if args.references else len(dataset[0]["ref_chosen_logps"])
        wrong = next((row for row, numbers in enumerate(values) if None in numbers or len(numbers) != count), None)
        if wrong is None:
            numbers = torch.tensor(values)
            fine = (torch.isfinite(numbers) & ((numbers > 0) | column.endswith("logps"))).all(dim=1)
            wrong = None if bool(fine.all()) else int((~fine).nonzero()[0])
        if wrong is not None:
            raise ValueError(
                f"Column {column!r} of the {name} data, row_id {dataset[wrong]['row_id']}: {values[wrong]} should be "
                f"{count} finite numbers" + (", above 0." if column.endswith("counts") else ".")
            )
    if args.reference_weights is not None:
        fixed_weights(args.reference_weights, count)


def hold_out_by_prompt(dataset: Dataset, rows: int, seed: int) -> tuple[Dataset, Dataset]:
    """The training rows and at least `rows` validation rows, no prompt in both."""
    if rows >= len(dataset):
        raise ValueError(
            f"`validation_rows` is {rows}, but the train set has {len(dataset)} rows: none would be left."
        )
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, prompt in enumerate(dataset["prompt_ids"]):
        groups.setdefault(tuple(prompt), []).append(row)
    members = list(groups.values())
    held: list[int] = []
    for number in torch.randperm(len(members), generator=torch.Generator().manual_seed(seed)).tolist():
        if len(held) >= rows:
            break
        held += members[number]
    kept = sorted(set(range(len(dataset))) - set(held))
    if not kept:
        raise ValueError(f"`validation_rows: {rows}` leaves no training rows, since rows of one prompt stay together.")
    return dataset.select(kept), dataset.select(sorted(held))


def check_health(dataset: Dataset, args: MultiReferenceDPOConfig, checks: Sequence[dict[str, Any]] | None) -> None:
    """Refuse references whose scores cannot be right, unless the recipe accepts them.

    Raises:
        ValueError: names each such reference and the reason.
    """
    table = ReferenceTable.of(dataset, unit="token")
    names = args.references or [str(k) for k in range(len(table.chosen))]
    cards = health_cards(
        names,
        logps=(table.chosen.numpy(), table.rejected.numpy()),
        tokens=(table.chosen_lengths.numpy(), table.rejected_lengths.numpy()),
        num_bytes=(np.array(dataset["chosen_bytes"]), np.array(dataset["rejected_bytes"])),
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
    """What will make the references matter less than the user may think."""
    advice = []
    if len(dataset[0]["ref_chosen_logps"]) > 1:
        spread = reference_spread(dataset, beta=args.beta, normalize=args.normalize)
        if spread < SMALL_SPREAD:
            other = " or set `normalize: none`" if args.normalize != "none" else ""
            advice.append(
                f"The references' margins times beta differ by only {spread:.3g} nats in the mean, so which "
                "references are used "
                f"will hardly matter; raise `beta`{other}."
            )
    if not has_anchor:
        advice.append(
            "The policy's own initial model is not among the references (`anchor`): its DPO is the baseline to beat."
        )
    if args.mode == "forward_kl":
        capped = (
            " On sums most pairs are beyond `max_exponent` and get no gradient." if args.normalize == "none" else ""
        )
        advice.append(f"`mode: forward_kl` is experimental.{capped}")
    if args.mode in ("harmonic", "arithmetic") and args.normalize != "byte":
        advice.append(
            f"`mode: {args.mode}` on scores that are not per byte follows one reference nearly alone (see "
            "references/harmonic_dominance)."
        )
    return advice
