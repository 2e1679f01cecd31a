"""The runs of a sweep: its grid, its list, and DPO against each reference alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from prefopt.pipelines.sweep_arguments import SweepArguments, slug
from prefopt.trainers.reference_data import short_names

# what says how references are combined; a single reference has none of it, so it is swept over the other keys only
COMBINING = frozenset(
    {
        "references", "mode", "weighting", "reference_weights", "clip_to_anchor", "max_exponent", "accuracy_temperature", "window",
        "window_reduce", "sampling_prior", "sampling_subset", "sampling_metric", "sampling_ties", "sampling_discount",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One setting, to be trained with every seed.

    Attributes:
        name: of its folder, unique.
        kind: "multi" or "single".
        settings: over the recipe.
        reference: of a single one.
    """

    name: str
    kind: str
    settings: Mapping[str, Any]
    reference: str | None = None


def every_run(args: SweepArguments, usable: list[str]) -> list[Run]:
    """Singles first (the baselines), then the grid, then the list; of the references only the usable ones.

    Raises:
        ValueError: two runs of one name, or one with fewer than two references.
    """
    runs = list(_singles(args, usable)) if args.baselines else []
    combined = _combinations(args.grid) if args.grid else []
    for name, settings in [*((_name(s), s) for s in combined), *args.runs.items()]:
        named = settings.get("references", usable)
        if len(named) < 2:
            raise ValueError(f"{name} has one reference: the baselines are DPO against each one, a run needs several.")
        chosen = [reference for reference in named if reference in usable]
        runs.append(Run(name, "multi", {**settings, "references": chosen}))
    names = [item.name for item in runs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"two runs are called {twice[0]!r}: name them differently.")
    return runs


def _singles(args: SweepArguments, usable: list[str]) -> Iterator[Run]:
    """DPO against each reference: all weight on it, so that rows and metrics are those of the other runs.

    With every setting of the grid and of the list that a single reference has too: a run whose beta only it has would be compared with
    another beta, not with another number of references.
    """
    others = _combinations({key: values for key, values in args.grid.items() if key not in COMBINING})
    for run in args.runs.values():
        own = {key: value for key, value in run.items() if key not in COMBINING}
        if own and own not in others:
            others.append(own)
    for settings in others:
        for k, (reference, short) in enumerate(zip(usable, short_names(usable))):
            one_hot = [1.0 if place == k else 0.0 for place in range(len(usable))]
            fixed = {"mode": "multi_dpo", "weighting": "fixed", "reference_weights": one_hot, "references": usable}
            fixed["clip_to_anchor"] = None  # which would change what the reference says
            name = ",".join([f"single={slug(short)}", *([_name(settings)] if settings else [])])
            yield Run(name, "single", {**settings, **fixed}, reference)


def named_references(settings: Mapping[str, Any]) -> Iterator[str]:
    """Every reference that a grid or a list of runs names."""
    lists = (
        settings.get("references", [])
        if "references" in settings
        else [run.get("references", []) for run in settings.values() if isinstance(run, dict)]
    )
    for names in lists:
        if not isinstance(names, list):
            raise ValueError(f"references must be lists of names, found {names!r}.")
        yield from map(str, names)


def _combinations(grid: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(grid, values)) for values in itertools.product(*grid.values())]


def _name(settings: Mapping[str, Any]) -> str:
    return ",".join(f"{key}={slug(value)}" for key, value in settings.items())
