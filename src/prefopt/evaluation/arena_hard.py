"""Arena-Hard v2: answers, judgments of both orders, scores by category, and style control, in the benchmark's formats.

Letters: N battles, F features of style.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prefopt.arguments import setting
from prefopt.candidates.pairs import sigmoid
from prefopt.candidates.rankers.judge import fill
from prefopt.candidates.records import read_records
from prefopt.candidates.shards import current_processes
from prefopt.data.rows import Row
from prefopt.evaluation.figures import Figure, resampled
from prefopt.evaluation.judge import ask, judge_record, judge_template
from prefopt.evaluation.settings import SharedSettings, answer_questions, read_rows
from prefopt.evaluation.win_rate import fit_logistic
from prefopt.files import content_hash, write_jsonl
from prefopt.launch import print_on_main

Answers = Mapping[str, Row]  # rows by uid

KIND = "arena-hard"
_ONLY = {"kind": (KIND,)}
ANSWERS_FILE, JUDGMENTS_FILE = "model_answer.jsonl", "model_judgment.jsonl"
QUESTION_COLUMNS, ANSWER_COLUMNS = ("uid", "category", "prompt"), ("uid", "model", "messages")
FIELDS = ("question", "answer_a", "answer_b")
STRONG = 3  # a clear verdict counts as three, as published
STYLE_RESAMPLES = 100
TOKENIZER = "gpt-4o"  # the model whose tokens the benchmark counts
# names of the figures: the benchmark's own, and that with another measure of length
BY_TOKENS, BY_CHARACTERS = "style_controlled", "style_controlled_by_characters"
_RIDGE = 1e-3  # keeps models that won or lost everything finite
# (first better, by how much); each verdict may be written from either side
VERDICTS = {"A>>B": (1.0, STRONG), "A>B": (1.0, 1), "A=B": (0.5, 1), "B>A": (0.0, 1), "B>>A": (0.0, STRONG)}
VERDICTS |= {"A<<B": (0.0, STRONG), "A<B": (0.0, 1), "B=A": (0.5, 1), "B<A": (1.0, 1), "B<<A": (1.0, STRONG)}
_VERDICT = re.compile(r"\[?\[([AB<>=]+)\]\]?")

TEMPLATE = """Two assistants have answered the request of a user. Judge which answer serves the user better.

Work out first what a good answer to the request must contain. Then check both answers for mistakes, for what is \
missing, and for what does not belong there. Correctness matters most, then usefulness, then clarity; length and \
formatting are no merits of their own, and neither is being shown first.

<request>
{question}
</request>

<answer_a>
{answer_a}
</answer_a>

<answer_b>
{answer_b}
</answer_b>

