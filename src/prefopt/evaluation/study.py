"""A multi-reference study: the runs of a sweep compared within seeds, a verdict, a page and figures."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from prefopt import pages
from prefopt.files import atomic_path, read_json, write_json, write_text
from prefopt.intervals import bootstrap_interval, t_interval
from prefopt.launch import print_on_main
from prefopt.references.health import HealthCard, cards_table

HELPS, NO_EVIDENCE, HURTS = "helps", "no evidence", "hurts"
MANY_SEEDS = 30  # from here on the interval is a bootstrap's, which assumes no shape
RESAMPLES = 10_000
SAME = 1e-9  # differences closer than this are equal: rounding
INFLUENCES = ("spread", "effective_number", "harmonic_dominance")  # logged as references/...
WEIGHT_METRIC = "references/weight/"
STUDY_FILE, HEALTH_FILE, RESULT_FILE = "study.json", "health.json", "eval_results.json"
TABLE_FILE, ROWS_FILE, VERDICT_FILE, PICTURE = "table.md", "table.csv", "verdict.json", "study.png"
METRIC = "accuracies/reference_free"
OWN_INIT = "accuracies/own_init"
CHOSEN = "logps/chosen"
BASELINES = ("minus best single", "minus own init")
_LEGEND = """Accuracy: test pairs whose chosen answer the policy finds likelier per token, without a reference; mean \
over seeds. Differences are paired within seeds, with 95 % intervals; "best single" and the run in the verdict are \
chosen within each seed on its validation rows. Own-init accuracy: test pairs whose margin has grown beyond the \
initial model's. Chosen log-prob: mean over the chosen test answers, in the unit of `normalize`; far below the \
others, the policy is damaged. Spread: standard deviation over references of beta times the margin, nats."""
Result = Mapping[int, float]
"""Seed -> metric."""


@dataclass(frozen=True)
class Difference:
    """One result minus another, over the seeds that both have.

    Attributes:
        mean: of the differences, in the unit of the metric.
        low, high: ends of its interval; infinite where the seeds say nothing about the spread.
        interval: "t", "bootstrap", or "none" (one seed, or the same difference in every one: accuracies are multiples
            of one pair, so two or three seeds may well agree by chance, and an interval without width would call that
            evidence).
        seeds: S.
    """

    mean: float
    low: float
    high: float
    interval: str
    seeds: int

    @property
    def verdict(self) -> str:
        """Call it "helps" where the whole interval is above 0, "hurts" where it is below, else "no evidence"."""
        return HELPS if self.low > 0 else HURTS if self.high < 0 else NO_EVIDENCE

    def __str__(self) -> str:
        reach = "no interval" if self.interval == "none" else f"[{self.low:+.4f}, {self.high:+.4f}]"
        return f"{self.mean:+.4f} {reach}"


