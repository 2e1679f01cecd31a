"""One evaluation of `prefopt evaluate`: a model on pairs, answers against others' answers, or a benchmark."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from prefopt.arguments import check_together, missing, setting
from prefopt.candidates.records import Record, read_records
from prefopt.candidates.shards import current_processes
from prefopt.data import DataArguments, DataSource, load_datasets
from prefopt.data.messages import as_messages
from prefopt.data.sources import load_source
from prefopt.evaluation import alpaca_eval, arena_hard, lm_eval, mt_bench, reward_bench
from prefopt.evaluation.alpaca_eval import AlpacaEvalSettings, export
from prefopt.evaluation.arena_hard import ArenaHardSettings
from prefopt.evaluation.figures import EVALUATION_FILE as EVALUATION_FILE  # the file that `run` writes
from prefopt.evaluation.figures import Figure, shown, write_evaluation
from prefopt.evaluation.lm_eval import LMEvalSettings
from prefopt.evaluation.mt_bench import MTBenchSettings
from prefopt.evaluation.preference import (
    PairScores,
    by_source,
    pair_figures,
    preference_result,
    score_pairs,
    split_by_column,
)
from prefopt.evaluation.reward_bench import RewardBenchSettings
from prefopt.evaluation.settings import ranked
from prefopt.evaluation.study import report_study
from prefopt.evaluation.win_rate import (
    join_answers,
    length_controlled_win_rate,
    length_statistics,
    order_consistency,
    win_rate,
)
from prefopt.files import user_path
from prefopt.launch import print_on_main
from prefopt.pages import escape, table

POLICY = "policy"
SAMPLES = 4
_OF_ANSWERS = ("win_rate", "length_controlled_win_rate", "same_winner_in_both_orders")

# kind -> what evaluates it; pairs and generations may be asked for together, and have their own keys
KIND_FUNCTIONS: dict[str, Callable[[Any], dict[str, Any]]] = {
    alpaca_eval.KIND: alpaca_eval.evaluate,
    arena_hard.KIND: arena_hard.evaluate,
    mt_bench.KIND: mt_bench.evaluate,
    reward_bench.KIND: reward_bench.evaluate,
    lm_eval.KIND: lm_eval.evaluate,
}


@dataclass
class EvaluateArguments(AlpacaEvalSettings, ArenaHardSettings, MTBenchSettings, RewardBenchSettings, LMEvalSettings):
    """What is evaluated: a model on pairs, answers against others' answers under a ranker, or a benchmark."""

    study: str | None = setting(
        None, "Folder of a `prefopt sweep`: write its table, plot and verdict from the runs that are done."
    )
    opponents: dict[str, str] = setting(
        factory=dict, help="Others' answers to the same prompts, by name: {base: folder, previous: folder}."
    )
    min_win_rate: float | None = setting(
        None,
        "Stop rule: the win rate against `previous` (without it, the first opponent) must be at least this.",
        at_least=0,
        at_most=1,
    )
    max_length_ratio: float | None = setting(
        None, "Stop rule: the policy's mean answer is at most this many times as long as that of `base`.", above=0
    )

    pairs: str | None = setting(None, "Preference pairs: hub name, file or folder.")
    pairs_split: str = setting("train", "Split of `pairs`.")
    source_column: str | None = setting(None, "Column of `pairs` by whose values accuracies are given too.")
    beta: float = setting(0.1, "Scale of the implicit reward, for its calibration.", above=0)

    def __post_init__(self) -> None:
        if self.study is not None:
            if self.answers is not None or self.pairs is not None:
                raise ValueError("`study` is evaluated by itself: remove `answers` and `pairs`.")
            return
        if not self.output_dir:
            raise ValueError(missing("output_dir"))
        self.check_shared()
        if self.kind in KIND_FUNCTIONS:
            self._check_kind()
            return
        self._check_pairs_and_answers()

    def _check_kind(self) -> None:
        for name in ("opponents", "pairs", "source_column"):
            if getattr(self, name):
                raise ValueError(f"`{name}` is not read with kind {self.kind}: remove it.")
        checks = {
            alpaca_eval.KIND: self.check_alpaca_eval,
            arena_hard.KIND: self.check_arena_hard,
            mt_bench.KIND: self.check_mt_bench,
            reward_bench.KIND: self.check_reward_bench,
            lm_eval.KIND: self.check_lm_eval,
        }
        checks[self.kind or ""]()

    def _check_pairs_and_answers(self) -> None:
        if {"pairs": self.answers, "generations": self.pairs}.get(self.kind or "") is not None:
            raise ValueError(
                f"kind {self.kind} reads only one of `pairs` and `answers`: remove the other, or the kind."
            )
        if self.answers is None and self.pairs is None:
            raise ValueError(
                "nothing to evaluate: give `answers` (with `opponents` and `ranker`), `pairs`, a `kind`, a suite "
                "(`evaluation`), or a `study`."
            )
        if self.pairs is not None or not (self.alpaca_eval_family and self.model_name_or_path):
            check_together(self, "pairs", "model_name_or_path")
        for name in ("source_column", "ref_model_name_or_path"):
            if getattr(self, name) is not None and self.pairs is None:
                raise ValueError(f"`{name}` is about `pairs`, which are not given.")
        check_together(self, "opponents", "ranker")
        if self.opponents and self.answers is None:
            raise ValueError("`opponents` have nobody to play against: give the policy's `answers`.")
        if POLICY in self.opponents:
            raise ValueError(f"`opponents`: choose another name than {POLICY!r}, which is the policy's own.")
        if self.min_win_rate is not None and not self.opponents:
            raise ValueError("`min_win_rate` needs `opponents`.")
        if self.max_length_ratio is not None and "base" not in self.opponents:
            raise ValueError("`max_length_ratio` compares with the opponent `base`, which is not there.")
        if (self.alpaca_eval or self.alpaca_eval_family) and self.answers is None:
            raise ValueError("`alpaca_eval` writes the policy's `answers`, which are not given.")
        if self.alpaca_eval_family is not None and self.alpaca_eval is None:
            raise ValueError("`alpaca_eval_family` needs `alpaca_eval`, the model's name.")


