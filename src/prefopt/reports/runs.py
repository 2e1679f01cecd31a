"""The report of training runs: one page for one run, or for several side by side."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prefopt.charts import Line, line_chart
from prefopt.evaluation.figures import shown
from prefopt.files import write_text
from prefopt.intervals import t_interval, wilson_interval
from prefopt.pages import (
    Block,
    Details,
    Figures,
    Heading,
    Own,
    Paragraph,
    Sample,
    Strong,
    Table,
    html_page,
    markdown_page,
)
from prefopt.recipes.recipe import dumped
from prefopt.reports.loop import HTML_FILE, REPORT_FILE, shortened
from prefopt.reports.records import RunRecord, read_run

SMOOTHED_FROM = 15  # logs from which on a curve is a moving mean
WINDOW_SHARE, SMALLEST_WINDOW = 0.05, 5
SHOWN_SAMPLES = 8
NOTHING = Own("–")
NOT_COMPARED = frozenset({"output_dir", "run_name", "logging_dir", "resume_from_checkpoint", "overwrite_output_dir"})
HARDWARE = {
    "device": "device",
    "processes": "processes",
    "memory_gib": "memory of a device, GiB",
    "cpu_cores": "CPU cores",
    "ram_gib": "memory of the machine, GiB",
    "platform": "system",
    "cuda": "CUDA",
    "wrapping": "wrapping",
}


@dataclass(frozen=True)
class Curve:
    """A chart of one or several logged metrics that share a unit."""

    title: str
    unit: str
    metrics: tuple[str, ...]
    at_most: float | None = None
    mark: float = math.nan
    exact: bool = False  # nothing random in it, so nothing is averaged


CURVES = (
    Curve("Loss", "loss", ("loss",)),
    Curve("Loss, normalised", "loss", ("loss_normalized",)),
    Curve("Accuracy (chosen above rejected)", "share of pairs", ("rewards/accuracies",), 1.0, 0.5),
    Curve("Accuracy (better above worse)", "share of ranked pairs", ("accuracy",), 1.0, 0.5),
    Curve("Reward margin", "beta × nats", ("rewards/margins",)),
    Curve("Margin of rewards", "reward", ("margin",)),
    Curve("Rewards", "beta × nats", ("rewards/chosen", "rewards/rejected")),
    Curve("Rewards of responses", "reward", ("mean_reward", "min_reward", "max_reward")),
    Curve("Log-ratios to the reference", "nats", ("logratios/chosen", "logratios/rejected")),
    Curve("Log-probs of completions", "nats", ("logps/chosen", "logps/rejected")),
    Curve("Lengths of completions", "tokens", ("lengths/chosen", "lengths/rejected")),
    Curve("WPO weights", "weight", ("wpo/weight_mean", "wpo/weight_min", "wpo/weight_max")),
    Curve("Pairs that count (WPO)", "pairs a step", ("wpo/effective_pairs",)),
    Curve("Entropy of the policy", "nats a token", ("entropy",)),
    Curve("Gradient norm", "norm before clipping", ("grad_norm",)),
    Curve("Learning rate", "rate", ("learning_rate",), exact=True),
    Curve("Throughput", "tokens a second", ("perf/tokens_per_second",)),
    Curve("Memory, largest so far", "GiB", ("perf/peak_memory_gib",), exact=True),
)


def write_report(folders: Sequence[Path], output: Path | None = None, *, plots: bool = True) -> Path:
    """Write `report.md` and `report.html` about training runs.

    Args:
        folders: of the runs, finished or not.
        output: folder of the report; None: the first run's.
        plots: draw curves.

    Returns:
        `report.md`.

    Raises:
        ValueError: a folder holds no training run.
    """
    records = [read_run(folder, name) for folder, name in zip(folders, distinct_names(folders))]
    place = folders[0] if output is None else output
    title = " beside ".join(record.name for record in records) if len(records) < 4 else f"{len(records)} runs"
    blocks = page(records, plots=plots)
    write_text(place / REPORT_FILE, markdown_page(title, blocks))
    write_text(place / HTML_FILE, html_page(title, blocks))
    return place / REPORT_FILE


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """Name each folder by its last part, and by more of them where several end in the same ones."""
    parts = [folder.resolve().parts for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-count:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{folder} ({place})" for place, folder in enumerate(map(str, folders), start=1)]


def page(records: Sequence[RunRecord], *, plots: bool) -> list[Block]:
    """Write the page: state, recipe, data, curves, evaluation, samples, hardware and versions."""
    blocks: list[Block] = [Paragraph(Strong(record.name), Own(f": {state(record)}")) for record in records]
    blocks += recipe_section(records)
    blocks += data_section(records)
    blocks += training_section(records, plots=plots)
    blocks += evaluation_section(records, plots=plots)
    blocks += measured_section(records)
    for record in records:
        blocks += samples_section(record)
    return blocks + machine_section(records)


def state(record: RunRecord) -> str:
    """Say how far a run has come."""
    method = f"{record.facts['method']}, " if record.facts.get("method") else ""
    if record.finished:
        return f"{method}finished after {record.steps} steps."
    of = f" of {record.max_steps}" if record.max_steps else ""
    return f"{method}not finished: its last log is of step {record.steps}{of}."


# ---- recipe and data


def recipe_section(records: Sequence[RunRecord]) -> list[Block]:
    """Show how the recipes differ: from each other, and from the packaged ones or the defaults."""
    blocks: list[Block] = [Heading("Recipe")]
    names = [record.name for record in records]
    if len(records) > 1:
        keys = {key: None for record in records for key in record.recipe if key not in NOT_COMPARED}
        unequal = [key for key in keys if len({str(record.recipe.get(key)) for record in records}) > 1]
        rows = [(key, *(_value(record.recipe.get(key)) for record in records)) for key in unequal]
        blocks.append(Paragraph(Own("What differs between the runs:" if rows else "The runs have equal recipes.")))
        blocks += [Table(("key", *names), rows)] if rows else []
    bases: dict[Any, list[RunRecord]] = {}
    for record in records:
        if isinstance(record.facts.get("differences"), dict):
            bases.setdefault(record.facts.get("baseline"), []).append(record)
    for base, group in bases.items():
        against = f"the packaged recipe {base}" if base else "the defaults"
        before = {key: pair[0] for record in group for key, pair in record.facts["differences"].items()}
        rows = [(key, _value(value), *(_value(r.recipe.get(key)) for r in group)) for key, value in before.items()]
        named = ", ".join(record.name for record in group)
        differs, end = ("What differs", ":") if rows else ("Nothing differs", ".")
        blocks.append(Paragraph(f"{differs} from {against} in {named}{end}"))
        blocks += [Table(("key", against, *(record.name for record in group)), rows)] if rows else []
    for record in records:
        if record.recipe:
            blocks.append(Details(f"The whole recipe of {record.name}", dumped(dict(record.recipe))))
    return blocks


def _value(value: Any) -> object:
    """Show a setting as a recipe has it."""
    if value is None:
        return NOTHING
    if isinstance(value, bool):
        return Own(str(value).lower())
    if isinstance(value, list):
        return ", ".join(str(_value(item)) for item in value)
    if isinstance(value, float) and value.is_integer():
        return int(value)  # transformers' steps are floats, as they may be shares
    return shortened(value)


def data_section(records: Sequence[RunRecord]) -> list[Block]:
    """Show the counts of rows, what was dropped and why, and the lengths."""
    sets = [(record, data) for record in records for data in record.facts.get("data", [])]
    if not sets:
        return []
    several = len(records) > 1
    rows, faults, lengths = [], [], []
    for record, data in sets:
        name = f"{record.name}: {data['name']}" if several else data["name"]
        dropped = sum(data["dropped"].values())
        rows.append((name, data["rows_in"], data["rows_kept"], dropped, data["rows_cut"], data["form"] or "token ids"))
        faults += [(name, reason, count) for reason, count in data["dropped"].items()]
        for part, found in data["lengths"].items():
            lengths.append((name, part, f"{found['mean']:.1f}", *(f"{found[n]:.0f}" for n in ("p50", "p95", "max"))))
    blocks: list[Block] = [Heading("Data"), Table(("set", "rows read", "kept", "dropped", "cut", "form"), rows)]
    if faults:
        blocks.append(Table(("set", "dropped because", "rows"), faults))
    return [*blocks, Table(("set", "tokens of", "mean", "median", "95 %", "longest"), lengths)]


# ---- curves


def training_section(records: Sequence[RunRecord], *, plots: bool) -> list[Block]:
    """Show how each logged metric moved: a table of start and end, and curves."""
    if not any(record.log for record in records):
        return [Heading("Training"), Paragraph(Own("Nothing has been logged."))]
    rows = []
    for curve in CURVES:
        for metric in curve.metrics:
            cells = [_moved(record, metric, curve) for record in records]
            if any(cell is not NOTHING for cell in cells):
                rows.append((Own(metric), *cells))
    head = ("metric", *(record.name if len(records) > 1 else "first → last" for record in records))
    blocks: list[Block] = [
        Heading("Training"),
        Table(head, rows),
        Paragraph(
            Own(
                f"First and last are means over a twentieth of the logs (at least {SMALLEST_WINDOW}) where there are "
                f"{SMOOTHED_FROM} or more, with their 95 % intervals (Student's t; neighbouring logs taken as "
                "independent); single logs otherwise. In curves, a line is the mean of as many logs around each step, "
                "the band its interval, the faint line the single logs."
            )
        ),
    ]
    charts = [chart for each in CURVES if (chart := draw(each, records)) is not None] if plots else []
    return [*blocks, Figures(charts)] if charts else blocks


def series(record: RunRecord, metric: str) -> tuple[list[float], list[float]]:
    """Return the steps at which a metric was logged with a finite value, and the values."""
    found = [(float(entry["step"]), entry[metric]) for entry in record.log if _is_finite(entry.get(metric))]
    return [step for step, _ in found], [float(value) for _, value in found]


def window(count: int) -> int:
    """Return over how many of so many logs a curve is averaged; 1 where they are few."""
    return 1 if count < SMOOTHED_FROM else max(SMALLEST_WINDOW, round(WINDOW_SHARE * count))


def moving_mean(
    values: Sequence[float], width: int, at_most: float | None = None
) -> tuple[list[float], list[float], list[float]]:
    """Return the mean of the `width` values around each one (fewer at the ends), and the ends of its 95 % interval."""
    means, lows, highs = [], [], []
    for place in range(len(values)):
        part = values[max(0, place - width // 2) : place + width // 2 + 1]
        low, high = _interval(part, at_most)
        means.append(sum(part) / len(part))
        lows.append(low)
        highs.append(high)
    return means, lows, highs


def _moved(record: RunRecord, metric: str, curve: Curve) -> Own:
    _, values = series(record, metric)
    if not values:
        return NOTHING
    width = 1 if curve.exact else window(len(values))
    ends = (values[:width], values[-width:])
    return Own(" → ".join(_with_interval(part, curve.at_most) for part in ends))


def _with_interval(values: Sequence[float], at_most: float | None) -> str:
    mean = f"{sum(values) / len(values):.4g}"
    return mean if len(values) == 1 else "{} [{:.4g}, {:.4g}]".format(mean, *_interval(values, at_most))


def _interval(values: Sequence[float], at_most: float | None) -> tuple[float, float]:
    """Return the interval of a mean; that of a share stays between 0 and `at_most`."""
    low, high = t_interval(values)
    return (low, high) if at_most is None else (max(low, 0.0), min(high, at_most))


def draw(curve: Curve, records: Sequence[RunRecord]) -> str | None:
    """Draw a curve of all runs that have logged it; None where none has."""
    lines = []
    several = len(records) > 1
    logged = [metric for metric in curve.metrics if any(series(record, metric)[1] for record in records)]
    drawn = logged[:2] if several else logged
    for place, record in enumerate(records):
        for number, metric in enumerate(drawn):
            steps, values = series(record, metric)
            if not values:
                continue
            parts = [record.name] if several else []
            name = ": ".join([*parts, metric.rpartition("/")[2]] if len(drawn) > 1 else parts)
            line = Line(name, steps, values, colour=place if several else number, dashed=several and number > 0)
            if not curve.exact and (width := window(len(values))) > 1:
                means, low, high = moving_mean(values, width, curve.at_most)
                line = replace(line, y=means, low=low, high=high, raw=values)
            lines.append(line)
    if not lines:
        return None
    return line_chart(
        lines, title=curve.title, x_label="step", y_label=curve.unit, at_most=curve.at_most, mark=curve.mark
    )


# ---- evaluation and samples


def evaluation_section(records: Sequence[RunRecord], *, plots: bool) -> list[Block]:
    """Show the last evaluation of each run, and how evaluations moved where there were several."""
    last = [evaluation_of(record) for record in records]
    names = list(dict.fromkeys(name for found in last for name in found))
    if not names:
        return []
    rows = [(Own(name), *(_evaluated(record, found, name) for record, found in zip(records, last))) for name in names]
    head = ("metric", *(record.name if len(records) > 1 else "value" for record in records))
    blocks: list[Block] = [Heading("Evaluation"), Table(head, rows)]
    if any(_is_share(name) for name in names):
        blocks.append(Paragraph(Own("Accuracies with 95 % intervals (Wilson) where the number of rows is known.")))
    charts = [chart for name in names if plots and (chart := draw_evaluations(name, records)) is not None]
    return [*blocks, Figures(charts)] if charts else blocks


def measured_section(records: Sequence[RunRecord]) -> list[Block]:
    """Show what `prefopt evaluate` has found of each run, with its intervals."""
    names = list(
        dict.fromkeys((label, name) for r in records for label, found in r.measured.items() for name in found)
    )
    if not names:
        return []
    rows = [
        (label, name, *(Own(shown(r.measured.get(label, {}).get(name))) for r in records)) for label, name in names
    ]
    head = ("evaluation", "figure", *(record.name if len(records) > 1 else "value" for record in records))
    return [Heading("After training"), Table(head, rows)]


def evaluation_of(record: RunRecord) -> dict[str, float]:
    """Return the last values of an evaluation's metrics, without its times."""
    merged = {name: value for entry in [*record.evaluations, record.figures] for name, value in entry.items()}
    timed = ("_runtime", "_per_second", "_preparation_time")
    return {
        name.removeprefix("eval_"): float(value)
        for name, value in merged.items()
        if name.startswith("eval_") and not name.endswith(timed) and _is_finite(value)
    }


