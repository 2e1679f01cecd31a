"""The keys of `prefopt sweep`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from prefopt.files import content_hash

# what the sweep itself decides
OWN = frozenset(
    {"seed", "output_dir", "dataset_name", "eval_datasets", "validation_set", "do_eval", "anchor", "accept_outliers"}
)


def _setting(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class SweepArguments:
    """What is run: a recipe, a grid and a list of settings over it, seeds; and on which rows."""

    run_dir: str = _setting("", "Folder of the study: data, scores, runs, state, table.")
    recipe: str | None = _setting(None, "Recipe of multi-reference-dpo that every run starts from.")
    training: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "Settings over the recipe, for all runs; num_processes and accelerate_config too."},
    )
    grid: dict[str, list[Any]] = field(
        default_factory=dict,
        metadata={"help": "Key -> values; every combination is run: {mode: [multi_dpo, harmonic], beta: [0.1, 1]}."},
    )
    runs: dict[str, dict[str, Any]] = field(
        default_factory=dict, metadata={"help": "Further runs by name, each a mapping of settings."}
    )
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2, 3, 4], metadata={"help": "Each run is done with each seed."}
    )
    baselines: bool = _setting(
        True, "DPO against each reference alone too, with what grid and runs say that is not about combining them."
    )

    dataset_name: str = _setting("", "Where the rows come from: hub name, file or folder.")
    dataset_config: str | None = _setting(None, "Configuration of a hub data set.")
    dataset_split: str = _setting("train", "Split of it.")
    pool_rows: int = _setting(7000, "Rows drawn from those that pass the length filter.")
    pool_seed: int = _setting(858, "Seed of the draw.")
    length_percentile: float = _setting(2.5, "Prompts and replies at or below this percentile of length are left out.")
    train_rows: int = _setting(5000, "Rows of the pool that a seed trains on.")
    validation_rows: int = _setting(1000, "Rows for validation weights and for the choice of the best run.")
    test_rows: int = _setting(1000, "Rows that the verdict is about.")

    keep_models: bool = _setting(False, "Keep the weights of every run; without, its figures and logs only.")
    dry_run: bool = _setting(False, "Show the runs and which of them would be done; nothing is written.")

    def __post_init__(self) -> None:
        for name in ("run_dir", "dataset_name"):
            if not getattr(self, name):
                raise ValueError(f"{name} is missing: set it in the recipe or with --{name}.")
        if not self.grid and not self.runs:
            raise ValueError("nothing to compare with single references: give a `grid` or `runs`.")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"`seeds` must name at least one, and each once: {self.seeds}.")
        sizes = (self.train_rows, self.validation_rows, self.test_rows)
        if min(sizes) < 1 or sum(sizes) > self.pool_rows:
            raise ValueError(
                f"train, validation and test rows are {sizes}: each at least 1, together at most pool_rows {self.pool_rows}."
            )
        for place, settings in (
            ("training", self.training),
            ("grid", self.grid),
            *(("runs", run) for run in self.runs.values()),
        ):
            if clash := sorted(
                OWN & set(settings) - ({"anchor", "accept_outliers"} if place == "training" else set())
            ):
                raise ValueError(f"`{place}`: {clash[0]} is the sweep's own to set; remove it.")
        for name in self.runs:
            if name != slug(name):
                raise ValueError(f"`runs`: {name!r} names a folder: use letters, digits and . _ + - only.")
        for key, values in self.grid.items():
            if not isinstance(values, list) or not values:
                raise ValueError(f"`grid`: {key} needs a list of values, found {values!r}.")


def slug(value: Any) -> str:
    """A value as a part of a file's name."""
    if isinstance(value, (list, dict)):
        return f"{len(value)}-{content_hash(value)[:6]}"
    return "".join(c if c.isalnum() or c in "._+-" else "-" for c in str(value))
