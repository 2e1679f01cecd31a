"""`prefopt evaluate --study RUN_DIR`: health, every run, influence and the verdict of a multi-reference study, as table and plot."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from prefopt.evaluation.study import Study, Verdict, conclude, read_study
from prefopt.evaluation.verdict import Difference
from prefopt.files import atomic_path, write_json, write_text
from prefopt.launch import tell
from prefopt.references.health import cards_table

TABLE_FILE, ROWS_FILE, VERDICT_FILE, PICTURE = "table.md", "table.csv", "verdict.json", "study.png"


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
    print(cards_table(study.health))
    print(
        "\n".join(["", *runs_table(study, verdict), "", *verdict.lines, f"study: {run_dir / TABLE_FILE}"]), flush=True
    )
    return verdict


def _plain(verdict: Verdict) -> dict[str, Any]:
    def difference(found: Difference | None) -> dict[str, Any] | None:
        if found is None:
            return None
        ends = {} if found.interval != "none" else {"low": None, "high": None}  # JSON has no infinity
        return {**asdict(found), **ends, "verdict": found.verdict}

    pair = ("minus_best_single", "minus_own_initialisation")
    return {
        "verdict": verdict.lines,
        **dict(zip(pair, map(difference, (verdict.minus_single, verdict.minus_own)))),
        "runs": {name: dict(zip(pair, map(difference, found))) for name, found in verdict.per_run.items()},
        "chosen_on_validation": verdict.chosen,
    }


def study_page(study: Study, verdict: Verdict, *, picture: str | None) -> str:
    """The study as Markdown."""
    lines = ["# Multi-reference study", "", *(f"**{line}**\n" for line in verdict.lines)]
    lines += [f"![The study in pictures]({picture})", ""] if picture is not None else []
    lines += ["## The references before training", "", "```", cards_table(study.health), "```", "", "## Runs", ""]
    lines += [*runs_table(study, verdict), ""]
    lines += [
        "Accuracy: test pairs whose chosen answer the policy finds likelier per token, without a reference; mean over seeds. Differences are "
        'paired within seeds, with 95 % intervals; "best single" and the run in the verdict are chosen within each seed on its validation rows. '
        "Own-init accuracy: test pairs whose margin has grown beyond the initial model's. Chosen log-prob: "
        "mean over the chosen test answers, in the unit of `normalize`; far below the others, the policy is damaged. Spread: standard deviation over references of beta "
        "times the margin, nats.",
    ]
    return "\n".join(lines) + "\n"


def runs_table(study: Study, verdict: Verdict) -> list[str]:
    """One row a run: multi-reference runs with their differences, then singles."""
    head = [
        "run",
        "seeds",
        "accuracy",
        "validation",
        "own-init",
        "chosen log-prob",
        "minus best single",
        "minus own init",
        "spread",
        "effective number",
        "dominance",
    ]
    lines = [_row(head), _row(["---"] * len(head))]
    for run in [*study.multi, *study.single]:
        differences = verdict.per_run.get(run.name, (None, None))
        told = [f"{found}: {found.verdict}" if found is not None else "" for found in differences]
        measures = [run.mean_influence(name) for name in ("spread", "effective_number", "harmonic_dominance")]
        accuracies = [
            f"{np.mean(list(found.values())):.4f}" if found else ""
            for found in (run.test, run.validation, run.own_init)
        ]
        logps = f"{np.mean(list(run.chosen_logps.values())):.4g}" if run.chosen_logps else ""
        done = f"{len(run.test)}/{len(study.seeds)}"
        lines.append(_row([run.name, done, *accuracies, logps, *told, *(f"{m:.3g}" for m in measures)]))
    missing = [run.name for run in study.runs if not run.test]
    return lines + ([f"\nNot done, or failed: {', '.join(missing)}."] if missing else [])


def rows_csv(study: Study) -> str:
    """One line a run and seed."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(
        ["run", "reference", "seed", "test_accuracy", "validation_accuracy", "own_init_accuracy", "chosen_logps"]
    )
    for run in study.runs:
        for seed, value in run.test.items():
            writer.writerow(
                [
                    run.name,
                    run.reference or "",
                    seed,
                    value,
                    run.validation[seed],
                    run.own_init.get(seed, ""),
                    run.chosen_logps.get(seed, ""),
                ]
            )
    return file.getvalue()


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def draw(path: Path, study: Study, verdict: Verdict) -> bool:
    """The references' accuracies, the runs' differences and the influence; whether matplotlib is there to draw them."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        tell("no plots, as matplotlib is missing (pip install prefopt[plots]).")
        return False
    figure = Figure(figsize=(16, 2.5 + 0.3 * max(len(study.multi), len(study.health))), layout="constrained")
    health, differences, acted = figure.subplots(1, 3)
    places = range(len(study.health))
    spread = [
        [c.accuracy - c.accuracy_low for c in study.health],
        [c.accuracy_high - c.accuracy for c in study.health],
    ]
    health.errorbar([c.accuracy for c in study.health], places, xerr=spread, fmt="o", capsize=3)
    names = [f"{Path(c.name).name}{' (quarantined)' if c.quarantine else ''}" for c in study.health]
    health.set(yticks=list(places), yticklabels=names, title="References: accuracy", xlabel="before training")
    health.axvline(0.5, color="grey", linewidth=0.8)
    for row, (_, found) in enumerate(verdict.per_run.items()):
        for number, (difference, colour) in enumerate(zip(found, ("tab:blue", "tab:orange"))):
            if difference is not None:
                reach = 0 if difference.interval == "none" else difference.high - difference.mean
                label = ("minus best single", "minus own init")[number] if row == 0 else None
                differences.errorbar(
                    difference.mean, row + 0.2 * number, xerr=reach, fmt="o", capsize=3, color=colour, label=label
                )
    differences.axvline(0, color="grey", linewidth=0.8)
    differences.set(
        yticks=range(len(verdict.per_run)),
        yticklabels=list(verdict.per_run),
        title="Test accuracy",
        xlabel="difference",
    )
    if any(found != (None, None) for found in verdict.per_run.values()):
        differences.legend()
    names = ("effective_number", "spread", "harmonic_dominance")
    for number, name in enumerate(names):
        places = [row + 0.25 * (number - 1) for row in range(len(study.multi))]
        acted.barh(places, [run.mean_influence(name) for run in study.multi], 0.25, label=name.replace("_", " "))
    acted.set(yticks=range(len(study.multi)), yticklabels=[""] * len(study.multi), title="Influence during training")
    acted.set(xlabel="references, nats, share")
    acted.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    return True
