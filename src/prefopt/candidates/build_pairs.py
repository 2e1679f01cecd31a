"""`prefopt build-pairs`: choose preference pairs among scored candidates; report drops, lengths and gaps."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from datasets import Dataset, Features

from prefopt.arguments import HubArguments, check_settings, check_together, setting
from prefopt.candidates.pairs import POLICIES, Pair, check_policy, select_pairs
from prefopt.candidates.records import (
    Record,
    context_as_text,
    output_file,
    prompt_feature,
    push_to_hub,
    read_records,
    score_names,
)
from prefopt.data.messages import as_messages
from prefopt.files import atomic_path, content_hash, write_json, write_jsonl, write_text
from prefopt.intervals import wilson_interval
from prefopt.pages import escape

FILTERS = ("empty", "duplicate", "length")
TOO_FEW = "fewer than two candidates"
TOO_FEW_LEFT = "fewer than two candidates after the filters"
ALL_TIED = "all candidates tie"
GAP_TOO_SMALL = "gap below min_gap"
SAME_TEXT = "chosen and rejected are the same text"

NUMBERS = ("chosen_win_prob", "rejected_win_prob", "chosen_over_rejected_prob", "chosen_score", "rejected_score")
QUANTILES = (0.0, 0.1, 0.5, 0.9, 1.0)
BIAS_SHARE = 0.55
BIAS_Z = 2.576  # 99 % two-sided
BIAS_TEST = (
    "sign test over prompts: of the prompts whose chosen answers are on average longer or shorter (in characters) "
    "than their rejected ones, "
    f"the 99 % Wilson interval of the share with longer ones lies above {BIAS_SHARE}"
)


@dataclass
class BuildPairsArguments(HubArguments):
    """Which candidates are read, how pairs are chosen, and where they go."""

    candidates: str = setting(
        "", "Scored candidates: the folder that `prefopt rank` wrote, a file, or a hub dataset.", required=True
    )
    output_dir: str = setting("", "Folder for train.parquet (or train.jsonl) and the report.", required=True)
    policy: str = setting("best_worst", f"How pairs are chosen: {', '.join(POLICIES)}.", choices=tuple(POLICIES))
    score: str | None = setting(None, "Name of the scores to use; may be left out where there is only one.")
    split: str = setting("train", "Split of the candidates, where they come from a dataset.")

    probabilities: Literal["pairwise", "aggregate"] = setting(
        "pairwise",
        "Win probabilities from the table of pairwise logits, or from each candidate's mean logit.",
        choices=("pairwise", "aggregate"),
        only_for={"policy": ("best_worst", "sppo")},
    )
    temperature: float = setting(
        1.0,
        "Divides the logits of the win probabilities.",
        above=0,
        only_for={"policy": ("best_worst", "sppo", "gpo")},
    )
    include_self: bool = setting(
        True, "Count a candidate's tie with itself in its mean win probability.", only_for={"policy": ("sppo", "gpo")}
    )
    min_gap: float = setting(
        0.0, "Least difference between chosen and rejected in what the policy ranks by.", at_least=0
    )
    keep: list[str] = setting(
        help="Candidates that may be chosen or rejected although they are empty, duplicate (of an earlier one) or "
        "length (cut off by the token limit). Such candidates are passed over unless named here, but count in the "
        "means; sppo_paper keeps all.",
        factory=list,
    )
    seed: int = setting(
        42,
        "Seed of best_random; each prompt draws with one made of it and its prompt_id.",
        only_for={"policy": ("best_random",)},
    )
    plots: bool = setting(True, "Draw lengths and gaps (needs matplotlib, the extra `plots`).", decides_result=False)

    def __post_init__(self) -> None:
        check_settings(self)
        check_together(self, "push_to_hub", "hub_dataset_id")
        check_policy(self.policy, self.probabilities, self.temperature, self.include_self)
        if self.policy == "sppo_paper" and self.keep:
            raise ValueError("sppo_paper passes over no candidate; leave `keep` out.")
        unknown = [name for name in self.keep if name not in FILTERS]
        if unknown:
            raise ValueError(f"keep takes {', '.join(FILTERS)}, not {unknown[0]!r}.")

    @property
    def filters(self) -> tuple[str, ...]:
        """The filters in force."""
        return () if self.policy == "sppo_paper" else tuple(name for name in FILTERS if name not in self.keep)


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


def run(args: BuildPairsArguments) -> Path:
    """Build the pairs, and write `train.<format>`, `pairs_report.md`, `.json` and (with plots) `.png` to `output_dir`.

    Returns:
        The file of pairs.

    Raises:
        ValueError: a candidate without the score, no pair at all, or pairs of another format in the folder.
    """
    path = output_file(args.output_dir, args.output_format, stem="train")
    records = read_records(args.candidates, split=args.split)
    score = _score_name(records, args)
    dropped: Counter[str] = Counter()
    filtered: Counter[str] = Counter()
    found = [
        PairRecord(record, pair)
        for record in records
        for pair in pairs_of(record, score, args, dropped=dropped, filtered=filtered)
    ]
    if not found:
        reasons = ", ".join(f"{number} x {reason}" for reason, number in dropped.most_common())
        raise ValueError(f"{args.candidates}: none of {len(records)} prompts gives a pair ({reasons}).")
    summary = summarise(found, prompts=len(records), dropped=dropped, filtered=filtered)
    names = ("policy", "probabilities", "temperature", "include_self", "min_gap", "seed")
    settings = {name: getattr(args, name) for name in names}
    summary["settings"] = {**settings, "score": score, "filters": list(args.filters)}
    write_report(args.output_dir, summary, found, plots=args.plots)
    dataset = _write(path, pair_rows(found, POLICIES[args.policy].columns), args.output_format)
    print(f"build-pairs: {len(found)} pairs from {summary['prompts_with_pairs']} of {len(records)} prompts -> {path}")
    for name, number in dropped.items():
        print(f"build-pairs: {number} {name}")
    for name, number in filtered.items():
        print(f"build-pairs: {number} candidates not eligible: {name}")
    for warning in summary["warnings"]:
        print(f"build-pairs: warning: {warning}", file=sys.stderr)
    push_to_hub(args, lambda: dataset)
    return path


def _score_name(records: Sequence[Record], args: BuildPairsArguments) -> str:
    names = sorted({name for record in records for name in score_names(record)})
    if args.score is not None and args.score not in names:
        raise ValueError(
            f"{args.candidates} has no scores named {args.score!r}; it has "
            f"{names or 'none: run `prefopt rank` first'}."
        )
    if args.score is None and len(names) != 1:
        hint = "run `prefopt rank` first." if not names else f"choose one with --score: {', '.join(names)}."
        raise ValueError(f"{args.candidates} has {len(names)} kinds of scores; {hint}")
    return args.score or names[0]


def pairs_of(
    record: Record, score: str, args: BuildPairsArguments, *, dropped: Counter[str], filtered: Counter[str]
) -> list[Pair]:
    """Choose the pairs of one record; count in `dropped` why there is none, in `filtered` ineligible candidates."""
    candidates = record["candidates"]
    if len(candidates) < 2:
        dropped[TOO_FEW] += 1
        return []
    scores = _scores(record, score)
    eligible = _eligible(candidates, args.filters, filtered)
    if sum(eligible) < 2:
        dropped[TOO_FEW_LEFT] += 1
        return []
    texts = [candidate["text"] for candidate in candidates]

    def select(min_gap: float) -> list[Pair]:
        return select_pairs(
            texts,
            scores,
            policy=args.policy,
            seed=content_hash(args.seed, record["prompt_id"]),
            probabilities=args.probabilities,
            temperature=args.temperature,
            include_self=args.include_self,
            min_gap=min_gap,
            eligible=eligible,
        )

    pairs = select(args.min_gap)
    if not pairs:
        dropped[GAP_TOO_SMALL if args.min_gap > 0 and select(0.0) else ALL_TIED] += 1
        return []
    different = [pair for pair in pairs if texts[pair.chosen] != texts[pair.rejected]]
    if not different:
        dropped[SAME_TEXT] += 1
    return different


def _scores(record: Record, score: str) -> Any:
    if score in record["tables"]:
        return record["tables"][score]
    missing = [number for number, candidate in enumerate(record["candidates"]) if score not in candidate["scores"]]
    if missing:
        raise ValueError(
            f"Row {record['prompt_id']!r}: candidate {missing[0]} has no score {score!r}; rank the candidates again."
        )
    return [candidate["scores"][score] for candidate in record["candidates"]]


def _eligible(candidates: Sequence[dict[str, Any]], filters: Sequence[str], filtered: Counter[str]) -> list[bool]:
    seen: set[str] = set()
    eligible = []
    for candidate in candidates:
        text = candidate["text"]
        reasons = {
            "empty": not text.strip(),
            "length": candidate["finish_reason"] == "length",
            "duplicate": text in seen,
        }
        reason = next((name for name, holds in reasons.items() if holds and name in filters), None)
        if reason is None:
            seen.add(text)
        else:
            filtered[reason] += 1
        eligible.append(reason is None)
    return eligible


def pair_rows(found: Sequence[PairRecord], columns: Sequence[str]) -> list[dict[str, Any]]:
    """Make rows in the trainers' columns: `prompt_id`, `prompt`, `chosen`, `rejected`, the policy's, and both sources.

    Completions are messages where prompts are; a column has one type, so where any prompt is a message list, all
    become one.
    """
    as_lists = any(isinstance(item.record["prompt"], list) for item in found)
    rows = []
    for item in found:
        record, pair = item.record, item.pair
        row: dict[str, Any] = {
            "prompt_id": record["prompt_id"],
            "prompt": as_messages(record["prompt"]) if as_lists else record["prompt"],
        }
        for side, index in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            text = record["candidates"][index]["text"]
            row[side] = [{"role": "assistant", "content": text}] if as_lists else text
        row |= {column: getattr(pair, column) for column in columns}
        row |= {
            f"{side}_source": record["candidates"][getattr(pair, side)]["source"] for side in ("chosen", "rejected")
        }
        row |= context_as_text(record)
        rows.append(row)
    names = list(dict.fromkeys(name for row in rows for name in row))
    return [{name: row.get(name) for name in names} for row in rows]


def _write(path: Path, rows: list[dict[str, Any]], output_format: str) -> Dataset:
    others = Dataset.from_list([{name: value for name, value in row.items() if name != "prompt"} for row in rows])
    features = {name: prompt_feature(rows) if name == "prompt" else others.features[name] for name in rows[0]}
    dataset = Dataset.from_list(rows, features=Features(features))
    if output_format == "jsonl":
        write_jsonl(path, rows)
    else:
        with atomic_path(path) as temporary:
            dataset.to_parquet(str(temporary))
    return dataset


def wilson_lower(successes: int, trials: int, *, z: float = BIAS_Z) -> float:
    """Return the lower end of the Wilson interval of a share; 0 for no trials."""
    return wilson_interval(successes, trials, z=z)[0] if trials else 0.0


def length_bias(found: Sequence[PairRecord]) -> dict[str, Any]:
    """Test whether chosen answers are systematically longer; see `BIAS_TEST`.

    Pairs of one prompt count once: they are not independent.
    """
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
    """Summarise counts, lengths, gaps, means of the pairs' numbers and sources of either side, with warnings."""
    lengths = np.array([item.lengths for item in found], dtype=float)
    bias = length_bias(found)
    warnings = []
    if bias["biased"]:
        warnings.append(
            f"chosen is the longer answer for {100 * bias['share']:.0f} % of {bias['prompts']} prompts "
            f"({BIAS_TEST}); a model trained on these pairs will write longer answers."
        )
    return {
        "prompts": prompts,
        "prompts_with_pairs": len({item.record["prompt_id"] for item in found}),
        "pairs": len(found),
        "dropped_prompts": dict(dropped),
        "filtered_candidates": dict(filtered),
        "characters": {side: _spread(lengths[:, place]) for place, side in enumerate(("chosen", "rejected"))},
        "gap": _spread(np.array([item.pair.gap for item in found], dtype=float)),
        "means": {name: float(np.mean([getattr(item.pair, name) for item in found])) for name in NUMBERS},
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
    """Format the report as a page."""
    prompts_with_pairs, prompts = summary["prompts_with_pairs"], summary["prompts"]
    lines = [
        "# Preference pairs",
        "",
        f"{summary['pairs']} pairs from {prompts_with_pairs} of {prompts} prompts.",
        "",
        *(f"**Warning:** {escape(warning)}\n" for warning in summary["warnings"]),
    ]
    counts = {f"prompt dropped: {reason}": number for reason, number in summary["dropped_prompts"].items()}
    counts |= {f"candidate not eligible: {reason}": n for reason, n in summary["filtered_candidates"].items()}
    if counts:
        lines += _table(("not used", "number"), ([name, str(number)] for name, number in counts.items()))
    characters = {f"characters of {side}": summary["characters"][side] for side in ("chosen", "rejected")}
    spreads = {**characters, "gap": summary["gap"]}
    lines += _table(
        ("", *summary["gap"]),
        ([name, *(f"{value:.4g}" for value in spread.values())] for name, spread in spreads.items()),
    )
    lines += _table(
        ("mean over pairs", ""), ([escape(name), f"{value:.4f}"] for name, value in summary["means"].items())
    )
    chosen, rejected = summary["sources"]["chosen"], summary["sources"]["rejected"]
    lines += _table(
        ("source", "chosen", "rejected"),
        ([escape(name), str(chosen.get(name, 0)), str(rejected.get(name, 0))] for name in {**chosen, **rejected}),
    )
    bias = summary["length_bias"]
    share = "no prompt has answers of different length"
    if bias["share"] is not None:
        share = f"{100 * bias['share']:.1f} % of {bias['prompts']} prompts"
    lines += [
        f"Length bias: chosen is longer for {share} (lower bound {100 * bias['lower_bound']:.1f} %). Warned of where, "
        f"in a {bias['test']}.",
        "",
    ]
    if "settings" in summary:
        lines += [
            "Settings: " + ", ".join(f"{name} {escape(value)}" for name, value in summary["settings"].items()) + ".",
            "",
        ]
    return "\n".join([*lines, *([f"![lengths and gaps]({picture})", ""] if picture else [])])


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a table whose first column is text and whose others are numbers."""
    body = [f"| {' | '.join(row)} |" for row in rows]
    return [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1), *body, ""]


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