def run(args: EvaluateArguments) -> dict[str, Any]:
    """Evaluate and write `evaluation.json` and `evaluation.md`.

    Returns:
        The content of `evaluation.json`; see docs/evaluation.md. Of a study the lines of its verdict.

    Raises:
        ValueError: answers that cannot be compared, a ranker, pairs or a file that cannot be used.
    """
    if args.study is not None:
        verdict = report_study(user_path(args.study))
        return {"verdict": verdict.lines}
    if args.kind in KIND_FUNCTIONS:
        return write_evaluation(Path(args.output_dir), KIND_FUNCTIONS[args.kind](args))
    result: dict[str, Any] = {
        "kind": args.kind or ("pairs" if args.answers is None else "generations"),
        "model": args.model_name or args.model_name_or_path,
        "figures": {},
        "win_rates": {},
        "scores": {},
        "lengths": {},
        "preference": None,
        "samples": [],
        "stop": None,
    }
    if args.answers is not None:
        _compare(args, result)
    if args.pairs is not None:
        _score(args, result)
    result["stop"] = stop_reason(result, min_win_rate=args.min_win_rate, max_length_ratio=args.max_length_ratio)
    return write_evaluation(Path(args.output_dir), result, page=_page(result), summary=summary(result))


def _score(args: EvaluateArguments, result: dict[str, Any]) -> None:
    """Add to `result` how the model scores the pairs, by itself and against its reference."""
    assert args.model_name_or_path is not None and args.pairs is not None
    source = DataSource(args.pairs, split=args.pairs_split)
    if args.source_column is None:
        sets = {"": load_datasets(DataArguments(train=[source]))[0]}
    else:
        parts = split_by_column(load_source(source), args.source_column)
        sets = {name: rows.remove_columns(args.source_column) for name, rows in parts.items()}
    scores = score_pairs(args.model_name_or_path, sets, max_length=args.max_length, dtype=args.dtype)
    result["preference"] = asdict(preference_result(scores))
    compared = {"": (scores, 1.0)}
    if args.ref_model_name_or_path is not None:
        reference = score_pairs(args.ref_model_name_or_path, sets, max_length=args.max_length, dtype=args.dtype)
        compared["reference/"] = (scores.against(reference), args.beta)
    for prefix, (each, beta) in compared.items():
        figures = pair_figures(each, beta=beta, confidence=args.confidence)
        result["figures"] |= {f"{prefix}{name}": figure for name, figure in figures.items()}
    if args.source_column is not None:
        result["by_source"] = _by_source({prefix: each for prefix, (each, _) in compared.items()}, args.confidence)


def _by_source(scores: dict[str, PairScores], confidence: float) -> dict[str, dict[str, Figure]]:
    found: dict[str, dict[str, Figure]] = {}
    for prefix, each in scores.items():
        for source, figures in by_source(each, confidence=confidence).items():
            found.setdefault(source, {}).update({f"{prefix}{name}": figure for name, figure in figures.items()})
    return found


def _page(result: dict[str, Any]) -> list[str]:
    """Return the lines of the page about the sources of pairs."""
    sources = result.get("by_source")
    if not sources:
        return []
    names = list(next(iter(sources.values())))
    rows = [(escape(source), *(shown(asdict(f[name])) for name in names)) for source, f in sources.items()]
    return [*table(("source", *names), rows), ""]


