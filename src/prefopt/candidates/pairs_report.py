"""What a set of pairs looks like: what was dropped, lengths, gaps, and whether chosen answers are simply the longer ones."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prefopt.candidates.pairs import Pair
from prefopt.candidates.records import Record
from prefopt.files import atomic_path, write_json, write_text

QUANTILES = (0.0, 0.1, 0.5, 0.9, 1.0)
BIAS_SHARE = 0.55
BIAS_Z = 2.576  # 99 % two-sided
BIAS_TEST = (
    "sign test over prompts: of the prompts whose chosen answers are on average longer or shorter (in characters) than their rejected ones, "
    f"the 99 % Wilson interval of the share with longer ones lies above {BIAS_SHARE}"
)


@dataclass(frozen=True)
class PairRecord:
    """A pair and the record that it was chosen from."""

    record: Record
    pair: Pair

    def length(self, index: int) -> int:
        """Characters of candidate `index`."""
        return len(self.record["candidates"][index]["text"])

    @property
    def lengths(self) -> tuple[int, int]:
        """Characters of chosen and rejected."""
        return self.length(self.pair.chosen), self.length(self.pair.rejected)


def wilson_lower(successes: int, trials: int, *, z: float = BIAS_Z) -> float:
    """Lower end of the Wilson interval of a share.

    Formula: with p = successes / trials, (p + z^2 / 2n - z sqrt(p (1 - p) / n + z^2 / 4 n^2)) / (1 + z^2 / n); 0 for no trials.
    """
    if trials == 0:
        return 0.0
    share, square = successes / trials, z * z
    spread = z * math.sqrt(share * (1 - share) / trials + square / (4 * trials * trials))
    return (share + square / (2 * trials) - spread) / (1 + square / trials)


def length_bias(found: Sequence[PairRecord]) -> dict[str, Any]:
    """Whether chosen answers are systematically longer; see `BIAS_TEST`. Pairs of one prompt count once: they are not independent."""
    differences: dict[str, list[int]] = {}
    for item in found:
        chosen, rejected = item.lengths
        differences.setdefault(item.record["prompt_id"], []).append(chosen - rejected)
    signs = [math.copysign(1, sum(values)) for values in differences.values() if sum(values) != 0]
    longer = sum(sign > 0 for sign in signs)
    lower = wilson_lower(longer, len(signs))
    share = longer / len(signs) if signs else None
    return {
        "test": BIAS_TEST,
        "prompts": len(signs),
        "chosen_longer": longer,
        "share": share,
        "lower_bound": lower,
        "biased": lower > BIAS_SHARE,
    }


def summarise(
    found: Sequence[PairRecord], *, prompts: int, dropped: Mapping[str, int], filtered: Mapping[str, int]
) -> dict[str, Any]:
    """Counts, quantiles of lengths and gaps, means of the pairs' numbers, sources of either side, and warnings."""
    lengths = np.array([item.lengths for item in found], dtype=float)
    bias = length_bias(found)
    warnings = []
    if bias["biased"]:
        warnings.append(
            f"chosen is the longer answer for {100 * bias['share']:.0f} % of {bias['prompts']} prompts "
            f"({BIAS_TEST}); a model trained on these pairs will write longer answers."
        )
    numbers = ("chosen_win_prob", "rejected_win_prob", "chosen_over_rejected_prob", "chosen_score", "rejected_score")
    return {
        "prompts": prompts,
        "prompts_with_pairs": len({item.record["prompt_id"] for item in found}),
        "pairs": len(found),
        "dropped_prompts": dict(dropped),
        "filtered_candidates": dict(filtered),
        "characters": {side: _spread(lengths[:, place]) for place, side in enumerate(("chosen", "rejected"))},
        "gap": _spread(np.array([item.pair.gap for item in found], dtype=float)),
        "means": {name: float(np.mean([getattr(item.pair, name) for item in found])) for name in numbers},
        "sources": {
            side: dict(
                Counter(item.record["candidates"][getattr(item.pair, side)]["source"] for item in found).most_common()
            )
            for side in ("chosen", "rejected")
        },
        "length_bias": bias,
        "warnings": warnings,
    }


