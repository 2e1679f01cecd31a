"""MT-Bench: two turns, each answer graded from 1 to 10 by one judge; by turn and category, in its own formats."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from prefopt.arguments import setting
from prefopt.candidates.rankers.judge import fill
from prefopt.candidates.shards import current_processes
from prefopt.data.messages import TextOrMessages
from prefopt.data.rows import Row
from prefopt.evaluation.figures import Figure, mean
from prefopt.evaluation.judge import ask, judge_record, judge_template
from prefopt.evaluation.settings import SharedSettings, answer_questions, prompt_hash, read_rows
from prefopt.files import content_hash, write_jsonl

KIND = "mt-bench"
_ONLY = {"kind": (KIND,)}
ANSWERS_FILE, JUDGMENTS_FILE = "model_answer.jsonl", "model_judgment.jsonl"
QUESTION_COLUMNS, ANSWER_COLUMNS = ("question_id", "category", "turns"), ("question_id", "model_id", "choices")
FIELDS = ("conversation",)
# of the answers, by category, as the benchmark has them
TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
DEFAULT_TEMPERATURE = 0.7
_RATING = re.compile(r"\[\[(\d+(?:\.\d+)?)\]\]")

TEMPLATE = """Grade the last answer of the assistant in the conversation below.

Consider whether it does what the user asks, whether what it says is true, how deep and useful it is for this user, \
and how well it is written. Earlier turns are context only. Length is no merit of its own. Where an expert's answer \
is given, compare with it and name every mistake.

<conversation>
{conversation}
</conversation>
{reference}
Give your reasons in a few sentences, and end with a grade from 1 (useless) to 10 (could not be better) in double \
square brackets, for instance [[4]]."""


@dataclass(kw_only=True)
class MTBenchSettings(SharedSettings):
    """mt-bench: questions of two turns in MT-Bench's format, graded by a judge."""

    reference_answers: str | None = setting(
        None,
        "Experts' answers in MT-Bench's answer format, shown to the judge where a question has one.",
        only_for=_ONLY,
    )

    def check_mt_bench(self) -> None:
        """Check the settings of this kind.

        Raises:
            ValueError: neither judgments nor what it takes to make them.
        """
        given: Any = self  # judgments and model_answers are declared by Arena-Hard's settings
        if given.judgments is not None:
            return
        if self.questions is None or self.judge is None:
            raise ValueError("mt-bench needs `questions` and a `judge`, or `judgments`.")
        if (given.model_answers is None) == (self.model_name_or_path is None):
            raise ValueError("mt-bench needs the model's answers: either model_answers or model_name_or_path.")


def evaluate(args: Any) -> dict[str, Any]:
    """Answer both turns of every question, grade the answers, and compute the scores.

    Returns:
        `kind`, `model`, `judge`, `figures`: `score` (mean grade), `turn_1`, `turn_2` and one for each category.

    Raises:
        ValueError: a file that cannot be read, or a judge that cannot be used.
    """
    folder = Path(args.output_dir)
    record: Row | None = None
    categories: dict[str, str] = {}
    if args.questions is not None:
        questions = read_rows(args.questions, QUESTION_COLUMNS)
        categories = {str(row["question_id"]): str(row["category"]) for row in questions}
    if args.judgments is None:
        answers = _answers(args, questions, folder)
        judgments, record = _judge(args, questions, answers, folder)
    else:
        judgments = read_rows(args.judgments, ("question_id", "model", "score", "turn"))
    judge = record or {"model": (judgments[0].get("judge") or [None])[0]}
    figures = mt_bench_figures(judgments, categories, confidence=args.confidence)
    return {"kind": KIND, "model": judgments[0]["model"], "judge": judge, "figures": figures}


def mt_bench_figures(
    judgments: Sequence[Row], categories: Mapping[str, str], *, confidence: float
) -> dict[str, Figure]:
    """Compute mean grades with intervals over questions; a grade below 0 could not be read and is left out.

    Args:
        judgments: rows with `question_id`, `turn` and `score`.
        categories: question -> category.
        confidence: of the intervals.
    """
    graded = [
        (str(row["question_id"]), int(row["turn"]), float(row["score"])) for row in judgments if row["score"] >= 0
    ]
    by_question: dict[str, list[float]] = {}
    for question, _, score in graded:
        by_question.setdefault(question, []).append(score)
    # the turns of a question are no independent draws; the score is the mean of all grades, as the benchmark's
    spread = mean([float(np.mean(scores)) for scores in by_question.values()], confidence=confidence)
    value = float(np.mean([score for _, _, score in graded]))
    shift = value - spread.value
    ends = [None if end is None else end + shift for end in (spread.low, spread.high)]
    figures = {"score": Figure(value, ends[0], ends[1], spread.interval, len(graded))}
    for turn in sorted({turn for _, turn, _ in graded}):
        figures[f"turn_{turn}"] = mean([score for _, each, score in graded if each == turn], confidence=confidence)
    for category in dict.fromkeys(categories.values()):
        means = [float(np.mean(scores)) for q, scores in by_question.items() if categories.get(q) == category]
        if means:
            figures[category] = mean(means, confidence=confidence)
    return figures