def _evaluated(record: RunRecord, found: Mapping[str, float], name: str) -> Own:
    if name not in found:
        return NOTHING
    interval = share_interval(record, name, found[name])
    return Own(f"{found[name]:.4g}" + ("" if interval is None else " [{:.3f}, {:.3f}]".format(*interval)))


def _is_share(name: str) -> bool:
    return name.endswith(("accuracies", "accuracy")) and not name.endswith("token_accuracy")


def share_interval(record: RunRecord, name: str, share: float) -> tuple[float, float] | None:
    """Return the interval of an accuracy over the rows of its evaluation set; None where their number is unknown."""
    if not _is_share(name) or record.facts.get("rows") != "pairs" or not 0 <= share <= 1:
        return None  # a row of several responses holds several ranked pairs
    for data in record.facts.get("data", []):
        prefix = data["name"].removeprefix("eval").lstrip("/")
        if data["name"] != "train" and name.startswith(f"{prefix}_" if prefix else ("rewards/", "accuracy")):
            rows = data["rows_kept"]
            return wilson_interval(min(rows, round(share * rows)), rows)
    return None


def draw_evaluations(name: str, records: Sequence[RunRecord]) -> str | None:
    """Draw an evaluation's metric over the steps; None where no run has evaluated more than once."""
    if not (_is_share(name) or name.endswith(("loss", "margins", "margin"))):
        return None
    lines = []
    for place, record in enumerate(records):
        found = [(e["step"], e[f"eval_{name}"]) for e in record.evaluations if _is_finite(e.get(f"eval_{name}"))]
        if not found:
            continue
        steps, values = [float(step) for step, _ in found], [float(value) for _, value in found]
        intervals = [share_interval(record, name, value) for value in values]
        low, high = zip(*intervals) if None not in intervals else (None, None)  # type: ignore[arg-type]
        lines.append(Line(record.name if len(records) > 1 else "", steps, values, low, high, colour=place))
    if not any(len(line.x) > 1 for line in lines):
        return None
    share = _is_share(name)
    return line_chart(
        lines,
        title=f"Evaluation: {name}",
        x_label="step",
        y_label="share of pairs" if share else name.rpartition("/")[2],
        at_most=1.0 if share else None,
        mark=0.5 if share else math.nan,
    )


