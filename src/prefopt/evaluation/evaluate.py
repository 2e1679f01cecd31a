"""`prefopt evaluate`: a policy against others under a ranker, its preference accuracy, its answers' lengths."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from prefopt.arguments import check_settings, check_together, missing, setting
from prefopt.candidates import rank
from prefopt.candidates.rank import RankArguments
from prefopt.candidates.records import Record, read_records, write_records
from prefopt.candidates.shards import current_processes
from prefopt.data import DataArguments, DataSource, load_datasets
from prefopt.data.messages import as_messages
from prefopt.evaluation.alpaca_eval import FAMILIES, export
from prefopt.evaluation.preference import preference_accuracy
from prefopt.evaluation.study import report_study
from prefopt.evaluation.win_rate import join_answers, length_statistics, win_rate
from prefopt.files import user_path, write_json
from prefopt.launch import print_on_main
from prefopt.pages import printable

EVALUATION_FILE = "evaluation.json"
POLICY = "policy"
SAMPLES = 4
SCORE = "judged"


@dataclass
class EvaluateArguments:
    """What is evaluated: answers against others' answers under a ranker, or a model on preference pairs, or both."""

    output_dir: str = setting("", "Folder for evaluation.json and the ranked answers.")
    study: str | None = setting(
        None, "Folder of a `prefopt sweep`: write its table, plot and verdict from the runs that are done."
    )
    answers: str | None = setting(
        None, "The policy's answers to held-out prompts: a folder that `prefopt generate` wrote."
    )
    opponents: dict[str, str] = setting(
        factory=dict, help="Others' answers to the same prompts, by name: {base: folder, previous: folder}."
    )
    ranker: str | None = setting(None, "Ranker that compares them, as for `prefopt rank`.")
    ranker_model: str | None = setting(None, "Its `model_name_or_path`.")
    ranker_settings: dict[str, Any] = setting(factory=dict, help="Further settings of `prefopt rank`.")
    confidence: float = setting(0.95, "Of the intervals.", above=0)

    model_name_or_path: str | None = setting(None, "The policy, to be scored on `pairs`.")
    pairs: str | None = setting(None, "Preference pairs: hub name, file or folder.")
    pairs_split: str = setting("train", "Split of `pairs`.")
    max_length: int | None = setting(None, "Tokens of prompt and answer in `pairs`; longer rows are cut.")
    dtype: str = setting("bfloat16", "Of the policy's weights on `pairs`.", choices=("bfloat16", "float16", "float32"))

    min_win_rate: float | None = setting(
        None,
        "Stop rule: the win rate against `previous` (without it, the first opponent) must be at least this.",
        at_least=0,
        at_most=1,
    )
    max_length_ratio: float | None = setting(
        None, "Stop rule: the policy's mean answer is at most this many times as long as that of `base`.", above=0
    )
    alpaca_eval: str | None = setting(
        None, "Write the answers as AlpacaEval's model_outputs.json too, under this name of the model."
    )
    alpaca_eval_family: str | None = setting(
        None, f"Write AlpacaEval's config with the published sampling: {', '.join(FAMILIES)}."
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if self.study is not None:
            if self.answers is not None or self.pairs is not None:
                raise ValueError("`study` is evaluated by itself: remove `answers` and `pairs`.")
            return
        if not self.output_dir:
            raise ValueError(missing("output_dir"))
        if self.answers is None and self.pairs is None:
            raise ValueError(
                "nothing to evaluate: give `answers` (with `opponents` and `ranker`), `pairs`, or a `study`."
            )
        check_together(self, "pairs", "model_name_or_path")
        check_together(self, "opponents", "ranker")
        if self.opponents and self.answers is None:
            raise ValueError("`opponents` have nobody to play against: give the policy's `answers`.")
        if POLICY in self.opponents:
            raise ValueError(f"`opponents`: choose another name than {POLICY!r}, which is the policy's own.")
        if not self.confidence < 1:
            raise ValueError(f"confidence must be below 1, not {self.confidence}.")
        if self.min_win_rate is not None and not self.opponents:
            raise ValueError("`min_win_rate` needs `opponents`.")
        if self.max_length_ratio is not None and "base" not in self.opponents:
            raise ValueError("`max_length_ratio` compares with the opponent `base`, which is not there.")
        if (self.alpaca_eval or self.alpaca_eval_family) and self.answers is None:
            raise ValueError("`alpaca_eval` writes the policy's `answers`, which are not given.")
        if self.alpaca_eval_family is not None and self.alpaca_eval is None:
            raise ValueError("`alpaca_eval_family` needs `alpaca_eval`, the model's name.")
        if self.ranker is not None:
            self.rank_arguments()

    def rank_arguments(self) -> RankArguments:
        """Return the settings of the ranking, checked."""
        folder = Path(self.output_dir)
        try:
            return RankArguments(
                candidates=str(folder / "answers"),
                output_dir=str(folder / "ranked"),
                ranker=self.ranker or "",
                model_name_or_path=self.ranker_model or "",
                **{"score_name": SCORE, "output_format": "jsonl", **self.ranker_settings},
            )
        except TypeError as error:
            raise ValueError(f"`ranker_settings`: {error}.") from error


def run(args: EvaluateArguments) -> dict[str, Any]:
    """Evaluate and write `evaluation.json`.

    Returns:
        Its content; of a study the lines of its verdict. `win_rates` by opponent, `scores` (means) and `lengths` by
        policy, `preference`, `samples`, `stop` (a reason, or None).

    Raises:
        ValueError: answers that cannot be compared, a ranker or pairs that cannot be used.
    """
    if args.study is not None:
        verdict = report_study(user_path(args.study))
        return {"verdict": verdict.lines}
    team = current_processes()
    result: dict[str, Any] = {
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
        assert args.model_name_or_path is not None
        rows, _ = load_datasets(DataArguments(train=[DataSource(args.pairs, split=args.pairs_split)]))
        found = preference_accuracy(args.model_name_or_path, rows, max_length=args.max_length, dtype=args.dtype)
        result["preference"] = asdict(found)
    result["stop"] = stop_reason(result, min_win_rate=args.min_win_rate, max_length_ratio=args.max_length_ratio)
    if team.is_main:
        write_json(Path(args.output_dir) / EVALUATION_FILE, result)
        print(printable(summary(result)), flush=True)
    team.gather(None)  # nobody leaves before the file is there
    return result


def _compare(args: EvaluateArguments, result: dict[str, Any]) -> None:
    """Add to `result` how the policy's answers compare with the opponents'."""
    assert args.answers is not None
    answers = {name: read_records(place) for name, place in {POLICY: args.answers, **args.opponents}.items()}
    joined, lacking = join_answers(answers)
    if lacking:
        print_on_main(f"{lacking} prompts were not answered by all of {', '.join(answers)}, and are left out.")
    result["prompts"], result["prompts_left_out"] = len(joined), lacking
    if args.opponents:
        joined = _ranked(args, joined)
        score = args.rank_arguments().name
        result["win_rates"] = {
            name: asdict(win_rate(joined, score, POLICY, name, confidence=args.confidence)) for name in args.opponents
        }
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


def _ranked(args: EvaluateArguments, joined: list[Record]) -> list[Record]:
    team = current_processes()
    settings = args.rank_arguments()
    if team.is_main:
        write_records(Path(settings.candidates) / "candidates.jsonl", joined)
    team.gather(None)
    return read_records(rank.run(settings))


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
        f"on {found['prompts']} prompts"
        for name, found in result["win_rates"].items()
    ]
    lines += [f"evaluate: answers of {name}: {json.dumps(found)}" for name, found in result["lengths"].items()]
    if result["preference"] is not None:
        lines.append(f"evaluate: preference accuracy without a reference: {json.dumps(result['preference'])}")
    if result["stop"] is not None:
        lines.append(f"evaluate: stop: {result['stop']}")
    return "\n".join(lines)