def _compare(args: EvaluateArguments, result: dict[str, Any]) -> None:
    """Add to `result` how the policy's answers compare with the opponents'."""
    assert args.answers is not None
    answers = {name: read_records(place) for name, place in {POLICY: args.answers, **args.opponents}.items()}
    joined, lacking = join_answers(answers)
    if lacking:
        print_on_main(f"{lacking} prompts were not answered by all of {', '.join(answers)}, and are left out.")
    result["prompts"], result["prompts_left_out"] = len(joined), lacking
    if args.opponents:
        joined = ranked(args, joined)
        score = args.rank_arguments().name
        for name in args.opponents:
            _against(name, joined, score, args.confidence, result)
        result["scores"] = mean_scores(joined, score)
    result["lengths"] = {name: length_statistics(joined, name) for name in answers}
    result["samples"] = [_sample(record) for record in joined[:SAMPLES]]
    if args.alpaca_eval is not None and current_processes().is_main:
        export(
            Path(args.output_dir) / "alpaca_eval",
            answers[POLICY],
            generator=args.alpaca_eval,
            model=args.model_name_or_path,
            family=args.alpaca_eval_family,
        )


def _against(name: str, joined: list[Record], score: str, confidence: float, result: dict[str, Any]) -> None:
    """Add to `result` the win rate against one opponent: plain, without length, and how far the order decides."""
    found = win_rate(joined, score, POLICY, name, confidence=confidence)
    controlled = length_controlled_win_rate(joined, score, POLICY, name, confidence=confidence)
    result["win_rates"][name] = {**asdict(found), "length_controlled": asdict(controlled)}
    figures = {
        "win_rate": Figure(found.win_rate, found.low, found.high, found.interval, found.prompts),
        "length_controlled_win_rate": controlled,
        "same_winner_in_both_orders": order_consistency(joined, score, POLICY, name, confidence=confidence),
    }
    result["figures"] |= {f"{each}/{name}": figure for each, figure in figures.items() if figure is not None}


def mean_scores(records: list[Record], score: str) -> dict[str, float]:
    """Compute each policy's mean score over all its answers; empty where the ranker compares pairs."""
    found: dict[str, list[float]] = {}
    for candidate in (candidate for record in records for candidate in record["candidates"]):
        if score in candidate["scores"]:
            found.setdefault(candidate["source"], []).append(candidate["scores"][score])
    return {name: fmean(scores) for name, scores in found.items()}


def _sample(record: Record) -> dict[str, Any]:
    """Return a prompt's first answer of each policy, with its score, to be read by a person."""
    first: dict[str, Any] = {}
    for candidate in record["candidates"]:
        first.setdefault(
            candidate["source"], {"text": candidate["text"], "score": next(iter(candidate["scores"].values()), None)}
        )
    return {"prompt": as_messages(record["prompt"])[-1]["content"], "answers": first}


def length_ratio(result: dict[str, Any], opponent: str = "base") -> float | None:
    """Divide the policy's mean length by an opponent's: in tokens where known, else in characters."""
    if opponent not in result["lengths"]:
        return None
    mine, theirs = result["lengths"][POLICY], result["lengths"][opponent]
    unit = "mean_tokens" if "mean_tokens" in mine and "mean_tokens" in theirs else "mean_characters"
    return mine[unit] / theirs[unit] if theirs[unit] else None


def stop_reason(result: dict[str, Any], *, min_win_rate: float | None, max_length_ratio: float | None) -> str | None:
    """Return the reason why a loop should end after this evaluation, or None."""
    if min_win_rate is not None:
        opponent = "previous" if "previous" in result["win_rates"] else next(iter(result["win_rates"]))
        rate = result["win_rates"][opponent]["win_rate"]
        if rate < min_win_rate:
            return f"the win rate against {opponent} is {rate:.3f}, below {min_win_rate}"
    ratio = length_ratio(result)
    if max_length_ratio is not None and ratio is not None and ratio > max_length_ratio:
        return f"answers are {ratio:.2f} times as long as those of base, more than {max_length_ratio}"
    return None


def summary(result: dict[str, Any]) -> str:
    """Return the figures in a few lines."""
    lines = [
        f"evaluate: win rate against {name}: {found['win_rate']:.3f} [{found['low']:.3f}, {found['high']:.3f}] "
        f"({found['interval']}), {found['wins']} won, {found['ties']} tied, {found['losses']} lost "
        f"on {found['prompts']} prompts; at equal lengths {found['length_controlled']['value']:.3f}"
        for name, found in result["win_rates"].items()
    ]
    lines += [f"evaluate: answers of {name}: {json.dumps(found)}" for name, found in result["lengths"].items()]
    of_pairs = {} if result["preference"] is None else result["figures"]
    lines += [
        f"evaluate: {name}: {shown(asdict(figure))} ({figure.count})"
        for name, figure in of_pairs.items()
        if name.split("/")[0] not in _OF_ANSWERS
    ]
    if result["stop"] is not None:
        lines.append(f"evaluate: stop: {result['stop']}")
    return "\n".join(lines)