def _answers(args: Any, questions: Sequence[Row], folder: Path) -> dict[str, list[str]]:
    """Return the answers to the turns of each question, made where they are not given."""
    if args.model_answers is not None:
        return read_answers(args.model_answers)
    found: dict[str, list[str]] = {str(row["question_id"]): [] for row in questions}
    for turn in range(max(len(row["turns"]) for row in questions)):
        for temperature, rows in _by_temperature(args, [row for row in questions if len(row["turns"]) > turn]).items():
            prompts: dict[str, TextOrMessages] = {
                str(row["question_id"]): conversation(row["turns"][: turn + 1], found[str(row["question_id"])])
                for row in rows
            }
            sampled = replace(args, generation={**args.generation, "temperature": temperature})
            place = folder / "generated" / f"turn-{turn + 1}-temperature-{temperature:g}"
            for name, answer in answer_questions(sampled, prompts, place).items():
                found[name].append(answer["text"])
    rows = [
        {
            "question_id": row["question_id"],
            "answer_id": content_hash(args.name, row["question_id"])[:22],
            "model_id": args.name,
            "choices": [{"index": 0, "turns": found[str(row["question_id"])]}],
            "tstamp": time.time(),
        }
        for row in questions
    ]
    if current_processes().is_main:
        write_jsonl(folder / ANSWERS_FILE, rows)
    return found


def _by_temperature(args: Any, questions: Sequence[Row]) -> dict[float, list[Row]]:
    """Group questions by the temperature of their category, unless the settings name one for all."""
    found: dict[float, list[Row]] = {}
    for row in questions:
        own = TEMPERATURES.get(row["category"], DEFAULT_TEMPERATURE)
        found.setdefault(float(args.generation.get("temperature", own)), []).append(row)
    return found


def conversation(turns: Sequence[str], answers: Sequence[str]) -> list[dict[str, str]]:
    """Return messages: the user's turns, each but perhaps the last with its answer."""
    messages = []
    for number, turn in enumerate(turns):
        messages.append({"role": "user", "content": turn})
        if number < len(answers):
            messages.append({"role": "assistant", "content": answers[number]})
    return messages


def read_answers(path: str) -> dict[str, list[str]]:
    """Read answers in MT-Bench's format: question -> the turns of its first choice.

    Raises:
        ValueError: a row without them.
    """
    found = {}
    for number, row in enumerate(read_rows(path, ANSWER_COLUMNS)):
        try:
            found[str(row["question_id"])] = [str(turn) for turn in row["choices"][0]["turns"]]
        except (IndexError, KeyError, TypeError):
            raise ValueError(f"{path}, row {number}: `choices` must hold one choice with its `turns`.") from None
    return found


def _judge(
    args: Any, questions: Sequence[Row], answers: Mapping[str, Sequence[str]], folder: Path
) -> tuple[list[Row], Row]:
    """Grade every answer, write the judgments, and return them and the judge's record."""
    template = judge_template(args.judge, TEMPLATE, FIELDS)
    references = read_answers(args.reference_answers) if args.reference_answers is not None else {}
    asked: dict[str, str] = {}
    for row in questions:
        name = str(row["question_id"])
        if len(answers.get(name, ())) < len(row["turns"]):
            raise ValueError(
                f"question {name}: {len(answers.get(name, ()))} of {len(row['turns'])} turns are answered."
            )
        for turn in range(len(row["turns"])):
            asked[f"{name}/{turn + 1}"] = _question(template, row, answers[name], references.get(name, ()), turn)
    replies = ask(args.judge, asked, folder)
    judgments = []
    for row in questions:
        for turn in range(1, len(row["turns"]) + 1):
            key = f"{row['question_id']}/{turn}"
            grade = rating(replies[key].text)
            judgments.append(
                {
                    "question_id": row["question_id"],
                    "model": args.name,
                    "judge": [args.judge.model, prompt_hash(template)],
                    "user_prompt": asked[key],
                    "judgment": replies[key].text,
                    "score": -1 if grade is None else grade,
                    "turn": turn,
                    "tstamp": time.time(),
                }
            )
    record = judge_record(args.judge, template, replies, sum(row["score"] < 0 for row in judgments))
    if current_processes().is_main:
        write_jsonl(folder / JUDGMENTS_FILE, judgments)
    return judgments, record


def _question(template: str, row: Row, answers: Sequence[str], reference: Sequence[str], turn: int) -> str:
    shown = [f"{m['role']}: {m['content']}" for m in conversation(row["turns"][: turn + 1], answers[: turn + 1])]
    expert = f"\n<expert_answer>\n{reference[turn]}\n</expert_answer>\n" if turn < len(reference) else ""
    values = {"conversation": "\n\n".join(shown), "reference": expert}
    return fill(template, values)


def rating(reply: str) -> float | None:
    """Return the last grade of a reply, from 1 to 10 in double square brackets; None where it holds none."""
    found = [float(each) for each in _RATING.findall(reply) if 1 <= float(each) <= 10]
    return found[-1] if found else None