def paired_difference(mine: Result, theirs: Result, *, confidence: float = 0.95, seed: int = 0) -> Difference:
    """Compute the mean of d_s = mine_s - theirs_s with an interval.

    S < 30: mean -+ t_{S-1} sd(d) / sqrt(S); S >= 30: percentiles of the mean under resampling of the seeds.

    Args:
        mine: seed -> metric.
        theirs: the same of the other runs.
        confidence: of the interval, between 0 and 1.
        seed: of the resampling.

    Raises:
        ValueError: no seed in common, or a metric that is not finite.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, not {confidence}.")
    common = sorted(set(mine) & set(theirs))
    if not common:
        raise ValueError(f"no seed in common: {sorted(mine)} and {sorted(theirs)}.")
    values = np.array([mine[s] - theirs[s] for s in common], dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError(f"a metric of the seeds {common} is not finite.")
    mean, count = float(values.mean()), len(values)
    if np.ptp(values) < SAME:
        return Difference(mean, -math.inf, math.inf, "none", count)
    if count >= MANY_SEEDS:
        low, high = bootstrap_interval(values, confidence=confidence, resamples=RESAMPLES, seed=seed)
        return Difference(mean, low, high, "bootstrap", count)
    return Difference(mean, *t_interval(values, confidence=confidence), "t", count)


def chosen_on_validation(
    validation: Mapping[str, Result], test: Mapping[str, Result]
) -> tuple[dict[int, float], dict[int, str]]:
    """Choose for each seed the candidate with the best validation metric, and return what it reaches on test.

    The choice is made within a seed, because other seeds' validation rows may be this seed's test rows. The first of
    equals wins.

    Args:
        validation: candidate -> seed -> metric.
        test: the same on test rows.

    Returns:
        Seed -> test metric of the chosen candidate, and seed -> its name; only seeds that all candidates have
        finished.

    Raises:
        ValueError: no candidate, or no seed that all of them have.
    """
    if not validation:
        raise ValueError("there is no run to choose from.")
    seeds = set.intersection(*(set(validation[name]) & set(test.get(name, {})) for name in validation))
    if not seeds:
        raise ValueError(f"no seed was finished by all of {', '.join(validation)}.")
    names = {}
    for seed in sorted(seeds):
        metrics = {name: found[seed] for name, found in validation.items()}
        names[seed] = max(metrics, key=lambda name: metrics[name])
    return {seed: test[name][seed] for seed, name in names.items()}, names


def sentence(against: str, difference: Difference, *, confidence: float = 0.95) -> str:
    """Write a verdict: "multi-reference minus own init: +0.0120 [+0.0010, +0.0230] (95 % t over 5 seeds): helps"."""
    basis = f"{confidence:.0%} {difference.interval} over {difference.seeds} seeds"
    if difference.interval == "none":
        basis = "1 seed" if difference.seeds == 1 else f"the same in {difference.seeds} seeds"
    return f"multi-reference minus {against}: {difference} ({basis}): {difference.verdict}"


@dataclass(frozen=True)
class Influence:
    """How much the references acted in a run, means over its logged steps.

    Attributes:
        spread: standard deviation over references of beta times the margin, nats; near 0 nobody can tell which
            reference was used.
        effective_number: exp of the weights' entropy, 1 to K.
        harmonic_dominance: share of completions of which one reference makes up more than 99 % of the harmonic mean.
        weights: reference -> mean weight.
    """

    spread: float
    effective_number: float
    harmonic_dominance: float
    weights: Mapping[str, float]


def influence(log: Sequence[Mapping[str, float]]) -> Influence | None:
    """Compute the influence of the references from a trainer's log entries; None where none was logged."""
    entries = [entry for entry in log if f"references/{INFLUENCES[0]}" in entry]
    if not entries:
        return None

    def mean(key: str) -> float:
        return float(np.mean([entry[key] for entry in entries]))

    weights = {key.removeprefix(WEIGHT_METRIC): mean(key) for key in entries[0] if key.startswith(WEIGHT_METRIC)}
    return Influence(**{name: mean(f"references/{name}") for name in INFLUENCES}, weights=weights)


@dataclass
class StudyRun:
    """One setting with the seeds that are done.

    Attributes:
        name: of the run.
        reference: of a single one, else None.
        test, validation: seed -> share of pairs whose chosen answer the policy finds likelier per token.
        own_init: seed -> share of test pairs whose margin has grown beyond the initial model's.
        chosen_logps: seed -> mean log-prob of the chosen test answers, in the unit of `normalize`: far below the
            baselines', the policy is damaged, whatever its accuracies.
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
        """Return the mean over seeds of one measure; NaN where nothing was logged."""
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
        """Those of them that are against the policy's own initial model."""
        return [run for run in self.single if run.reference == self.anchor]


