"""What the runs of a sweep say together: read from its folder, compared within seeds, concluded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from prefopt.evaluation.verdict import (
    HELPS,
    Difference,
    Influence,
    chosen_on_validation,
    influence,
    paired_difference,
    sentence,
)
from prefopt.files import read_json
from prefopt.references.health import HealthCard

STUDY_FILE, HEALTH_FILE, RESULT_FILE = "study.json", "health.json", "eval_results.json"
METRIC = "accuracies/reference_free"
OWN_INIT = "accuracies/own_init"
CHOSEN = "logps/chosen"


@dataclass
class StudyRun:
    """One setting with the seeds that are done.

    Attributes:
        name: of the run.
        reference: of a single one, else None.
        test, validation: seed -> share of pairs whose chosen answer the policy finds likelier per token.
        own_init: seed -> share of test pairs whose margin has grown beyond the initial model's.
        chosen_logps: seed -> mean log-prob of the chosen test answers, in the unit of `normalize`: far below the baselines', the policy is
            damaged, whatever its accuracies.
        influences: of each seed's training.
    """

    name: str
    reference: str | None
    test: dict[int, float] = field(default_factory=dict)
    validation: dict[int, float] = field(default_factory=dict)
    own_init: dict[int, float] = field(default_factory=dict)
    chosen_logps: dict[int, float] = field(default_factory=dict)
    influences: list[Influence] = field(default_factory=list)

    def mean_influence(self, name: str) -> float:
        """Mean over seeds of one measure; NaN where nothing was logged."""
        values = [getattr(found, name) for found in self.influences]
        return float(np.mean(values)) if values else float("nan")


@dataclass(frozen=True)
class Study:
    """A sweep's runs, read from its folder."""

    policy: str
    anchor: str
    health: list[HealthCard]
    seeds: list[int]
    runs: list[StudyRun]

    @property
    def multi(self) -> list[StudyRun]:
        """The runs with several references, of which some seed is done."""
        return [run for run in self.runs if run.reference is None and run.test]

    @property
    def single(self) -> list[StudyRun]:
        """The baselines of which some seed is done."""
        return [run for run in self.runs if run.reference is not None and run.test]

    @property
    def own(self) -> list[StudyRun]:
        """Of these, the runs against the policy's own initial model."""
        return [run for run in self.single if run.reference == self.anchor]


@dataclass(frozen=True)
class Verdict:
    """What the study says in the end.

    Attributes:
        lines: in words; the first two are the verdict.
        minus_single, minus_own: of the multi-reference run that validation chooses; None without such runs.
        per_run: run -> the same two differences.
        chosen: "multi", "single" -> seed -> the run that validation chooses.
    """

    lines: list[str]
    minus_single: Difference | None
    minus_own: Difference | None
    per_run: dict[str, tuple[Difference | None, Difference | None]]
    chosen: dict[str, dict[int, str]]


def read_study(run_dir: Path) -> Study:
    """The study in a sweep's folder, with whatever is done.

    Raises:
        ValueError: no sweep has been there, or none of its runs is done.
    """
    if not (run_dir / STUDY_FILE).is_file():
        raise ValueError(f"{run_dir} is no study: it has no {STUDY_FILE} (`prefopt sweep` writes one).")
    told = read_json(run_dir / STUDY_FILE)
    cards = [HealthCard(**{**card, "remarks": tuple(card["remarks"])}) for card in read_json(run_dir / HEALTH_FILE)]
    runs = [_read_run(run_dir / "runs" / run["name"], run, told["seeds"]) for run in told["runs"]]
    study = Study(told["policy"], told["anchor"], cards, told["seeds"], runs)
    if not study.multi and not study.single:
        raise ValueError(f"{run_dir}: no run of this study is done yet.")
    return study


def _read_run(folder: Path, told: Mapping[str, Any], seeds: Sequence[int]) -> StudyRun:
    run = StudyRun(told["name"], told["reference"])
    for seed in seeds:
        place = folder / f"seed-{seed}"
        if not (place / RESULT_FILE).is_file():
            continue
        found = read_json(place / RESULT_FILE)
        run.validation[seed], run.test[seed] = (found[f"eval_{part}_{METRIC}"] for part in ("validation", "test"))
        for name, values in ((OWN_INIT, run.own_init), (CHOSEN, run.chosen_logps)):
            if f"eval_test_{name}" in found:
                values[seed] = found[f"eval_test_{name}"]
        state = place / "trainer_state.json"
        acted = influence(read_json(state)["log_history"]) if state.is_file() else None
        run.influences += [acted] if acted is not None else []
    return run


def conclude(study: Study) -> Verdict:
    """The verdict: several references, as validation would choose them, against the best single one and against the own initial model.

    Seeds that some run has not finished are left out of a choice among the runs.
    """
    best, names = _chosen(study.single)
    own, _ = _chosen(study.own)
    multi, chosen = _chosen(study.multi)
    per_run = {run.name: (_minus(run.test, best), _minus(run.test, own)) for run in study.multi}
    minus_single, minus_own = _minus(multi, best), _minus(multi, own)
    lines = []
    for against, difference in (("best single", minus_single), ("own initialisation", minus_own)):
        if difference is None:
            lines.append(f"multi-reference minus {against}: unknown, as no seed has both.")
        else:
            lines.append(sentence(against, difference))
    lines.append(_advice(minus_single, names, len(per_run)))
    return Verdict(lines, minus_single, minus_own, per_run, {"multi": chosen, "single": names})


def _chosen(runs: Sequence[StudyRun]) -> tuple[dict[int, float], dict[int, str]]:
    try:
        return chosen_on_validation({run.name: run.validation for run in runs}, {run.name: run.test for run in runs})
    except ValueError:  # nothing is done yet, or no seed by all
        return {}, {}


def _minus(mine: Mapping[int, float], theirs: Mapping[int, float]) -> Difference | None:
    return paired_difference(mine, theirs) if set(mine) & set(theirs) else None


def _advice(minus_single: Difference | None, names: Mapping[int, str], settings: int) -> str:
    if minus_single is None or not names:
        return "No recommendation yet."
    counts = {name: list(names.values()).count(name) for name in names.values()}
    favourite = max(counts, key=lambda name: counts[name])
    if minus_single.verdict == HELPS:
        return "Recommendation: several references, with the setting that validation chooses."
    tried = (
        f" (of {settings} settings about {0.05 * settings:.1f} look better or worse than they are)"
        if settings > 1
        else ""
    )
    return f"Recommendation: a single reference, {favourite}; nothing here says that several are worth their scoring{tried}."
