"""What an experiment is: a design, units of work on seed 0 and on further seeds, claims, a table and a figure."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from benchmarks.study.lab import Lab, Missing
from benchmarks.study.results import Row
from benchmarks.study.statistics import Claim

SMALLEST = 0.03
"""Smallest difference of true reward that would matter, on a scale on which the start has about 0 and the best 1."""


class Experiment(ABC):
    """An experiment. Hyperparameters are chosen on seed 0; claims are about `seeds` further ones.

    Attributes:
        first_seed: of the further ones; above 1 where earlier ones had been seen when something was changed.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    seeds: ClassVar[int]
    first_seed: ClassVar[int] = 1
    design: ClassVar[str]
    reading: ClassVar[str]
    real_scale: ClassVar[str]

    @abstractmethod
    def choose(self, lab: Lab) -> Any:
        """Run the units of seed 0 and return the hyperparameters that they decide."""

    @abstractmethod
    def run_seed(self, lab: Lab, chosen: Any, seed: int) -> None:
        """Run the units of one further seed."""

    @abstractmethod
    def claims(self, rows: Sequence[Row], chosen: Any) -> list[Claim]:
        """Return the claims with what the rows of seeds 1 and up say."""

    @abstractmethod
    def tables(self, rows: Sequence[Row]) -> list[str]:
        """Return the lines of the experiment's table: means over seeds, KL and length beside every score."""

    @abstractmethod
    def draw(self, axes: Any, rows: Sequence[Row]) -> None:
        """Draw the experiment's figure."""

    @abstractmethod
    def check(self, rows: Sequence[Row]) -> None:
        """Assert what two seeds can show, for `--quick`."""

    def planned(self, limit: int | None = None) -> range:
        """Return the seeds beside seed 0: all, or the first `limit`."""
        count = self.seeds if limit is None else min(self.seeds, limit)
        return range(self.first_seed, self.first_seed + count)

    def read(self, lab: Lab) -> tuple[Any, list[Row]]:
        """Read what is recorded: what seed 0 decided (None where that is missing), and the units of all seeds."""
        begin = len(lab.visited)
        chosen = None
        with contextlib.suppress(Missing):
            chosen = self.choose(lab)
            for seed in self.planned(lab.seeds):
                with contextlib.suppress(Missing):
                    self.run_seed(lab, chosen, seed)
        return chosen, lab.visited[begin:]

    def unit(self, lab: Lab, stage: str, seed: int, work: Callable[[], Row], **settings: Any) -> Row:
        """Run or read one unit of this experiment."""
        return lab.unit({"experiment": self.name, "stage": stage, "seed": seed, **settings}, work)


def measured(rows: Sequence[Row]) -> list[Row]:
    """Return the rows that claims are about: seeds 1 and up."""
    return [row for row in rows if row["settings"]["stage"] == "measure"]


def by_seed(rows: Sequence[Row], metric: str | Callable[[Row], float], **variant: Any) -> dict[int, float]:
    """Collect seed -> metric of the measured rows with these settings."""
    get = (lambda row: row["outcome"][metric]) if isinstance(metric, str) else metric
    return {
        row["settings"]["seed"]: get(row)
        for row in measured(rows)
        if all(row["settings"].get(name) == value for name, value in variant.items())
    }


def grouped(rows: Sequence[Row], *names: str) -> dict[tuple[Any, ...], list[Row]]:
    """Group the measured rows by the values of these settings, in order of appearance."""
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in measured(rows):
        groups[tuple(row["settings"].get(name) for name in names)].append(row)
    return dict(groups)


def mean(rows: Sequence[Row], metric: str) -> float:
    """Average a metric over rows."""
    return sum(row["outcome"][metric] for row in rows) / len(rows)


def best(rows: Sequence[Row], metric: str = "reward", *, within: float = SMALLEST) -> Row:
    """Choose on seed 0: of the rows within `within` of the largest metric, the one that moves the policy least.

    One seed cannot order settings that are closer than that, and taking the very best of it favours those that moved
    far and were lucky. Without a KL (preference models) the first of them is taken.
    """
    top = max(row["outcome"][metric] for row in rows)
    close = [row for row in rows if row["outcome"][metric] >= top - within]
    return min(close, key=lambda row: row["outcome"].get("kl", 0.0))
