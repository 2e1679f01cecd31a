"""docs/study.md, written from the recorded units: the design first, then the summary, then each experiment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.study.experiments import EXPERIMENTS
from benchmarks.study.experiments.base import SMALLEST, Experiment, measured
from benchmarks.study.lab import Lab
from benchmarks.study.results import Row
from benchmarks.study.statistics import UNTESTED, Claim
from prefopt import pages
from prefopt.files import atomic_path, write_text

IMAGES = "images/study"
WORLD = """# When does each method pay? A study in one small world

Written by `make study` (`python -m benchmarks.study`) from the units recorded in `benchmarks/study/results/`; do not
edit it. Every experiment uses prefopt's own trainers. The point is not the numbers, which belong to this world, but
whether the effect that a paper claims appears where its explanation says it should, with the controls that single
runs lack.

## Design

**World.** A prompt is a kind and three digits that mean nothing ("tools 4 0 7"); an answer names things. The true
reward is (different things of that kind - other words - repetitions) / 5: at most 1. There are four kinds with five
things each, one token a word. A policy is a Llama of two layers, 64 wide, taught from scratch for each seed, so that
seeds differ in everything: policies, prompts, samples, labels. The start policy stays on the topic in four of five
words, repeats itself, and ends too early or too late.

**Scores.** Mean true reward of {answers} samples at temperature 1 to each of {prompts} held-out prompts, by the true
rule and never by a model that trained anything. Beside each: KL to the start in nats an answer (the mean over the
policy's own samples of the summed exact KL of each token's distribution), and words an answer.

**Statistics.** Hyperparameters are chosen on seed 0, which is then left out: of the settings within {smallest} of
the best true reward, the one with the smallest KL, since one seed cannot order them and the very best of one seed
favours settings that moved far and were lucky. Every claim was written down, with its direction and the smallest
effect that would matter ({smallest} of true reward unless a table says otherwise), in the code that made the runs.
Differences are paired within seeds, mean with 95 % t-interval. *Seen*: the interval is on the claimed side of 0 (for
a claim of sameness: within the smallest effect on both sides). *The opposite is seen*: on the other side (of
sameness: a difference). *Not seen*: the interval holds 0 and excludes effects that matter. *Under-powered*: it holds
both, so these seeds cannot say. With about {claims} claims at 95 %, one or two will be seen by chance.

**What was changed after trying.** The world's writers were changed three times on seed 0, before any further seed,
until pairs could teach the start something other than shorter answers. The rule for choosing hyperparameters was the
plain maximum at first; it was replaced once, after four seeds of the WPO experiment had shown that it had picked a
rate for WPO at 50 % at which everything is worse; that experiment is judged on seeds that nobody had seen, 5 to 20.
The cyclic experiment had answers of up to ten words and the rule
told by a digit at first; on seed 0, and in the case of share 0 on seed 1, neither model learned it, nor with heads
that read the end of the answer instead of its last word, nor with mean pooling. With several references every run
was put on four fifths of the pairs after a small trial, since two weightings hold a fifth out. DPO's betas in the
adversarial experiment were raised after a small trial run in which every way overfitted its reward model. No
metric or smallest effect was changed; the shuffled-weights claim was reworded after its result, from "nothing is
gained" to the sameness that it always tested, and a refuted sameness is now called "the opposite".
"""


def write_page(lab: Lab, path: Path) -> None:
    """Write the page and its figures from what is recorded; experiments without results say so."""
    reader = Lab(lab.results, scale=lab.scale, device=lab.device, only_read=True)
    sections: list[str] = []
    summary: list[list[object]] = []
    claims = 0
    for experiment in EXPERIMENTS.values():
        chosen, rows = experiment.read(reader)
        found = experiment.claims(rows, chosen) if measured(rows) else []
        claims += len(found)
        summary += [summary_row(experiment, claim) for claim in found]
        if not found:
            summary.append([experiment.title, "", "", UNTESTED, "", f"0 of {experiment.seeds}"])
        sections += section(experiment, rows, found, path.parent)
    head = ["experiment", "claim", "effect", "verdict", "difference [95 %]", "seeds"]
    world = WORLD.format(
        answers=lab.scale.answers, prompts=lab.scale.test_prompts, smallest=SMALLEST, claims=max(claims, 1)
    )
    lines = [world, "## Summary", "", *pages.table(head, summary), "", *cost(reader), "", *sections]
    write_text(path, "\n".join(lines).rstrip() + "\n")


def summary_row(experiment: Experiment, claim: Claim) -> list[object]:
    """Return a claim's row of the summary."""
    found = claim.difference
    shown = "" if found is None else str(found).replace("no interval", "in every seed")
    seeds = 0 if found is None else found.seeds
    done = f"{seeds} of {claim.planned}" if seeds <= claim.planned else f"{seeds} ({claim.planned} planned)"
    return [experiment.title, claim.text, claim.effect, claim.verdict, shown, done]


def cost(lab: Lab) -> list[str]:
    """Say how much was run, and how long it took."""
    seconds = sum(row.get("processor_seconds", row["seconds"]) for row in lab.visited)  # old rows: wall clock
    return [
        f"{len(lab.visited)} units on `{lab.device}`, {seconds / 60:.0f} minutes of processor time in all, in "
        "processes of one thread. *Seeds* are those done of those planned; the command runs what is missing."
    ]


def section(experiment: Experiment, rows: list[Row], claims: list[Claim], folder: Path) -> list[str]:
    """Return the lines of an experiment: design, results, figure, how to read it, what would change."""
    lines = [f"## {experiment.title}", "", f"**Design.** {experiment.design}", ""]
    if measured(rows):
        lines += [*experiment.tables(rows), ""]
        picture = draw(experiment, rows, folder / IMAGES / f"{experiment.name}.svg")
        if picture is not None:
            lines += [pages.picture(experiment.title, f"{IMAGES}/{picture.name}"), ""]
    else:
        lines += ["**Not run yet.** No seed beyond the one that chooses hyperparameters is recorded.", ""]
    lines += [f"**How to read it.** {experiment.reading}", "", f"**At real scale.** {experiment.real_scale}", ""]
    return lines


def draw(experiment: Experiment, rows: list[Row], path: Path) -> Path | None:
    """Draw an experiment's figure; None without matplotlib."""
    figure_class = pages.figure_class()
    if figure_class is None:
        return None
    figure: Any = figure_class(figsize=(6.5, 4))
    experiment.draw(figure.subplots(), rows)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    import matplotlib

    # the same results make the same file
    with atomic_path(path) as temporary, matplotlib.rc_context({"svg.hashsalt": "study"}):
        figure.savefig(temporary, format="svg", metadata={"Date": None})
    return path