Give your reasons in a few sentences, and end with exactly one of these verdicts: [[A>>B]] if answer A is clearly \
better, [[A>B]] if it is slightly better, [[A=B]] if they are about equally good, [[B>A]] if answer B is slightly \
better, [[B>>A]] if it is clearly better."""


@dataclass(kw_only=True)
class ArenaHardSettings(SharedSettings):
    """arena-hard: questions and a baseline's answers in Arena-Hard v2's formats, judged in both orders."""

    judgments: str | None = setting(
        None,
        "arena-hard, mt-bench: the benchmark's judgments of the model, instead of making them.",
        only_for={"kind": ("arena-hard", "mt-bench")},
    )
    model_answers: str | None = setting(
        None,
        "arena-hard, mt-bench: the model's answers in the benchmark's format, instead of `answers` or of making them.",
        only_for={"kind": ("arena-hard", "mt-bench")},
    )
    baseline_answers: str | None = setting(
        None, "The baseline's answers in Arena-Hard's format (v2: o3-mini-2025-01-31).", only_for=_ONLY
    )
    baselines: dict[str, str] = setting(
        factory=dict,
        help="Other baselines' answers by category: {creative_writing: gemini-2.0-flash-001.jsonl}.",
        only_for=_ONLY,
    )
    style_control: bool = setting(True, "Also compute scores with length and markdown controlled.", only_for=_ONLY)
    style_pool: dict[str, dict[str, str]] = setting(
        factory=dict,
        help="Further models whose battles the style regression shares, as on the leaderboard: {name: {judgments: "
        "file, answers: file}}. Without any, features are not centred: the score is that at equal style.",
        only_for=_ONLY,
    )

    def check_arena_hard(self) -> None:
        """Check the settings of this kind.

        Raises:
            ValueError: neither judgments nor what it takes to make them.
        """
        if self.judgments is None:
            if self.questions is None or self.judge is None or self.baseline_answers is None:
                raise ValueError("arena-hard needs `questions`, `baseline_answers` and a `judge`, or `judgments`.")
            _check_answers(self)
        elif self.style_control and (self.model_answers is None or self.baseline_answers is None):
            raise ValueError(
                "style control reads answers: give model_answers and baseline_answers with `judgments`, or "
                "--style_control false."
            )


def _check_answers(args: Any) -> None:
    if len([name for name in ("model_answers", "answers", "model_name_or_path") if getattr(args, name)]) != 1:
        raise ValueError(
            f"{args.kind} needs the model's answers: one of model_answers, answers (of `prefopt generate`) and "
            "model_name_or_path."
        )
    if args.model_answers is None:
        assert args.name  # raises without one


@dataclass(frozen=True)
class Battle:
    """One counted comparison: the share won by the model, of a question, with both answers' features (F,) of style."""

    model: str
    uid: str
    won: float
    mine: np.ndarray | None = None
    theirs: np.ndarray | None = None


def evaluate(args: ArenaHardSettings) -> dict[str, Any]:
    """Answer, judge and score.

    Returns:
        `kind`, `model`, `baselines`, `judge`, `figures`: `score`, one for each category, each also as
        `style_controlled/...`, or `style_controlled_by_characters/...` where tokens cannot be counted.

    Raises:
        ValueError: files of other questions, or a judge that cannot be used.
    """
    folder = Path(args.output_dir)
    baselines = _baselines(args)
    mine: dict[str, Row] = {}
    record: Row | None = None
    if args.judgments is None:
        assert args.questions is not None
        questions = read_rows(args.questions, QUESTION_COLUMNS)
        mine = _answers(args, questions, folder)
        judgments, record = _judge(args, questions, mine, baselines, folder)
    else:
        judgments = read_rows(args.judgments, ("uid", "model", "category", "games"))
        if args.model_answers is not None:
            mine = _by_uid(args.model_answers)
    figures = _figures(args, judgments, mine, baselines)
    lost = sum(1 for row in judgments if _won(row) is None)
    return {
        "kind": KIND,
        "model": judgments[0]["model"],
        "baselines": sorted({str(row.get("baseline")) for row in judgments}),
        "judge": record or {"model": judgments[0].get("judge")},
        "questions": len(judgments),
        "without_verdict": lost,
        "figures": figures,
    }


def _baselines(args: ArenaHardSettings) -> dict[str, dict[str, Row]]:
    """Return the baselines' answers by category; "" is that of all others."""
    files = {**({"": args.baseline_answers} if args.baseline_answers is not None else {}), **args.baselines}
    return {category: _by_uid(path) for category, path in files.items()}


def _by_uid(path: str) -> dict[str, Row]:
    return {str(row["uid"]): row for row in read_rows(path, ANSWER_COLUMNS)}


def answer_text(row: Row) -> str:
    """Return the text of an answer row: `messages[-1].content`, or its `answer`."""
    content = row["messages"][-1]["content"]
    return str(content["answer"] if isinstance(content, Mapping) else content)


