"""`prefopt build-pairs`: choose preference pairs among scored candidates; report drops, lengths and gaps."""

from __future__ import annotations

import sys
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from datasets import Features, List, Value

from prefopt.arguments import HubArguments, check_settings, check_together, setting
from prefopt.candidates.pairs import POLICIES, Pair, check_policy, select_pairs
from prefopt.candidates.records import (
    MESSAGE,
    PromptKind,
    Record,
    Records,
    context_as_text,
    output_file,
    push_to_hub,
)
from prefopt.candidates.tables import Again, to_dataset, write_parquet
from prefopt.data.rows import Row
from prefopt.files import atomic_path, content_hash, write_json, write_jsonl, write_text
from prefopt.intervals import wilson_interval
from prefopt.pages import escape

FILTERS = ("empty", "duplicate", "length")
TOO_FEW = "fewer than two candidates"
TOO_FEW_LEFT = "fewer than two candidates after the filters"
ALL_TIED = "all candidates tie"
GAP_TOO_SMALL = "gap below min_gap"
SAME_TEXT = "chosen and rejected are the same text"

SIDES = ("chosen", "rejected")
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
        only_for={"policy": ("best_worst", "sppo", "sppo_mean_logit")},
    )
    temperature: float = setting(
        1.0,
        "Divides the logits of the win probabilities.",
        above=0,
        only_for={"policy": ("best_worst", "sppo", "sppo_mean_logit", "gpo")},
    )
    include_self: bool = setting(
        True,
        "Count a candidate's tie with itself in its mean win probability.",
        only_for={"policy": ("sppo", "sppo_mean_logit", "gpo")},
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


class FoundPairs:
    """The pairs of all records as columns of numbers, so that a million of them take little memory.

    Attributes:
        places: for each pair the number of its record, and the indices of chosen and rejected.
        numbers: `NUMBERS` and the gap of each pair.
        lengths: characters of chosen and of rejected.
        sources: how often each source wrote the chosen and the rejected answer.
        longer, differ: prompts whose chosen answers are on average longer, and of different length at all.
        prompts: the kind of the prompts.
        context: further columns (`tools`, `chat_template_kwargs`) that some record has.
    """

    def __init__(self) -> None:
        self.places = {name: array("q") for name in ("record", "chosen", "rejected")}
        self.numbers = {name: array("d") for name in (*NUMBERS, "gap")}
        self.lengths = {side: array("d") for side in SIDES}
        self.sources: dict[str, Counter[str]] = {side: Counter() for side in SIDES}
        self.longer = self.differ = self.records = 0
        self.prompts = PromptKind()
        self.context: dict[str, None] = {}

    def __len__(self) -> int:
        return len(self.places["record"])

    def add(self, number: int, record: Record, pairs: Sequence[Pair]) -> None:
        """Add the pairs of record `number`."""
        if not pairs:
            return
        self.records += 1
        self.prompts.add(record["prompt"])
        self.context |= dict.fromkeys(context_as_text(record))
        difference = 0
        for pair in pairs:
            for name, value in (("record", number), ("chosen", pair.chosen), ("rejected", pair.rejected)):
                self.places[name].append(value)
            for name, values in self.numbers.items():
                values.append(getattr(pair, name))
            lengths = {side: len(record["candidates"][getattr(pair, side)]["text"]) for side in SIDES}
            for side, length in lengths.items():
                self.lengths[side].append(length)
                self.sources[side][record["candidates"][getattr(pair, side)]["source"]] += 1
            difference += lengths["chosen"] - lengths["rejected"]
        # pairs of one prompt count once: they are not independent
        self.longer += difference > 0
        self.differ += difference != 0


def run(args: BuildPairsArguments) -> Path:
    """Build the pairs, and write `train.<format>`, `pairs_report.md`, `.json` and (with plots) `.png` to `output_dir`.

    Returns:
        The file of pairs.

    Raises:
        ValueError: a candidate without the score, no pair at all, or pairs of another format in the folder.
    """
    path = output_file(args.output_dir, args.output_format, stem="train")
    records = Records(args.candidates, split=args.split)
    score = _score_name(records, args)
    dropped: Counter[str] = Counter()
    filtered: Counter[str] = Counter()
    found = FoundPairs()
    for number, record in enumerate(records):
        found.add(number, record, pairs_of(record, score, args, dropped=dropped, filtered=filtered))
    if not found:
        reasons = ", ".join(f"{number} x {reason}" for reason, number in dropped.most_common())
        raise ValueError(f"{args.candidates}: none of {len(records)} prompts gives a pair ({reasons}).")
    summary = summarise(found, prompts=len(records), dropped=dropped, filtered=filtered)
    names = ("policy", "probabilities", "temperature", "include_self", "min_gap", "seed")
    settings = {name: getattr(args, name) for name in names}
    summary["settings"] = {**settings, "score": score, "filters": list(args.filters)}
    write_report(args.output_dir, summary, found, plots=args.plots)
    columns = POLICIES[args.policy].columns
    rows, features = Again(lambda: pair_rows(records, found, columns)), _features(found, columns)
    if args.output_format == "jsonl":
        write_jsonl(path, rows)
    else:
        write_parquet(path, rows, features)
    print(f"build-pairs: {len(found)} pairs from {summary['prompts_with_pairs']} of {len(records)} prompts -> {path}")
    for name, number in dropped.items():
        print(f"build-pairs: {number} {name}")
    for name, number in filtered.items():
        print(f"build-pairs: {number} candidates not eligible: {name}")
    for warning in summary["warnings"]:
        print(f"build-pairs: warning: {warning}", file=sys.stderr)
    push_to_hub(args, path, lambda: to_dataset(rows, features))
    return path


def _score_name(records: Records, args: BuildPairsArguments) -> str:
    names = sorted(records.score_names)
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


def pair_rows(records: Iterable[Record], found: FoundPairs, columns: Sequence[str]) -> Iterator[Row]:
    """Make rows in the trainers' columns: `prompt_id`, `prompt`, `chosen`, `rejected`, the policy's, and both sources.

    Completions are messages where prompts are; a column has one type, so where any prompt is a message list, all
    become one.
    """
    place = 0
    for number, record in enumerate(records):
        while place < len(found) and found.places["record"][place] == number:
            sides = {side: record["candidates"][found.places[side][place]] for side in SIDES}
            row: Row = {"prompt_id": record["prompt_id"], "prompt": found.prompts.form(record["prompt"])}
            for side, candidate in sides.items():
                text = candidate["text"]
                row[side] = [{"role": "assistant", "content": text}] if found.prompts.messages else text
            row |= {column: found.numbers[column][place] for column in columns}
            row |= {f"{side}_source": candidate["source"] for side, candidate in sides.items()}
            yield row | {**dict.fromkeys(found.context), **context_as_text(record)}
            place += 1


def _features(found: FoundPairs, columns: Sequence[str]) -> Features:
    text = Value("string")
    side = List(MESSAGE) if found.prompts.messages else text
    known: dict[str, Any] = {"prompt_id": text, "prompt": found.prompts.feature, "chosen": side, "rejected": side}
    known |= {column: Value("float64") for column in columns}
    return Features(known | dict.fromkeys(("chosen_source", "rejected_source", *found.context), text))


def wilson_lower(successes: int, trials: int, *, z: float = BIAS_Z) -> float:
    """Return the lower end of the Wilson interval of a share; 0 for no trials."""
    return wilson_interval(successes, trials, z=z)[0] if trials else 0.0


def length_bias(longer: int, differ: int) -> dict[str, Any]:
    """Test whether chosen answers are systematically longer; see `BIAS_TEST`.

    Args:
        longer: prompts whose chosen answers are on average longer than their rejected ones.
        differ: prompts whose answers differ in length at all.
    """
    lower = wilson_lower(longer, differ)
    return {
        "test": BIAS_TEST,
        "prompts": differ,
        "chosen_longer": longer,
        "share": longer / differ if differ else None,
        "lower_bound": lower,
        "biased": lower > BIAS_SHARE,
    }


def summarise(
    found: FoundPairs, *, prompts: int, dropped: Mapping[str, int], filtered: Mapping[str, int]
) -> dict[str, Any]:
    """Summarise counts, lengths, gaps, means of the pairs' numbers and sources of either side, with warnings."""
    bias = length_bias(found.longer, found.differ)
    warnings = []
    if bias["biased"]:
        warnings.append(
            f"chosen is the longer answer for {100 * bias['share']:.0f} % of {bias['prompts']} prompts "
            f"({BIAS_TEST}); a model trained on these pairs will write longer answers."
        )
    return {
        "prompts": prompts,
        "prompts_with_pairs": found.records,
        "pairs": len(found),
        "dropped_prompts": dict(dropped),
        "filtered_candidates": dict(filtered),
        "characters": {side: _spread(lengths) for side, lengths in found.lengths.items()},
        "gap": _spread(found.numbers["gap"]),
        "means": {name: float(np.mean(found.numbers[name])) for name in NUMBERS},
        "sources": {side: dict(counts.most_common()) for side, counts in found.sources.items()},
        "length_bias": bias,
        "warnings": warnings,
    }


def _spread(numbers: array[float]) -> dict[str, float]:
    values = np.asarray(numbers)
    quantiles = {f"{round(100 * q)}%": float(value) for q, value in zip(QUANTILES, np.quantile(values, QUANTILES))}
    return {"mean": float(values.mean()), **quantiles}


def write_report(folder: str | Path, summary: dict[str, Any], found: FoundPairs, *, plots: bool) -> None:
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
    characters = {f"characters of {side}": summary["characters"][side] for side in SIDES}
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


def _draw(path: Path, summary: Mapping[str, Any], found: FoundPairs) -> bool:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("build-pairs: no plots, as matplotlib is missing (pip install prefopt[plots]).", file=sys.stderr)
        return False
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    lengths = np.maximum(np.array([found.lengths[side] for side in SIDES]), 1)
    bins = np.geomspace(lengths.min(), lengths.max() * 1.001, 40)
    for place, side in enumerate(SIDES):
        left.hist(lengths[place], bins=bins, alpha=0.55, label=side)
    left.set(xscale="log", xlabel="characters", ylabel="pairs", title="Length of the answers")
    left.legend()
    right.hist(np.asarray(found.numbers["gap"]), bins=40)
    right.set(xlabel="gap between chosen and rejected", ylabel="pairs", title="Gaps")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    return True
