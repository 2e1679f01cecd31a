"""The report of a loop: its iterations on one page, with charts, from what its stages have left."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt.charts import Line, line_chart, stacked
from prefopt.evaluation.evaluate import EVALUATION_FILE, POLICY, length_ratio
from prefopt.files import read_json, write_text
from prefopt.pages import (
    Block,
    Figures,
    Heading,
    Own,
    Paragraph,
    Sample,
    Strong,
    Table,
    html_page,
    markdown_page,
    printable,
)

REPORT_FILE, HTML_FILE = "report.md", "report.html"
PICTURE = "progress.svg"
SHOWN_CHARACTERS = 400
REWARD_FIGURES = ("accuracy", "ece_bin10", "loss")  # of an adversarial loop's reward model
LOGGED = ("loss", "loss_normalized", "rewards/margins", "logratios/chosen", "logratios/rejected", "grad_norm")
OVERVIEW = (
    "iteration",
    "win rate against base",
    "against previous",
    "preference accuracy",
    "mean length",
    "length / base",
    "mean score",
    "pairs",
)


@dataclass(frozen=True)
class Iteration:
    """Results of an iteration: its evaluation, its pairs' report, its training log, its reward model's evaluation."""

    number: int
    evaluation: dict[str, Any]
    pairs: dict[str, Any]
    log: list[dict[str, float]]
    reward_model: dict[str, float]

    @property
    def name(self) -> str:
        """Its name in the report, `iteration 2`."""
        return f"iteration {self.number}"

    @property
    def loss_name(self) -> str:
        """Which of the logged losses is drawn: SPPO's normalised one, where there is one."""
        return "loss_normalized" if self.log and "loss_normalized" in self.log[0] else "loss"

    def rate(self, opponent: str) -> dict[str, Any] | None:
        """Return the win rate against an opponent; in the first iteration `previous` is the base."""
        rates = self.evaluation["win_rates"]
        return rates.get(opponent) or (rates.get("base") if opponent == "previous" and self.number == 1 else None)


def write_loop_report(run_dir: Path, *, iterations: int | None, output_dir: Path | None, plots: bool) -> Path:
    """Write the report of a loop.

    Args:
        run_dir: the loop's folder.
        iterations: up to which one; None: all.
        output_dir: where else it is written, with the picture of its charts; None: nowhere else.
        plots: draw charts.

    Returns:
        `report.md` in the loop's folder; `report.html` lies beside it.

    Raises:
        ValueError: the loop has no evaluated iteration.
    """
    output = run_dir if output_dir is None else output_dir
    found = read_iterations(run_dir, iterations)
    charts = draw(found) if plots else []
    if charts:
        write_text(output / PICTURE, stacked(charts))
    for folder in {output.resolve(): output, run_dir.resolve(): run_dir}.values():
        place, inside = (output / PICTURE).resolve(), folder.resolve()
        file = str(place.relative_to(inside) if inside in place.parents else place)
        blocks = page(found, charts=charts, file=file)
        write_text(folder / REPORT_FILE, markdown_page(run_dir.name, blocks))
        write_text(folder / HTML_FILE, html_page(run_dir.name, blocks))
    where = printable(str(run_dir / REPORT_FILE))
    print(f"report: {len(found)} iterations, best so far: {best(found).name} -> {where}, {HTML_FILE}")
    return run_dir / REPORT_FILE


def read_iterations(run_dir: Path, last: int | None) -> list[Iteration]:
    """Read the iterations of a run that have been evaluated, up to `last`.

    Raises:
        ValueError: there is none.
    """
    numbers = sorted(
        int(found[1])
        for folder in run_dir.glob("iteration-*")
        if (found := re.fullmatch(r"iteration-(\d+)", folder.name))
        and (folder / "evaluate" / EVALUATION_FILE).is_file()
    )
    iterations = [_read(run_dir / f"iteration-{n}", n) for n in numbers if last is None or n <= last]
    if not iterations:
        raise ValueError(f"{run_dir} has no iteration with an evaluation (iteration-1/evaluate/{EVALUATION_FILE}).")
    return iterations


def _read(folder: Path, number: int) -> Iteration:
    pairs, state = folder / "build-pairs" / "pairs_report.json", folder / "train" / "trainer_state.json"
    reward = folder / "reward-train" / "eval_results.json"
    log = read_json(state)["log_history"] if state.is_file() else []
    return Iteration(
        number,
        read_json(folder / "evaluate" / EVALUATION_FILE),
        read_json(pairs) if pairs.is_file() else {},
        [entry for entry in log if "loss" in entry],
        read_json(reward) if reward.is_file() else {},
    )


def best(iterations: Sequence[Iteration]) -> Iteration:
    """Return the iteration with the highest win rate against the base (the earlier of equals), or else the last."""
    if any(not iteration.evaluation["win_rates"] for iteration in iterations):
        return iterations[-1]
    opponent = "base" if iterations[0].rate("base") else next(iter(iterations[0].evaluation["win_rates"]))
    return max(iterations, key=lambda i: ((i.rate(opponent) or {"win_rate": 0.0})["win_rate"], -i.number))


# ---- the page


def page(iterations: Sequence[Iteration], *, charts: Sequence[str], file: str) -> list[Block]:
    """Write the report: an overview, then a section for each iteration."""
    chosen = best(iterations)
    rate = chosen.rate("base")
    why = "" if rate is None else f", win rate against the base {_rate(rate)}"
    blocks: list[Block] = [Paragraph(Own("Best so far: "), Strong(chosen.name), Own(f"{why}."))]
    for item in iterations:
        if item.evaluation["stop"] is not None:
            stop = item.evaluation["stop"]
            blocks.append(Paragraph(Strong("Ended early"), Own(f" after {item.name}: "), stop, Own(".")))
    blocks += [
        Table(OVERVIEW, list(map(_overview, iterations))),
        Paragraph(
            Own(
                "Win rates are under the run's own ranker, on held-out prompts, a tie counting one half; intervals at "
                "95 %."
            )
        ),
    ]
    if charts:
        blocks.append(Figures(charts, "win rates and lengths by iteration", file))
    return blocks + [block for item in iterations for block in section(item)]