def _answers(args: ArenaHardSettings, questions: Sequence[Row], folder: Path) -> dict[str, Row]:
    """Return the model's answers by uid, made where they are not given, and write them in the benchmark's format."""
    if args.model_answers is not None:
        return _by_uid(args.model_answers)
    prompts = {str(row["uid"]): row["prompt"] for row in questions}
    if args.answers is not None:
        records = read_records(args.answers)
        by_prompt = {_text(record["prompt"]): record["candidates"][0]["text"] for record in records}
        if lacking := [uid for uid, prompt in prompts.items() if prompt not in by_prompt]:
            raise ValueError(f"{args.answers} has no answer to question {lacking[0]!r} and {len(lacking) - 1} others.")
        texts = {uid: by_prompt[prompt] for uid, prompt in prompts.items()}
    else:
        texts = {uid: row["text"] for uid, row in answer_questions(args, prompts, folder / "generated").items()}
    count = token_counter()
    rows = [
        {
            "uid": uid,
            "ans_id": content_hash(args.name, uid, text)[:22],
            "model": args.name,
            "messages": [
                {"role": "user", "content": prompts[uid]},
                {"role": "assistant", "content": {"answer": text}},
            ],
            "tstamp": time.time(),
            "metadata": ({"token_len": count(text)} if count else {}) | markdown_counts(text),
        }
        for uid, text in texts.items()
    ]
    if current_processes().is_main:
        write_jsonl(folder / ANSWERS_FILE, rows)
    return {str(row["uid"]): row for row in rows}