@dataclass(frozen=True)
class Verdict:
    """Conclusion of a study.

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
    """Read the study in a sweep's folder, with the runs that are done.

    Raises:
        ValueError: the folder is no sweep's, or none of its runs is done.
    """
    if not (run_dir / STUDY_FILE).is_file():
        raise ValueError(f"{run_dir} is no study: it has no {STUDY_FILE} (`prefopt sweep` writes one).")
    saved = read_json(run_dir / STUDY_FILE)
    cards = [HealthCard(**{**card, "remarks": tuple(card["remarks"])}) for card in read_json(run_dir / HEALTH_FILE)]
    runs = [_read_run(run_dir / "runs" / run["name"], run, saved["seeds"]) for run in saved["runs"]]
    study = Study(saved["policy"], saved["anchor"], cards, saved["seeds"], runs)
    if not study.multi and not study.single:
        raise ValueError(f"{run_dir}: no run of this study is done yet.")
    return study


def _read_run(folder: Path, saved: Mapping[str, Any], seeds: Sequence[int]) -> StudyRun:
    run = StudyRun(saved["name"], saved["reference"])
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
    """Compare several references, as validation would choose them, with the best single one and the own initial model.

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
    """Recommend several references or a single one; `names` are the singles that validation chooses."""
    if minus_single is None or not names:
        return "No recommendation yet."
    if minus_single.verdict == HELPS:
        return "Recommendation: several references, with the setting that validation chooses."
    favourite = max(names.values(), key=list(names.values()).count)
    by_chance = f" (of {settings} settings about {0.05 * settings:.1f} look better or worse than they are)"
    return (
        f"Recommendation: a single reference, {favourite}; nothing here says that several are worth their "
        f"scoring{by_chance if settings > 1 else ''}."
    )


def report_study(run_dir: Path, *, plots: bool = True) -> Verdict:
    """Print the verdict and write table.md, table.csv, verdict.json and study.png beside the runs.

    Raises:
        ValueError: see `read_study`.
    """
    study = read_study(run_dir)
    verdict = conclude(study)
    drawn = plots and draw(run_dir / PICTURE, study, verdict)
    page = study_page(study, verdict, picture=PICTURE if drawn else None)
    write_text(run_dir / TABLE_FILE, page)
    write_text(run_dir / ROWS_FILE, rows_csv(study))
    write_json(run_dir / VERDICT_FILE, _plain(verdict))
    print(pages.printable(cards_table(study.health)))
    print(
        "\n".join(["", *runs_table(study, verdict), "", *verdict.lines, f"study: {run_dir / TABLE_FILE}"]), flush=True
    )
    return verdict


def _plain(verdict: Verdict) -> dict[str, Any]:
    """Return the verdict as JSON values."""

    def pair(*found: Difference | None) -> dict[str, Any]:
        values = []
        for each in found:
            ends = {"low": None, "high": None} if each and each.interval == "none" else {}  # JSON has no infinity
            values.append(None if each is None else {**asdict(each), **ends, "verdict": each.verdict})
        return dict(zip(("minus_best_single", "minus_own_initialisation"), values))

    return {
        "verdict": verdict.lines,
        **pair(verdict.minus_single, verdict.minus_own),
        "runs": {name: pair(*found) for name, found in verdict.per_run.items()},
        "chosen_on_validation": verdict.chosen,
    }


def study_page(study: Study, verdict: Verdict, *, picture: str | None) -> str:
    """Write the study as Markdown."""
    lines = ["# Multi-reference study", "", *(f"**{pages.escape(line)}**\n" for line in verdict.lines)]
    lines += [pages.picture("The study in pictures", picture), ""] if picture is not None else []
    lines += [
        "## The references before training",
        "",
        "```",
        pages.fenced(cards_table(study.health)),
        "```",
        "",
        "## Runs",
        "",
    ]
    return "\n".join([*lines, *runs_table(study, verdict), "", _LEGEND]) + "\n"


