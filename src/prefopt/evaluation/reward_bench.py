"""Preference accuracy by subset, in RewardBench's format: local files, any subset names."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from datasets import Dataset

from prefopt.data.sources import DataSource, load_source
from prefopt.pages import escape, table

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
