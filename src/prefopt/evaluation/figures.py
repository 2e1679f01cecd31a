"""Figures with their intervals, and the shape in which every evaluation is written, printed and put into tables.

`evaluation.json` holds `kind`, `model`, `figures` (name -> value, low, high, interval, count), and what else a kind
has found. `evaluation.md` beside it shows the figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prefopt.candidates.shards import current_processes
from prefopt.files import write_json, write_text
from prefopt.intervals import normal_quantile, t_interval, wilson_interval
from prefopt.pages import escape, printable, table

EVALUATION_FILE, PAGE = "evaluation.json", "evaluation.md"
EVALUATION_FOLDER = "evaluation"  # within a training run's folder
RESAMPLES = 500


@dataclass(frozen=True)
class Figure:
    """One number with its interval.

    Attributes:
        value: the number.
        low, high: ends of the interval; None where there is none.
        interval: "wilson", "t", "normal", "bootstrap", "fisher" or "none".
        count: rows, prompts or games that it was computed from.
    """

    value: float
    low: float | None
    high: float | None
    interval: str
    count: int


def share(outcomes: Any, *, confidence: float) -> Figure:
    """Compute the share of true outcomes (N,) with Wilson's interval."""
    array = np.asarray(outcomes, dtype=bool)
    low, high = wilson_interval(int(array.sum()), array.size, z=normal_quantile(confidence))
    return Figure(float(array.mean()) if array.size else math.nan, low, high, "wilson", array.size)


def mean(values: Any, *, confidence: float) -> Figure:
    """Compute the mean of values (N,) with Student's interval; a single value has none."""
    array = np.asarray(values, dtype=np.float64)
    if array.size < 2:
        return Figure(float(array.mean()) if array.size else math.nan, None, None, "none", array.size)
    return Figure(float(array.mean()), *t_interval(array, confidence=confidence), "t", array.size)


def resampled(
    statistic: Callable[[np.ndarray], float],
    count: int,
    *,
    confidence: float,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Figure:
    """Compute a statistic of rows with the percentiles that it has on resampled rows.

    Args:
        statistic: indices of rows -> number; NaN where these rows have none.
        count: N rows.
        confidence: of the interval.
        resamples: how often rows are drawn.
        seed: of the draws.
    """
    value = statistic(np.arange(count))
    rng = np.random.default_rng(seed)
    drawn = np.array([statistic(rng.integers(0, count, count)) for _ in range(resamples)])
    drawn = drawn[np.isfinite(drawn)]
    if not drawn.size:
        return Figure(value, None, None, "none", count)
    low, high = np.quantile(drawn, (0.5 - confidence / 2, 0.5 + confidence / 2))
    return Figure(value, float(low), float(high), "bootstrap", count)


def correlation(first: Any, second: Any, *, confidence: float) -> Figure:
    """Compute Pearson's correlation of two columns (N,) with Fisher's interval, tanh(atanh r -+ z / sqrt(N - 3))."""
    x, y = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if x.size < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return Figure(math.nan, None, None, "none", x.size)
    value = float(np.corrcoef(x, y)[0, 1])
    if x.size < 4 or abs(value) >= 1:
        return Figure(value, None, None, "none", x.size)
    reach = normal_quantile(confidence) / math.sqrt(x.size - 3)
    centre = math.atanh(value)
    return Figure(value, math.tanh(centre - reach), math.tanh(centre + reach), "fisher", x.size)


def as_json(value: Any) -> Any:
    """Return figures, at any depth, as JSON values; a number that is not finite becomes null."""
    if isinstance(value, Figure):
        return as_json(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    if isinstance(value, (np.floating, np.integer, np.bool_)):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def shown(figure: Mapping[str, Any] | None) -> str:
    """Return a figure of `evaluation.json` as text: 0.612 [0.580, 0.643]."""
    if figure is None or figure["value"] is None:
        return "–"
    value = f"{figure['value']:.4g}"
    return value if figure["low"] is None else f"{value} [{figure['low']:.4g}, {figure['high']:.4g}]"


def figures_table(figures: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the lines of a Markdown table with one figure a row."""
    rows = [(escape(name), shown(figure), figure["count"]) for name, figure in figures.items()]
    return table(("figure", "value [interval]", "count"), rows)


def write_evaluation(
    folder: Path, result: Mapping[str, Any], *, page: Sequence[str] = (), summary: str = ""
) -> dict[str, Any]:
    """Write `evaluation.json` and `evaluation.md` on the main process and print the figures; all processes call it.

    Args:
        folder: where they go.
        result: `kind`, `model`, `figures`, and more.
        page: further lines for the page.
        summary: what is printed, instead of the figures.

    Returns:
        The result as JSON values.
    """
    team = current_processes()
    plain: dict[str, Any] = as_json(result)
    if team.is_main:
        write_json(folder / EVALUATION_FILE, plain)
        head = [f"# {escape(plain['kind'])}: {escape(plain['model'] or 'answers')}", ""]
        write_text(folder / PAGE, "\n".join([*head, *figures_table(plain["figures"]), "", *page]) + "\n")
        figures = [f"evaluate: {name}: {shown(each)} ({each['count']})" for name, each in plain["figures"].items()]
        print(printable(summary or "\n".join(figures)))
        print(printable(f"evaluate: {plain['kind']} -> {folder / EVALUATION_FILE}"), flush=True)
    team.gather(None)  # nobody leaves before the files are there
    return plain