def runs_table(study: Study, verdict: Verdict) -> list[str]:
    """Write one row a run: multi-reference runs with their differences, then singles."""
    rows = []
    for run in [*study.multi, *study.single]:
        differences = verdict.per_run.get(run.name, (None, None))
        rows.append(
            {
                "run": pages.escape(run.name),
                "seeds": f"{len(run.test)}/{len(study.seeds)}",
                "accuracy": _mean(run.test, ".4f"),
                "validation": _mean(run.validation, ".4f"),
                "own-init": _mean(run.own_init, ".4f"),
                "chosen log-prob": _mean(run.chosen_logps, ".4g"),
                **{b: f"{d}: {d.verdict}" if d is not None else "" for b, d in zip(BASELINES, differences)},
                "spread": f"{run.mean_influence('spread'):.3g}",
                "effective number": f"{run.mean_influence('effective_number'):.3g}",
                "dominance": f"{run.mean_influence('harmonic_dominance'):.3g}",
            }
        )
    missing = [pages.escape(run.name) for run in study.runs if not run.test]
    lines = pages.table(list(rows[0]), [list(row.values()) for row in rows])
    return lines + ([f"\nNot done, or failed: {', '.join(missing)}."] if missing else [])


def _mean(values: Result, form: str) -> str:
    return f"{np.mean(list(values.values())):{form}}" if values else ""


def rows_csv(study: Study) -> str:
    """Write one line a run and seed."""
    names = ("run", "reference", "seed", "test_accuracy", "validation_accuracy", "own_init_accuracy", "chosen_logps")
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(names)
    for run in study.runs:
        for seed, test in run.test.items():
            further = [run.own_init.get(seed, ""), run.chosen_logps.get(seed, "")]
            writer.writerow([run.name, run.reference or "", seed, test, run.validation[seed], *further])
    return file.getvalue()


def draw(path: Path, study: Study, verdict: Verdict) -> bool:
    """Draw the references' accuracies, the runs' differences and the influence; False where matplotlib is missing."""
    if (Figure := pages.figure_class()) is None:
        print_on_main("no plots, as matplotlib is missing (pip install prefopt[plots]).")
        return False
    figure = Figure(figsize=(16, 2.5 + 0.3 * max(len(study.multi), len(study.health))), layout="constrained")
    health, differences, acted = figure.subplots(1, 3)
    _draw_health(health, study.health)
    _draw_differences(differences, verdict)
    rows = range(len(study.multi))
    for number, name in enumerate(INFLUENCES):
        means = [run.mean_influence(name) for run in study.multi]
        acted.barh([row + 0.25 * (number - 1) for row in rows], means, 0.25, label=name.replace("_", " "))
    acted.set(yticks=rows, yticklabels=[""] * len(rows), title="Influence during training")
    acted.set(xlabel="nats, references, share")
    acted.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    return True


def _draw_health(axes: Any, cards: Sequence[HealthCard]) -> None:
    reach = [[c.accuracy - c.accuracy_low for c in cards], [c.accuracy_high - c.accuracy for c in cards]]
    axes.errorbar([c.accuracy for c in cards], range(len(cards)), xerr=reach, fmt="o", capsize=3)
    names = [f"{Path(c.name).name}{' (quarantined)' if c.quarantine else ''}" for c in cards]
    axes.set(yticks=range(len(cards)), yticklabels=names, title="References: accuracy", xlabel="before training")
    axes.axvline(0.5, color="grey", linewidth=0.8)


def _draw_differences(axes: Any, verdict: Verdict) -> None:
    for number, (label, colour) in enumerate(zip(BASELINES, ("tab:blue", "tab:orange"))):
        for row, found in enumerate(verdict.per_run.values()):
            if (each := found[number]) is not None:
                reach = 0 if each.interval == "none" else each.high - each.mean
                axes.errorbar(each.mean, row + 0.2 * number, xerr=reach, fmt="o", capsize=3, color=colour, label=label)
                label = "_"  # named once in the legend
    axes.axvline(0, color="grey", linewidth=0.8)
    names = list(verdict.per_run)
    axes.set(yticks=range(len(names)), yticklabels=names, title="Test accuracy", xlabel="difference")
    if axes.get_legend_handles_labels()[1]:
        axes.legend()
