"""Settings that several kinds of evaluation share; a policy's answers to a benchmark's questions; their files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt.arguments import ServerArguments, check_settings, setting
from prefopt.candidates import generate, rank
from prefopt.candidates.generate import GenerateArguments
from prefopt.candidates.rank import RankArguments
from prefopt.candidates.records import Record, read_records, write_records
from prefopt.candidates.shards import current_processes
from prefopt.data.messages import TextOrMessages
from prefopt.data.rows import Row
from prefopt.files import content_hash, read_jsonl, user_path, write_jsonl

SCORE = "judged"
KINDS = ("pairs", "generations", "alpaca-eval", "arena-hard", "mt-bench", "reward-bench", "lm-eval")


@dataclass
class JudgeSettings(ServerArguments):
    """A judge behind an OpenAI-compatible server: {model: gpt-4.1, base_url: https://...}."""

    model: str = setting("", "The judge's name at its server.", required=True)
    template: str | None = setting(None, "File with its prompt, instead of the built-in one.")
    temperature: float = setting(0.0, "Of the judge.", at_least=0)
    max_tokens: int = setting(4096, "Most tokens of a judgment.", at_least=1)
    input_price: float | None = setting(None, "Price of a million input tokens, to record the cost.", at_least=0)
    output_price: float | None = setting(None, "Price of a million output tokens.", at_least=0)

    def __post_init__(self) -> None:
        check_settings(self)
        if (self.input_price is None) != (self.output_price is None):
            raise ValueError("judge: give both input_price and output_price, or neither.")


@dataclass(kw_only=True)
class SharedSettings:
    """What is evaluated, where the result goes, and who judges; read by several kinds."""

    output_dir: str = setting("", "Folder for evaluation.json, evaluation.md and what the evaluation makes.")
    kind: str | None = setting(
        None,
        f"{', '.join(KINDS)}; without it, what `pairs` and `answers` ask for.",
        choices=KINDS,
    )
    model_name_or_path: str | None = setting(None, "The model that is evaluated.")
    model_name: str | None = setting(
        None, "Its name in tables and in benchmarks' files; by default the last part of model_name_or_path."
    )
    dtype: str = setting("bfloat16", "Of the model's weights.", choices=("bfloat16", "float16", "float32"))
    max_length: int | None = setting(None, "Tokens of prompt and answer; longer rows are cut.", at_least=1)
    confidence: float = setting(0.95, "Of the intervals.", above=0)
    answers: str | None = setting(
        None, "The policy's answers to held-out prompts: a folder that `prefopt generate` wrote."
    )
    questions: str | None = setting(
        None,
        "alpaca-eval, arena-hard, mt-bench, reward-bench: the benchmark's questions, a file in its own format; of "
        "reward-bench also a folder or hub name.",
        only_for={"kind": ("alpaca-eval", "arena-hard", "mt-bench", "reward-bench")},
    )
    generation: dict[str, Any] = setting(
        factory=dict,
        help="Settings of `prefopt generate` for the answers to `questions`: backend, temperature, max_new_tokens, "
        "...",
        only_for={"kind": ("alpaca-eval", "arena-hard", "mt-bench")},
    )
    judge: JudgeSettings | None = setting(
        None,
        "arena-hard, mt-bench: the judge: {model: ..., base_url: ..., key_variable: ..., template: ..., max_tokens: "
        "..., input_price: ..., output_price: ...}.",
        only_for={"kind": ("arena-hard", "mt-bench")},
    )
    ranker: str | None = setting(None, "Ranker that compares answers, as for `prefopt rank`.")
    ranker_model: str | None = setting(None, "Its `model_name_or_path`.")
    ranker_settings: dict[str, Any] = setting(factory=dict, help="Further settings of `prefopt rank`.")

    @property
    def name(self) -> str:
        """Name of the model in tables and files.

        Raises:
            ValueError: neither `model_name` nor `model_name_or_path` is given.
        """
        found = self.model_name or (self.model_name_or_path or "").rstrip("/").rsplit("/", 1)[-1]
        if not found:
            raise ValueError("the model has no name: give model_name or model_name_or_path.")
        return found

    def check_shared(self) -> None:
        """Check the settings that several kinds read.

        Raises:
            ValueError: one of them is out of bounds or misses another.
        """
        check_settings(self)
        if self.ranker is None and (self.ranker_model or self.ranker_settings):
            raise ValueError("ranker_model and ranker_settings belong to a `ranker`: name its kind.")
        if not self.confidence < 1:
            raise ValueError(f"confidence must be below 1, not {self.confidence}.")
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

    def generate_arguments(self, prompts: Path, folder: Path) -> GenerateArguments:
        """Return the settings of the generation, checked: one sample a prompt."""
        if self.model_name_or_path is None:
            raise ValueError("model_name_or_path is missing: it answers the `questions`.")
        try:
            return GenerateArguments(
                model_name_or_path=self.model_name_or_path,
                prompts=str(prompts),
                output_dir=str(folder),
                num_samples=1,
                for_evaluation=True,
                **{"dtype": self.dtype, "output_format": "jsonl", **self.generation},
            )
        except TypeError as error:
            raise ValueError(f"`generation`: {error}.") from error


def ranked(args: SharedSettings, records: Sequence[Record]) -> list[Record]:
    """Write candidates, rank them with the ranker of the settings on all processes, and read them with its scores."""
    team = current_processes()
    settings = args.rank_arguments()
    if team.is_main:
        write_records(Path(settings.candidates) / "candidates.jsonl", records)
    team.gather(None)
    return read_records(rank.run(settings))


def answer_questions(args: SharedSettings, prompts: Mapping[str, TextOrMessages], folder: Path) -> dict[str, Row]:
    """Sample one answer to each prompt, on all processes; a run that was stopped continues.

    Args:
        args: the model, and `generation`.
        prompts: id -> prompt.
        folder: where prompts and answers go.

    Returns:
        id -> `text`, `finish_reason`, `num_tokens`.

    Raises:
        ValueError: a prompt was skipped or its answer failed.
    """
    team = current_processes()
    place = folder / "prompts.jsonl"
    settings = args.generate_arguments(place, folder)
    if team.is_main:
        write_jsonl(place, [{"prompt_id": name, "prompt": prompt} for name, prompt in prompts.items()])
    team.gather(None)
    records = read_records(generate.run(settings))
    found = {record["prompt_id"]: record["candidates"][0] for record in records if record["candidates"]}
    if lacking := [name for name in prompts if name not in found]:
        raise ValueError(
            f"{len(lacking)} of {len(prompts)} questions have no answer, such as {lacking[0]!r}; {folder} says why."
        )
    return found


def read_rows(path: str, needed: Sequence[str]) -> list[Row]:
    """Read the rows of a benchmark's file, a JSON list or JSON lines.

    Raises:
        ValueError: it cannot be read, or a row lacks one of the `needed` fields.
    """
    place = user_path(path)
    if place.suffix == ".json":
        try:
            rows = json.loads(place.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is no JSON ({error}).") from None
    else:
        rows = read_jsonl(place)
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} must hold a list of rows, as JSON or JSON lines; it holds none.")
    for number, row in enumerate(rows):
        if absent := [name for name in needed if row.get(name) is None]:
            raise ValueError(f"{path}, row {number}: no {absent[0]!r}; its rows need {', '.join(needed)}.")
    return rows


def prompt_hash(template: str) -> str:
    """Return a short hash of a judge's prompt, which is recorded with its judgments."""
    return content_hash(template)[:16]