def _spread(values: np.ndarray[Any, np.dtype[np.float64]]) -> dict[str, float]:
    quantiles = {f"{round(100 * q)}%": float(value) for q, value in zip(QUANTILES, np.quantile(values, QUANTILES))}
    return {"mean": float(values.mean()), **quantiles}


def write_report(folder: str | Path, summary: dict[str, Any], found: Sequence[PairRecord], *, plots: bool) -> None:
    """Write `pairs_report.json`, `pairs_report.md` and, where `plots` and matplotlib is there, `pairs_report.png`."""
    folder = Path(folder)
    drawn = plots and _draw(folder / "pairs_report.png", summary, found)
    write_json(folder / "pairs_report.json", summary)
    write_text(folder / "pairs_report.md", markdown(summary, picture="pairs_report.png" if drawn else None))


def markdown(summary: Mapping[str, Any], *, picture: str | None = None) -> str:
    """The report as a page."""
    lines = [
        "# Preference pairs",
        "",
        f"{summary['pairs']} pairs from {summary['prompts_with_pairs']} of {summary['prompts']} prompts.",
        "",
    ]
    lines += [f"**Warning:** {warning}\n" for warning in summary["warnings"]]
    counts = [("prompt dropped: " + reason, number) for reason, number in summary["dropped_prompts"].items()]
    counts += [
        ("candidate not eligible: " + reason, number) for reason, number in summary["filtered_candidates"].items()
    ]
    if counts:
        lines += ["| not used | number |", "|---|---:|", *(f"| {name} | {number} |" for name, number in counts), ""]
    spreads = [
        ("characters of chosen", summary["characters"]["chosen"]),
        ("characters of rejected", summary["characters"]["rejected"]),
    ]
    spreads.append(("gap", summary["gap"]))
    lines += ["| | " + " | ".join(spreads[0][1]) + " |", "|---|" + "---:|" * len(spreads[0][1])]
    lines += [
        f"| {name} | " + " | ".join(f"{value:.4g}" for value in spread.values()) + " |" for name, spread in spreads
    ]
    lines += [
        "",
        "| mean over pairs | |",
        "|---|---:|",
        *(f"| {name} | {value:.4f} |" for name, value in summary["means"].items()),
        "",
    ]
    sources = summary["sources"]
    names = list(dict.fromkeys([*sources["chosen"], *sources["rejected"]]))
    lines += ["| source | chosen | rejected |", "|---|---:|---:|"]
    lines += [f"| {name} | {sources['chosen'].get(name, 0)} | {sources['rejected'].get(name, 0)} |" for name in names]
    bias = summary["length_bias"]
    share = (
        "no prompt has answers of different length"
        if bias["share"] is None
        else f"{100 * bias['share']:.1f} % of {bias['prompts']} prompts"
    )
    lines += [
        "",
        f"Length bias: chosen is longer for {share} (lower bound {100 * bias['lower_bound']:.1f} %). Warned of where, in a {bias['test']}.",
        "",
    ]
    if "settings" in summary:
        lines += ["Settings: " + ", ".join(f"{name} {value}" for name, value in summary["settings"].items()) + ".", ""]
    return "\n".join([*lines, *([f"![lengths and gaps]({picture})", ""] if picture else [])])


def _draw(path: Path, summary: Mapping[str, Any], found: Sequence[PairRecord]) -> bool:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("build-pairs: no plots, as matplotlib is missing (pip install prefopt[plots]).", file=sys.stderr)
        return False
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    lengths = np.maximum(np.array([item.lengths for item in found], dtype=float), 1)
    bins = np.geomspace(lengths.min(), lengths.max() * 1.001, 40)
    for place, side in enumerate(("chosen", "rejected")):
        left.hist(lengths[:, place], bins=bins, alpha=0.55, label=side)
    left.set(xscale="log", xlabel="characters", ylabel="pairs", title="Length of the answers")
    left.legend()
    right.hist([item.pair.gap for item in found], bins=40)
    right.set(xlabel="gap between chosen and rejected", ylabel="pairs", title="Gaps")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    return True