def _text(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def _judge(
    args: ArenaHardSettings,
    questions: Sequence[Row],
    mine: Mapping[str, Row],
    baselines: Mapping[str, Mapping[str, Row]],
    folder: Path,
) -> tuple[list[Row], Row]:
    """Judge both orders of every question, write the judgments, and return them and the judge's record."""
    assert args.judge is not None
    template = judge_template(args.judge, TEMPLATE, FIELDS)
    asked: dict[str, str] = {}
    for row in questions:
        uid, theirs = str(row["uid"]), baselines.get(row["category"], baselines[""])
        for side, answers in (("the model", mine), ("the baseline", theirs)):
            if uid not in answers:
                raise ValueError(f"{side} has no answer to question {uid!r}; are the answers to the same questions?")
        first, second = answer_text(theirs[uid]), answer_text(mine[uid])
        for number, (a, b) in enumerate(((first, second), (second, first))):
            values = {"question": row["prompt"], "answer_a": a, "answer_b": b}
            asked[f"{uid}/{number}"] = fill(template, values)
    replies = ask(args.judge, asked, folder)
    judgments = []
    for row in questions:
        uid, theirs = str(row["uid"]), baselines.get(row["category"], baselines[""])
        games = [
            {
                "score": verdict(replies[f"{uid}/{number}"].text),
                "judgment": {"answer": replies[f"{uid}/{number}"].text},
                "prompt": [{"role": "user", "content": asked[f"{uid}/{number}"]}],
            }
            for number in (0, 1)
        ]
        names = {"judge": args.judge.model, "model": mine[uid]["model"], "baseline": theirs[uid]["model"]}
        judgments.append({"uid": uid, "category": row["category"], **names, "games": games})
    unreadable = sum(game["score"] is None for row in judgments for game in row["games"])
    record = judge_record(args.judge, template, replies, unreadable)
    if current_processes().is_main:
        write_jsonl(folder / JUDGMENTS_FILE, judgments)
    return judgments, record


def verdict(reply: str) -> str | None:
    """Return the last verdict of a reply, such as A>>B; None where it holds none."""
    found = [each for each in _VERDICT.findall(reply.upper()) if each in VERDICTS]
    return found[-1] if found else None


def _won(row: Row) -> list[float] | None:
    """Return the shares that the model won, one for each counted comparison; None where a verdict is missing."""
    games = row["games"]
    if len(games) < 2 or any(game is None or game["score"] not in VERDICTS for game in games[:2]):
        return None
    # in the second game the model is shown first
    (lost, first_weight), (won, second_weight) = VERDICTS[games[0]["score"]], VERDICTS[games[1]["score"]]
    return [won] * second_weight + [1 - lost] * first_weight


def _battles(
    judgments: Sequence[Row], mine: Answers, baselines: Mapping[str, Answers], *, style: str | None
) -> list[Battle]:
    """Return the counted comparisons, with features of style where `style` names the figure that needs them."""
    battles = []
    for row in judgments:
        uid, theirs = str(row["uid"]), baselines.get(row["category"], baselines.get("", {}))
        found = [answers.get(uid) if style is not None else None for answers in (mine, theirs)]
        styles = [None if each is None else style_features(each, by_tokens=style == BY_TOKENS) for each in found]
        battles += [Battle(str(row["model"]), uid, won, *styles) for won in _won(row) or ()]
    return battles


def _figures(
    args: ArenaHardSettings,
    judgments: Sequence[Row],
    mine: Answers,
    baselines: Mapping[str, Answers],
) -> dict[str, Figure]:
    pool = [_pooled(files) for files in args.style_pool.values()] if args.style_control else []
    answers = [mine, *baselines.values(), *(theirs for _, theirs in pool)]
    style = style_figure(answers) if args.style_control else None
    categories = list(dict.fromkeys(row["category"] for row in judgments))
    parts = {"score": list(judgments)}
    if len(categories) > 1:
        parts |= {name: [row for row in judgments if row["category"] == name] for name in categories}
    figures: dict[str, Figure] = {}
    for name, rows in parts.items():
        battles = _battles(rows, mine, baselines, style=style)
        if not battles:
            raise ValueError(f"no question of {name} has two verdicts that can be read.")
        figures[name] = arena_score(battles, confidence=args.confidence)
        if style is not None:
            kept = {row["category"] for row in rows}
            others = [
                battle
                for judged, theirs in pool
                for battle in _battles([r for r in judged if r["category"] in kept], theirs, baselines, style=style)
            ]
            figures[f"{style}/{name}"] = style_controlled_score(battles, others, confidence=args.confidence)
    return figures


def _pooled(files: Mapping[str, str]) -> tuple[list[Row], dict[str, Row]]:
    """Return the judgments and the answers of a further model."""
    if set(files) != {"judgments", "answers"}:
        raise ValueError(
            f"style_pool: each model needs `judgments` and `answers`, not {', '.join(files) or 'nothing'}."
        )
    return read_rows(files["judgments"], ("uid", "model", "category", "games")), _by_uid(files["answers"])


def arena_score(battles: Sequence[Battle], *, confidence: float) -> Figure:
    """Compute the mean share won over counted comparisons; the interval resamples questions."""
    return _by_question(battles, lambda rows: float(np.mean([battle.won for battle in rows])), confidence, 500)


def _by_question(battles: Sequence[Battle], statistic: Any, confidence: float, resamples: int) -> Figure:
    groups: dict[str, list[Battle]] = {}
    for battle in battles:
        groups.setdefault(battle.uid, []).append(battle)
    questions = list(groups.values())
    return resampled(
        lambda kept: statistic([battle for place in kept for battle in questions[place]]),
        len(questions),
        confidence=confidence,
        resamples=resamples,
    )


# ---- style


def markdown_counts(text: str) -> Row:
    """Count headers, list items and bold parts outside of code blocks, in the benchmark's form of `metadata`."""
    prose = re.sub(r"```([^`]*)```", "", text)

    def count(pattern: str) -> int:
        return len(re.findall(pattern, prose, re.MULTILINE))

    return {
        "header_count": {f"h{level}": count(rf"^#{{{level}}}\s") for level in range(1, 7)},
        "list_count": {"ordered": count(r"^\s*\d+\.\s"), "unordered": count(r"^\s*[-*+]\s")},
        "bold_count": {"**": count(r"\*\*[^*\n]+\*\*"), "__": count(r"__[^_\n]+__")},
    }


def token_counter() -> Callable[[str], int] | None:
    """Return what counts the tokens of a text as the benchmark does; None without tiktoken or its vocabulary."""
    try:
        import tiktoken

        encoding = tiktoken.encoding_for_model(TOKENIZER)
    except (ImportError, OSError):  # errors of the download are OSErrors
        return None
    return lambda text: len(encoding.encode(text, disallowed_special=()))


def answer_tokens(row: Row) -> int | None:
    """Return the number of tokens that an answer's `metadata` has; None where it has none."""
    metadata = row.get("metadata")
    found = metadata.get("token_len") if isinstance(metadata, Mapping) else None
    return found if isinstance(found, int) else None


def style_figure(answers: Sequence[Answers]) -> str:
    """Return the name of the figure that the answers allow; count the tokens of those that lack `metadata.token_len`.

    Lengths are in one measure: characters for all where one answer's tokens cannot be counted, which is printed.
    """
    lacking = [row for each in answers for row in each.values() if answer_tokens(row) is None]
    count = token_counter() if lacking else None
    if lacking and count is None:
        print_on_main(
            f"arena-hard: style control measures length in characters: {len(lacking)} answers, the first of "
            f"{lacking[0]['model']}, have no metadata.token_len, and tiktoken's vocabulary of {TOKENIZER} is not at "
            "hand (pip install tiktoken; offline, TIKTOKEN_CACHE_DIR names the folder that holds it)."
        )
        return BY_CHARACTERS
    for row in lacking:
        assert count is not None
        row["metadata"] = {"token_len": count(answer_text(row))}
    return BY_TOKENS


def style_features(row: Row, *, by_tokens: bool) -> np.ndarray:
    """Return (4,) of an answer: its length in tokens or characters, and numbers of headers, list items, bold parts."""
    text = answer_text(row)
    counts = markdown_counts(text)
    length = answer_tokens(row) if by_tokens else len(text)
    return np.array([length, *(sum(found.values()) for found in counts.values())], dtype=np.float64)


def style_controlled_score(battles: Sequence[Battle], pool: Sequence[Battle], *, confidence: float) -> Figure:
    """Compute the score that is left when length and markdown are explained by a regression.

    Fits P(model wins) = sigmoid(strength[model] + x w), with x the (F,) relative differences of style, divided by
    their standard deviation; where other models share the regression also centred, as on the leaderboard. The score
    is sigmoid(strength), the interval resamples the model's questions.

    Args:
        battles: of the model.
        pool: battles of other models against the same baselines.
        confidence: of the interval.

    Raises:
        ValueError: an answer is not there.
    """
    if any(battle.mine is None or battle.theirs is None for battle in [*battles, *pool]):
        raise ValueError("style control needs the answers of model and baseline to every judged question.")
    return _by_question(battles, lambda rows: _strength([*rows, *pool], rows[0].model), confidence, STYLE_RESAMPLES)


def _strength(battles: Sequence[Battle], model: str) -> float:
    mine = np.array([battle.mine for battle in battles])
    theirs = np.array([battle.theirs for battle in battles])
    features = style_differences(mine, theirs)
    names = list(dict.fromkeys(battle.model for battle in battles))
    if len(names) > 1:
        features = features - features.mean(axis=0)
    spread = features.std(axis=0, ddof=1) if len(features) > 1 else np.zeros(features.shape[1])
    features = features[:, spread > 0] / spread[spread > 0]
    places = Counter({name: place for place, name in enumerate(names)})
    own = np.eye(len(names))[[places[battle.model] for battle in battles]]
    won = np.array([battle.won for battle in battles])
    coefficients = fit_logistic(np.concatenate([own, features], axis=1), won, ridge=_RIDGE)
    return float(sigmoid(coefficients[[places[model]]])[0])


def style_differences(mine: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Return (N, F) relative differences: (a - b) / (a + b) of lengths; (p - q) / (p + q + 1) of densities.

    A density is a count by length + 1.
    """
    total = np.maximum(mine[:, :1] + theirs[:, :1], 1)
    p, q = mine[:, 1:] / (mine[:, :1] + 1), theirs[:, 1:] / (theirs[:, :1] + 1)
    return np.concatenate([(mine[:, :1] - theirs[:, :1]) / total, (p - q) / (p + q + 1)], axis=1)