def _overview(item: Iteration) -> list[Own]:
    preference, lengths = item.evaluation["preference"], item.evaluation["lengths"].get(POLICY, {})
    ratio = length_ratio(item.evaluation)
    length = "–"
    if lengths:
        unit = "tokens" if "mean_tokens" in lengths else "characters"
        length = f"{lengths[f'mean_{unit}']:.{1 if unit == 'tokens' else 0}f} {unit}"
    cells = [
        str(item.number),
        _rate(item.rate("base")),
        _rate(item.rate("previous")),
        "–" if preference is None else f"{preference['accuracy']:.3f}",
        length,
        "–" if ratio is None else f"{ratio:.2f}",
        "–" if POLICY not in item.evaluation.get("scores", {}) else f"{item.evaluation['scores'][POLICY]:.3f}",
        str(item.pairs.get("pairs", "–")),
    ]
    return [Own(cell) for cell in cells]


def _rate(found: Mapping[str, Any] | None) -> Own:
    return Own("–" if found is None else f"{found['win_rate']:.3f} [{found['low']:.3f}, {found['high']:.3f}]")


def section(item: Iteration) -> list[Block]:
    """Write the section of an iteration: training, pairs, comparisons, lengths, samples."""
    blocks: list[Block] = [Heading(f"Iteration {item.number}")]
    if item.log:
        first, last = item.log[0], item.log[-1]
        rows: list[Sequence[object]] = [
            (Own(name), f"{first[name]:.4g}", f"{last.get(name, float('nan')):.4g}")
            for name in LOGGED
            if name in first
        ]
        blocks.append(Table(("training", "first log", "last log"), rows))
    if item.pairs:
        characters = item.pairs["characters"]
        blocks.append(
            Paragraph(
                Own(
                    f"{item.pairs['pairs']} pairs from {item.pairs['prompts_with_pairs']} of {item.pairs['prompts']} "
                    f"prompts; chosen answers have {characters['chosen']['mean']:.0f} characters, rejected ones "
                    f"{characters['rejected']['mean']:.0f}."
                )
            )
        )
        blocks += [Paragraph(Strong("Warning:"), Own(" "), warning) for warning in item.pairs["warnings"]]
    figures = {name: value for name, value in item.reward_model.items() if name.endswith(REWARD_FIGURES)}
    if figures:
        rows = [(name.removeprefix("eval_"), f"{value:.4g}") for name, value in figures.items()]
        blocks.append(Table(("reward model", "value"), rows))
    if rates := item.evaluation["win_rates"]:
        head = ("against", "win rate", "interval", "won", "tied", "lost", "mean probability")
        counts = ("interval", "wins", "ties", "losses")
        rows = [(who, _rate(r), *(r[name] for name in counts), f"{r['win_prob']:.3f}") for who, r in rates.items()]
        blocks.append(Table(head, rows))
    if lengths := item.evaluation["lengths"]:
        names = list(lengths[POLICY])
        rows = [(who, *(f"{found.get(n, float('nan')):.4g}" for n in names)) for who, found in lengths.items()]
        blocks.append(Table(("answers of", *(n.replace("_", " ") for n in names)), rows))
    return blocks + [_sample(sample) for sample in item.evaluation["samples"]]


def _sample(sample: Mapping[str, Any]) -> Sample:
    answers = [
        (who, "" if answer["score"] is None else f" ({answer['score']:.3g})", shortened(answer["text"]))
        for who, answer in sample["answers"].items()
    ]
    return Sample(shortened(sample["prompt"]), answers)


def shortened(text: object) -> str:
    """Return the beginning of a text, as much of it as a page shows."""
    whole = str(text)
    return whole if len(whole) <= SHOWN_CHARACTERS else whole[:SHOWN_CHARACTERS] + " …"


# ---- charts


def draw(iterations: Sequence[Iteration]) -> list[str]:
    """Draw win rates with intervals, lengths and training losses by iteration, as far as there are any."""
    charts = []
    rates = []
    for colour, opponent in enumerate(("base", "previous")):
        if found := [(item.number, rate) for item in iterations if (rate := item.rate(opponent)) is not None]:
            middle, low, high = ([rate[name] for _, rate in found] for name in ("win_rate", "low", "high"))
            rates.append(
                Line(f"against {opponent}", [number for number, _ in found], middle, low, high, colour=colour)
            )
    if rates:
        title = "Win rate under the ranker"
        charts.append(line_chart(rates, title=title, x_label="iteration", y_label="win rate", at_most=1.0, mark=0.5))
    ratios = [(item.number, ratio) for item in iterations if (ratio := length_ratio(item.evaluation)) is not None]
    if ratios:
        line = Line("", [number for number, _ in ratios], [ratio for _, ratio in ratios])
        y_label = "mean length / that of base"
        charts.append(line_chart([line], title="Length drift", x_label="iteration", y_label=y_label, mark=1.0))
    losses = [
        Line(item.name, [e["step"] for e in item.log], [e[item.loss_name] for e in item.log], colour=place)
        for place, item in enumerate(iterations)
        if item.log
    ]
    if losses:
        name = next(item.loss_name for item in iterations if item.log)
        charts.append(line_chart(losses, title="Training", x_label="step", y_label=name))
    return charts