def samples_section(record: RunRecord) -> list[Block]:
    """Show what the policy wrote before and after, beside the reference, on the same held-out prompts."""
    by_step: dict[int, dict[Any, dict[str, Any]]] = {}
    for sample in record.samples:
        if isinstance(sample.get("step"), int) and {"row_id", "prompt", "policy"} <= sample.keys():
            by_step.setdefault(sample["step"], {})[sample["row_id"]] = sample
    if not by_step:
        return []
    first, last = min(by_step), max(by_step)
    blocks: list[Block] = [Heading(f"Samples of {record.name}")]
    for row, after in list(by_step[last].items())[:SHOWN_SAMPLES]:
        before = by_step[first].get(row)
        answers = [("policy", f", step {last}", shortened(after["policy"]))]
        if before is not None and first != last:
            answers.insert(0, ("policy", f", step {first}", shortened(before["policy"])))
        if after.get("reference") is not None:
            answers.append(("reference", "", shortened(after["reference"])))
        blocks.append(Sample(shortened(after["prompt"]), answers))
    return blocks


# ---- hardware and versions


def machine_section(records: Sequence[RunRecord]) -> list[Block]:
    """Show what the runs ran on, what they took, and the versions of packages."""
    names = [record.name for record in records]
    hardware = [record.facts.get("hardware", {}) for record in records]
    rows = [(title, *_cells(found.get(key) for found in hardware)) for key, title in HARDWARE.items()]
    took = [record.figures.get("train_runtime") for record in records]
    rows.append(("training took, seconds", *_cells(took)))
    rows = [row for row in rows if any(cell is not NOTHING for cell in row[1:])]
    blocks: list[Block] = [Heading("Hardware and versions"), Table(("hardware", *names), rows)] if rows else []
    packages = dict.fromkeys(package for record in records for package in record.versions)
    if packages:
        versions = [(name, *_cells(record.versions.get(name) for record in records)) for name in packages]
        blocks.append(Table(("package", *names), versions))
    return blocks


def _cells(values: Iterable[Any]) -> list[object]:
    shown = (f"{value:.4g}" if isinstance(value, float) else value for value in values)
    return [NOTHING if value is None else value for value in shown]


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
