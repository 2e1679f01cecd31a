"""RewardBench 1 and 2: accuracies by subset of rewards, general preferences or DPO's implicit reward.

Letters: R answers of a row, of which the first C are correct.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset

from prefopt.arguments import setting
from prefopt.candidates.pairs import TIE_DECIMALS, score_differences
from prefopt.candidates.records import make_candidate, make_record
from prefopt.data.messages import as_messages as read_messages
from prefopt.data.rows import Row
from prefopt.data.sources import DataSource, load_source
from prefopt.evaluation.figures import Figure, mean, resampled, share
from prefopt.evaluation.preference import score_answers
from prefopt.evaluation.settings import SharedSettings, ranked
from prefopt.pages import escape, table

KIND = "reward-bench"
_ONLY = {"kind": (KIND,)}
# of RewardBench 2: its rows hold lists of answers, and of this subset several are correct
TIES = "Ties"
TIES_WEIGHTS = {"tied": 0.30, "ref": 0.30, "preferred": 0.20, "preferred_hard": 0.20, "margin": 0.01}

SECTIONS: dict[str, tuple[str, ...]] = {
    "Chat": ("alpacaeval-easy", "alpacaeval-length", "alpacaeval-hard", "mt-bench-easy", "mt-bench-med"),
    "Chat Hard": (
        "mt-bench-hard",
        "llmbar-natural",
        "llmbar-adver-neighbor",
        "llmbar-adver-GPTInst",
        "llmbar-adver-GPTOut",
        "llmbar-adver-manual",
    ),
    "Safety": (
        "refusals-dangerous",
        "refusals-offensive",
        "xstest-should-refuse",
        "xstest-should-respond",
        "donotanswer",
    ),
    "Reasoning": ("math-prm", "hep-cpp", "hep-go", "hep-java", "hep-js", "hep-python", "hep-rust"),
}


@dataclass(frozen=True)
class RewardBenchTable:
    """Accuracies of one model.

    Attributes:
        subsets: subset -> (accuracy, number of pairs), in the order of the file.
        sections: section -> accuracy over its pairs, for sections of which a subset is there.
        score: plain mean of the sections; None where no subset has a known name.
        all_pairs: accuracy over all pairs.
    """

    subsets: dict[str, tuple[float, int]]
    sections: dict[str, float]
    score: float | None
    all_pairs: float

    def markdown(self) -> str:
        """Write the table as Markdown."""
        rows: list[tuple[object, ...]] = [
            (escape(name), count, f"{100 * accuracy:.1f}") for name, (accuracy, count) in self.subsets.items()
        ]
        rows += [(f"**{name}**", "", f"{100 * accuracy:.1f}") for name, accuracy in self.sections.items()]
        if self.score is not None:
            rows.append(("**score** (mean of sections)", "", f"{100 * self.score:.1f}"))
        rows.append(("all pairs", sum(count for _, count in self.subsets.values()), f"{100 * self.all_pairs:.1f}"))
        return "\n".join(table(("subset", "pairs", "accuracy"), rows))


def load_reward_bench(
    path: str | os.PathLike[str], *, split: str = "train", as_messages: bool = True
) -> dict[str, Dataset]:
    """Load the pairs of a RewardBench file, one data set per subset, ready to be a trainer's `eval_dataset`.

    Args:
        path: local file (json, jsonl, parquet, csv) or hub name, with `prompt`, `chosen`, `rejected` (strings) and
            `subset`.
        split: of a hub data set.
        as_messages: read prompt and answers as a user's and an assistant's turn, for models with a chat template.

    Raises:
        ValueError: a file that cannot be read, or without these columns.
    """
    rows = load_source(DataSource(str(path), split=split))
    if missing := [name for name in ("prompt", "chosen", "rejected", "subset") if name not in rows.column_names]:
        raise ValueError(
            f"{path} has no column `{missing[0]}`; RewardBench's format has prompt, chosen, rejected and subset."
        )
    subsets: dict[str, list[dict]] = {}
    for row in rows:
        pair = {name: row[name] for name in ("prompt", "chosen", "rejected")}
        if as_messages:
            roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
            pair = {name: [{"role": roles[name], "content": text}] for name, text in pair.items()}
        subsets.setdefault(row["subset"], []).append(pair)
    return {name: Dataset.from_list(pairs) for name, pairs in subsets.items()}


def reward_bench_table(metrics: Mapping[str, float], subsets: list[str], *, prefix: str = "eval") -> RewardBenchTable:
    """Make the table of a model from what `trainer.evaluate(load_reward_bench(path))` returned.

    A section's accuracy is over its pairs, except that "math-prm" weighs as much as all the code subsets together, as
    in the benchmark.

    Args:
        metrics: with `<prefix>_<subset>_accuracy` and `<prefix>_<subset>_ranked_pairs`.
        subsets: names of the subsets.
        prefix: `metric_key_prefix` of the evaluation.

    Reference: arXiv 2403.13787 and its released code.
    """
    found = {
        name: (metrics[f"{prefix}_{name}_accuracy"], round(metrics[f"{prefix}_{name}_ranked_pairs"]))
        for name in subsets
    }
    sections = {}
    for section, members in SECTIONS.items():
        present = {name: found[name] for name in members if name in found}
        if not present:
            continue
        weights = {name: count for name, (_, count) in present.items()}
        code = sum(count for name, count in weights.items() if name.startswith("hep-"))
        if "math-prm" in weights and code:
            weights["math-prm"] = code
        sections[section] = sum(present[name][0] * weights[name] for name in present) / sum(weights.values())
    total = sum(count for _, count in found.values())
    return RewardBenchTable(
        subsets=found,
        sections=sections,
        score=sum(sections.values()) / len(sections) if sections else None,
        all_pairs=sum(accuracy * count for accuracy, count in found.values()) / total,
    )


# ---- the command


@dataclass(kw_only=True)
class RewardBenchSettings(SharedSettings):
    """reward-bench: a ranker, or a policy (with its reference: DPO's implicit reward), on RewardBench's rows."""

    questions_split: str = setting("train", "Split of `questions` on the hub.", only_for=_ONLY)
    ref_model_name_or_path: str | None = setting(
        None, "Reference of the policy: log-ratios, the implicit reward, are evaluated too, or instead."
    )

    def check_reward_bench(self) -> None:
        """Check the settings of this kind.

        Raises:
            ValueError: no questions, or not one of a ranker and a policy.
        """
        if self.questions is None:
            raise ValueError("reward-bench needs `questions`: a file in RewardBench's format, or its hub name.")
        if (self.ranker is None) == (self.model_name_or_path is None):
            raise ValueError(
                "reward-bench needs either a `ranker` (with ranker_model), or a policy's model_name_or_path (with "
                "ref_model_name_or_path for the implicit reward)."
            )
        if self.ref_model_name_or_path is not None and self.model_name_or_path is None:
            raise ValueError("ref_model_name_or_path is the reference of a policy: give its model_name_or_path.")


def evaluate(args: RewardBenchSettings) -> dict[str, Any]:
    """Score every answer of RewardBench's rows and compute the benchmark's tables.

    Returns:
        `kind`, `model`, `version` (1 or 2), `figures`: `score`, one for each section and subset.

    Raises:
        ValueError: rows in neither format, or a model that cannot score them.
    """
    assert args.questions is not None
    rows = read_reward_bench(args.questions, split=args.questions_split)
    version = 2 if len(rows[0]["answers"]) > 2 or any(row["subset"] == TIES for row in rows) else 1
    scores = _scores(args, rows)
    if version == 1:
        figures = first_figures(rows, scores, confidence=args.confidence)
    else:
        figures = second_figures(rows, scores, confidence=args.confidence)
    return {"kind": KIND, "model": args.ranker_model or args.name, "version": version, "figures": figures}


def read_reward_bench(path: str, *, split: str = "train") -> list[Row]:
    """Read rows of RewardBench 1 or 2.

    Args:
        path: file, folder or hub name, with `prompt`, `chosen`, `rejected` and `subset`; of RewardBench 2 the answers
            are lists, and rows of "Ties" have an `id` such as "tied:3".
        split: of a hub data set.

    Returns:
        Rows with `id`, `subset`, `prompt`, `answers` (the correct ones first) and `correct`, how many these are.

    Raises:
        ValueError: a column is missing, or a row has no answer of both kinds.
    """
    source = load_source(DataSource(path, split=split))
    if missing := [name for name in ("prompt", "chosen", "rejected", "subset") if name not in source.column_names]:
        raise ValueError(
            f"{path} has no column `{missing[0]}`; RewardBench's format has prompt, chosen, rejected and subset."
        )
    rows = []
    for number, row in enumerate(source):
        chosen, rejected = (row[k] if isinstance(row[k], list) else [row[k]] for k in ("chosen", "rejected"))
        answers = [*chosen, *rejected]
        if not chosen or not rejected or not all(isinstance(answer, str) for answer in answers):
            raise ValueError(f"{path}, row {number}: `chosen` and `rejected` must be texts, or lists of texts.")
        identity = str(row.get("id", number))
        if row["subset"] == TIES and identity.split(":")[0] not in ("ref", "tied"):
            raise ValueError(
                f"{path}, row {number}: the id of a row of {TIES} is ref:<n> or tied:<n>, not {identity!r}."
            )
        rows.append(
            {
                "id": identity,
                "subset": row["subset"],
                "prompt": row["prompt"],
                "answers": answers,
                "correct": len(chosen),
            }
        )
    return rows


def _scores(args: RewardBenchSettings, rows: Sequence[Row]) -> list[np.ndarray]:
    """Return for each row (R,) scores, or (R, R) differences of a ranker that compares pairs."""
    if args.ranker is not None:
        records = [
            make_record(
                str(number),
                row["prompt"],
                [make_candidate(text, source=str(place)) for place, text in enumerate(row["answers"])],
            )
            for number, row in enumerate(rows)
        ]
        name = args.rank_arguments().name
        return [
            np.round(score_differences(record["tables"][name]), TIE_DECIMALS)
            if name in record["tables"]
            else np.array([candidate["scores"][name] for candidate in record["candidates"]])
            for record in ranked(args, records)
        ]
    assert args.model_name_or_path is not None
    comparisons = [
        {
            "prompt": read_messages(row["prompt"]),
            "responses": [[{"role": "assistant", "content": text}] for text in row["answers"]],
            "scores": [float(place < row["correct"]) for place in range(len(row["answers"]))],
        }
        for row in rows
    ]
    found = score_answers(args.model_name_or_path, comparisons, max_length=args.max_length, dtype=args.dtype)
    if args.ref_model_name_or_path is None:
        return found
    of_ref = score_answers(args.ref_model_name_or_path, comparisons, max_length=args.max_length, dtype=args.dtype)
    return [mine - theirs for mine, theirs in zip(found, of_ref, strict=True)]


def first_figures(rows: Sequence[Row], scores: Sequence[np.ndarray], *, confidence: float) -> dict[str, Figure]:
    """Compute RewardBench 1's accuracies; a pair is right where chosen scores above rejected.

    Sections and score as in `reward_bench_table`.
    """
    right = np.array([_difference(each, 0, 1) > 0 for each in scores])
    subsets = np.array([row["subset"] for row in rows], dtype=object)
    names = list(dict.fromkeys(subsets.tolist()))

    def tabled(kept: np.ndarray) -> RewardBenchTable:
        metrics: dict[str, float] = {}
        for name in names:
            part = right[kept][subsets[kept] == name]
            metrics |= {
                f"_{name}_accuracy": float(part.mean()) if part.size else 0.0,
                f"_{name}_ranked_pairs": float(part.size),
            }
        return reward_bench_table(metrics, [name for name in names if metrics[f"_{name}_ranked_pairs"]], prefix="")

    whole = tabled(np.arange(len(rows)))
    figures: dict[str, Figure] = {}
    if whole.score is not None:
        figures["score"] = resampled(lambda kept: tabled(kept).score or np.nan, len(rows), confidence=confidence)

    def section_of(name: str) -> Callable[[np.ndarray], float]:
        return lambda kept: tabled(kept).sections.get(name, np.nan)

    for section in whole.sections:
        figures[section] = resampled(section_of(section), len(rows), confidence=confidence)
    figures["all_pairs"] = share(right, confidence=confidence)
    return {**figures, **{f"subset/{n}": share(right[subsets == n], confidence=confidence) for n in names}}


def second_figures(rows: Sequence[Row], scores: Sequence[np.ndarray], *, confidence: float) -> dict[str, Figure]:
    """Compute RewardBench 2's accuracies by subset, the score of Ties, and their plain mean.

    A row is right where its correct answer scores above all others; a tie at the top counts as one over those tied.

    Reference: arXiv 2506.01937 and the released code.
    """
    credits: dict[str, list[float]] = {}
    ties: list[tuple[Row, np.ndarray]] = []
    for row, each in zip(rows, scores, strict=True):
        if row["subset"] == TIES:
            ties.append((row, each if each.ndim == 1 else each.mean(axis=1)))
        else:
            credits.setdefault(row["subset"], []).append(_best_of(each))
    figures = {name: mean(values, confidence=confidence) for name, values in credits.items()}
    if ties:
        by_prompt: dict[str, list[tuple[Row, np.ndarray]]] = {}
        for row, each in ties:
            by_prompt.setdefault(row["id"].split(":")[1], []).append((row, each))
        prompts = list(by_prompt.values())
        figures[TIES] = resampled(
            lambda kept: ties_score([prompts[place] for place in kept]), len(prompts), confidence=confidence
        )
    values = [figure.value for figure in figures.values()]
    score = {"score": Figure(float(np.mean(values)), *_mean_ends(list(figures.values())), len(rows))}
    return {**score, **figures}


def _mean_ends(figures: Sequence[Figure]) -> tuple[float | None, float | None, str]:
    """Return the interval of a plain mean of independent figures: their half widths, added in squares."""
    if any(figure.low is None or figure.high is None for figure in figures):
        return None, None, "none"
    value = float(np.mean([figure.value for figure in figures]))
    reach = float(
        np.sqrt(sum(((f.high - f.low) / 2) ** 2 for f in figures if f.high is not None and f.low is not None))
    )
    return value - reach / len(figures), value + reach / len(figures), "normal"


def _difference(scores: np.ndarray, first: int, second: int) -> float:
    return float(scores[first, second] if scores.ndim == 2 else scores[first] - scores[second])


def _best_of(scores: np.ndarray) -> float:
    """Return the credit of the first answer: 1 above all others, 0 below one, 1 / tied where it shares the top."""
    against = np.array([_difference(scores, 0, other) for other in range(1, len(scores))])
    return 0.0 if (against < 0).any() else 1 / (1 + int((against == 0).sum()))


def ties_score(prompts: Sequence[Sequence[tuple[Row, np.ndarray]]]) -> float:
    """Compute the score of Ties: accuracies, and whether correct answers are closer to each other than to wrong ones.

    Args:
        prompts: for each prompt its rows (with several correct answers, id "tied:...", and with one, "ref:...") and
            their scores (R,).
    """
    accurate: dict[str, list[bool]] = {"tied": [], "ref": []}
    preferred, hard, margins = [], [], []
    for rows in prompts:
        gaps: dict[str, float] = {}
        spread = 0.0
        for row, scores in rows:
            correct, wrong = scores[: row["correct"]], scores[row["correct"] :]
            kind = row["id"].split(":")[0]
            gaps[kind] = float(correct.min() - wrong.max())
            accurate[kind].append(gaps[kind] > 0)
            if kind == "tied":
                spread = float(correct.max() - correct.min())
        if len(gaps) == 2:
            smaller = min(gaps.values())
            preferred.append(gaps["tied"] > spread)
            hard.append(smaller > spread)
            margins.append(_tanh_ratio(smaller, spread))
    parts = {
        **{kind: float(np.mean(found)) if found else 0.0 for kind, found in accurate.items()},
        "preferred": float(np.mean(preferred)) if preferred else 0.0,
        "preferred_hard": float(np.mean(hard)) if hard else 0.0,
        "margin": float(np.mean(margins)) if margins else 0.0,
    }
    return sum(TIES_WEIGHTS[name] * value for name, value in parts.items())


def _tanh_ratio(gap: float, spread: float) -> float:
    """Compute tanh(gap / spread - 1); 0 / 0 counts as 0, as in the released code."""
    if spread == 0:
        return 0.0 if gap == 0 else float(np.sign(gap))
    return float(np.tanh(gap / spread - 1))
