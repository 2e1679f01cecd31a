"""`prefopt report`: a run of iterations on one page, with plots, from what its stages have left."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt.arguments import check_settings, setting
from prefopt.evaluation.evaluate import EVALUATION_FILE, POLICY, length_ratio
from prefopt.files import atomic_path, read_json, write_text
from prefopt.pages import escape, figure_class, picture, printable, table

REPORT_FILE = "report.md"
PICTURE = "progress.png"
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


@dataclass
class ReportArguments:
    """Which run is reported, and where."""

    run_dir: str = setting("", "Folder of a run of `prefopt pipeline`.", required=True)
    iterations: int | None = setting(None, "Report iterations up to this one; default: all.")
    output_dir: str | None = setting(
        None, "Folder for the report and its plots; report.md in run_dir is written in any case."
    )
    plots: bool = setting(True, "Draw plots (needs matplotlib, the extra `plots`).", decides_result=False)

    def __post_init__(self) -> None:
        check_settings(self)


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

    def rate(self, opponent: str) -> dict[str, Any] | None:
        """Return the win rate against an opponent; in the first iteration `previous` is the base."""
        rates = self.evaluation["win_rates"]
        return rates.get(opponent) or (rates.get("base") if opponent == "previous" and self.number == 1 else None)


def run(args: ReportArguments) -> Path:
    """Write the report.

    Returns:
        `report.md` in the run's folder.

    Raises:
        ValueError: the run has no evaluated iteration.
    """
    run_dir = Path(args.run_dir)
    output = Path(args.output_dir) if args.output_dir is not None else run_dir
    iterations = read_iterations(run_dir, args.iterations)
    drawn = args.plots and draw(output / PICTURE, iterations)
    write_text(output / REPORT_FILE, page(run_dir.name, iterations, drawing=PICTURE if drawn else None))
    if output.resolve() != run_dir.resolve():
        place = (output / PICTURE).resolve()
        inside = place.relative_to(run_dir.resolve()) if run_dir.resolve() in place.parents else place
        write_text(run_dir / REPORT_FILE, page(run_dir.name, iterations, drawing=str(inside) if drawn else None))
    chosen = best(iterations)
    where = printable(str(run_dir / REPORT_FILE))
    print(f"report: {len(iterations)} iterations, best so far: {chosen.name} -> {where}")
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


def page(name: str, iterations: Sequence[Iteration], *, drawing: str | None) -> str:
    """Write the report as Markdown: an overview, then a section for each iteration."""
    chosen = best(iterations)
    lines = [f"# {escape(name)}", "", f"Best so far: **{chosen.name}**{_why_best(chosen)}.", ""]
    stopped = [iteration for iteration in iterations if iteration.evaluation["stop"] is not None]
    lines += [f"**Ended early** after {item.name}: {escape(item.evaluation['stop'])}.\n" for item in stopped]
    lines += [*table(OVERVIEW, map(_overview, iterations)), ""]
    lines += [
        "Win rates are under the run's own ranker, on held-out prompts, a tie counting one half; intervals at 95 %.",
        "",
    ]
    if drawing is not None:
        lines += [picture("win rates and lengths by iteration", drawing), ""]
    for item in iterations:
        lines += section(item)
    return "\n".join(lines)


def _why_best(iteration: Iteration) -> str:
    rate = iteration.rate("base")
    return f", win rate against the base {_rate(rate)}" if rate is not None else ""


def _overview(item: Iteration) -> list[str]:
    preference, lengths = item.evaluation["preference"], item.evaluation["lengths"].get(POLICY, {})
    ratio = length_ratio(item.evaluation)
    length = "–"
    if lengths:
        unit = "tokens" if "mean_tokens" in lengths else "characters"
        length = f"{lengths[f'mean_{unit}']:.{1 if unit == 'tokens' else 0}f} {unit}"
    return [
        str(item.number),
        _rate(item.rate("base")),
        _rate(item.rate("previous")),
        "–" if preference is None else f"{preference['accuracy']:.3f}",
        length,
        "–" if ratio is None else f"{ratio:.2f}",
        "–" if POLICY not in item.evaluation.get("scores", {}) else f"{item.evaluation['scores'][POLICY]:.3f}",
        str(item.pairs.get("pairs", "–")),
    ]


def _rate(found: Mapping[str, Any] | None) -> str:
    return "–" if found is None else f"{found['win_rate']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


def section(item: Iteration) -> list[str]:
    """Write the section of an iteration: training, pairs, comparisons, lengths, samples."""
    lines = [f"## Iteration {item.number}", ""]
    rows: list[tuple[object, ...]]
    if item.log:
        first, last = item.log[0], item.log[-1]
        rows = [
            (name, f"{first[name]:.4g}", f"{last.get(name, float('nan')):.4g}") for name in LOGGED if name in first
        ]
        lines += [*table(("training", "first log", "last log"), rows), ""]
    if item.pairs:
        characters = item.pairs["characters"]
        lines += [
            f"{item.pairs['pairs']} pairs from {item.pairs['prompts_with_pairs']} of {item.pairs['prompts']} prompts; "
            f"chosen answers have {characters['chosen']['mean']:.0f} characters, rejected ones "
            f"{characters['rejected']['mean']:.0f}.",
            "",
        ]
        lines += [f"**Warning:** {escape(warning)}\n" for warning in item.pairs["warnings"]]
    figures = {name: value for name, value in item.reward_model.items() if name.endswith(REWARD_FIGURES)}
    if figures:
        rows = [(escape(name.removeprefix("eval_")), f"{value:.4g}") for name, value in figures.items()]
        lines += [*table(("reward model", "value"), rows), ""]
    rates = item.evaluation["win_rates"]
    if rates:
        head = ("against", "win rate", "interval", "won", "tied", "lost", "mean probability")
        counts = ("interval", "wins", "ties", "losses")
        rows = [
            (escape(who), _rate(r), *(r[name] for name in counts), f"{r['win_prob']:.3f}") for who, r in rates.items()
        ]
        lines += [*table(head, rows), ""]
    lengths = item.evaluation["lengths"]
    if lengths:
        names = list(lengths[POLICY])
        rows = [(escape(who), *(f"{found.get(n, float('nan')):.4g}" for n in names)) for who, found in lengths.items()]
        lines += [*table(("answers of", *(n.replace("_", " ") for n in names)), rows), ""]
    return lines + [line for sample in item.evaluation["samples"] for line in _sample(sample)]


def _sample(sample: Mapping[str, Any]) -> list[str]:
    lines = [f"> **{_short(sample['prompt'])}**", ">"]
    for who, answer in sample["answers"].items():
        score = "" if answer["score"] is None else f" ({answer['score']:.3g})"
        lines += [f"> *{escape(who)}*{score}: {_short(answer['text'])}", ">"]
    return [*lines, ""]


def _short(text: object) -> str:
    whole = str(text)
    return escape(whole if len(whole) <= SHOWN_CHARACTERS else whole[:SHOWN_CHARACTERS] + " …")


# ---- plots


def draw(path: Path, iterations: Sequence[Iteration]) -> bool:
    """Draw win rates with intervals, lengths and training losses by iteration; return whether matplotlib is there."""
    if (Figure := figure_class()) is None:
        print("report: no plots, as matplotlib is missing (pip install prefopt[plots]).", file=sys.stderr)
        return False
    figure = Figure(figsize=(13, 4), layout="constrained")
    rates, lengths, losses = figure.subplots(1, 3)
    for opponent in ("base", "previous"):
        found = [(item.number, rate) for item in iterations if (rate := item.rate(opponent)) is not None]
        if found:
            x, y = [number for number, _ in found], [rate["win_rate"] for _, rate in found]
            ends = [(r["win_rate"] - r["low"], r["high"] - r["win_rate"]) for _, r in found]
            spread = [
                [max(0.0, end) for end in side] for side in zip(*ends)
            ]  # matplotlib raises on a rounding below 0
            rates.errorbar(x, y, yerr=spread, marker="o", capsize=3, label=f"against {opponent}")
    rates.axhline(0.5, color="grey", linewidth=0.8)
    rates.set(xlabel="iteration", ylabel="win rate", title="Win rate under the ranker", ylim=(0, 1))
    rates.legend()
    ratios = [(item.number, ratio) for item in iterations if (ratio := length_ratio(item.evaluation)) is not None]
    lengths.plot([number for number, _ in ratios], [ratio for _, ratio in ratios], marker="o")
    lengths.axhline(1, color="grey", linewidth=0.8)
    lengths.set(xlabel="iteration", ylabel="mean length / that of base", title="Length drift")
    for item in iterations:
        key = "loss_normalized" if item.log and "loss_normalized" in item.log[0] else "loss"
        losses.plot([entry["step"] for entry in item.log], [entry[key] for entry in item.log], label=item.name)
        losses.set(ylabel=key)
    losses.set(xlabel="step", title="Training")
    losses.legend()
    for axis in (rates, lengths):
        axis.set_xticks([item.number for item in iterations])
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    return True
