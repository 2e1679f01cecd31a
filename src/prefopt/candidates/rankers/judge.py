"""A language model behind an OpenAI-compatible server as the judge of every ordered pair of answers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np

from prefopt.arguments import ServerArguments, setting
from prefopt.candidates.backends.http import AnswerUnusable, Call, JsonClient, Unusable
from prefopt.candidates.pairs import Array
from prefopt.candidates.rankers.base import Ranker, Request, Tally, ordered_pairs, plain_text

T = TypeVar("T")

TEMPLATE = """Two assistants answered the same request. Decide which answer serves the user better: correct, complete \
as far as the request asks, honest and clear. Length alone is no merit, and neither is being shown first.

<request>
{prompt}
</request>

<answer_a>
{answer_a}
</answer_a>

<answer_b>
{answer_b}
</answer_b>

Reply with nothing but [[A]] if answer A is better, [[B]] if answer B is better, or [[C]] if neither is."""

VERDICT_LOGIT = math.log(9)  # a verdict given in both orders means a win with probability 0.9
VERDICTS = {"A": VERDICT_LOGIT, "B": -VERDICT_LOGIT, "C": 0.0}
LARGEST_UNREADABLE_SHARE = 0.5
MAX_TOKENS = 2048  # room for a template that asks for reasons first
FIELDS = ("prompt", "answer_a", "answer_b")
_FIELD = re.compile(r"\{(\w+)\}")
_VERDICT = re.compile(r"\[\[(A|B|C)\]\]")


@dataclass
class JudgeOptions(ServerArguments):
    """Options of the judge: its server, and its prompt."""

    judge_template: str | None = setting(
        None,
        "judge: file with its prompt, with {prompt}, {answer_a} and {answer_b}; it must ask for [[A]], [[B]] or "
        "[[C]].",
    )


class JudgeRanker(Ranker):
    """Tables (R, R) with ln 9 where the judge prefers the first of an ordered pair, -ln 9 where the second, else 0.

    Each pair is judged in both orders: in the win probability sigmoid((c_ij - c_ji) / 2) a verdict that follows the
    order cancels. A reply without exactly one verdict counts as "neither" and among the `unreadable verdicts`.
    The `path` is the model's name at the server.

    Raises:
        ValueError: the template lacks a field or cannot be read.
    """

    options: ClassVar[type] = JudgeOptions

    def __init__(self, options: Any) -> None:
        self.client = JsonClient(options.base_url, options.key_variable, options.request_timeout, options.retries)
        self.model = options.path
        self.concurrency = options.concurrency
        template = options.judge_template
        self.template = TEMPLATE if template is None else Path(template).read_text(encoding="utf-8")
        if missing := absent_fields(self.template, FIELDS):
            raise ValueError(
                f"The judge's template {template} has no {{{missing[0]}}}; it needs {{prompt}}, {{answer_a}} and "
                f"{{answer_b}}."
            )

    @classmethod
    def source_file(cls, path: str, options: Any) -> Path | None:
        """See `Ranker.source_file`."""
        return Path(options.judge_template) if options.judge_template else None

    def rank(self, requests: Sequence[Request], tally: Tally) -> list[Array]:
        """See `Ranker.rank`.

        Raises:
            ServerError: the server cannot be reached, or failed for good.
            ValueError: more than half of the verdicts are unreadable.
        """
        pairs = ordered_pairs(requests)
        tables = [np.zeros((len(request.candidates),) * 2) for request in requests]
        answers = self.client.request_all(
            [self._call(self.question(requests[row], first, second)) for row, first, second in pairs],
            self.concurrency,
            lambda reply: tally.advance(rows=len(requests) / len(pairs)),
        )
        replies = ["" if isinstance(answer, Unusable) else answer for answer in answers]
        unreadable = [reply for reply in replies if verdict(reply) is None]
        if len(unreadable) > LARGEST_UNREADABLE_SHARE * len(replies):
            raise ValueError(
                f"{len(unreadable)} of {len(replies)} replies of the judge {self.model!r} hold no single verdict "
                f"[[A]], [[B]] or [[C]]; one of them: {unreadable[0][:200]!r}. Change the template, or take another "
                "judge."
            )
        for (row, first, second), reply in zip(pairs, replies, strict=True):
            tables[row][first, second] = verdict(reply) or 0.0
        tally.count("verdicts", len(replies))
        tally.count("unreadable verdicts", len(unreadable))
        tally.count("prompts", len(requests))
        tally.count("answers", sum(len(request.candidates) for request in requests))
        return tables

    def question(self, request: Request, first: int, second: int) -> str:
        """Fill in the judge's prompt about one ordered pair; braces in the texts stay as they are."""
        values = {
            "prompt": plain_text(request.prompt),
            "answer_a": request.candidates[first],
            "answer_b": request.candidates[second],
        }
        return fill(self.template, values)

    def _call(self, question: str) -> Call[str]:
        return judge_call(self.model, question, message_of, temperature=0, max_tokens=MAX_TOKENS)


def absent_fields(template: str, fields: Sequence[str]) -> list[str]:
    """Return the fields that a judge's prompt lacks, such as {prompt}."""
    return [name for name in fields if "{" + name + "}" not in template]


def fill(template: str, values: Mapping[str, str]) -> str:
    """Put values into the fields of a judge's prompt; other braces, those of the values too, stay as they are."""
    return _FIELD.sub(lambda found: values.get(found[1], found[0]), template)


def judge_call(
    model: str, question: str, read: Callable[[dict[str, Any]], T], *, temperature: float, max_tokens: int
) -> Call[T]:
    """Return the request that puts one question to a judge.

    Args:
        model: the judge's name at its server.
        question: its whole prompt.
        read: makes the result of the server's reply; raises `AnswerUnusable` for one that has none.
        temperature: of the judge.
        max_tokens: most tokens of its reply.
    """
    messages = [{"role": "user", "content": question}]
    body = {"model": model, "messages": messages, "temperature": temperature, "max_tokens": max_tokens}
    return Call("chat/completions", body, read)


def message_of(reply: dict[str, Any]) -> str:
    """Return the text of a server's reply; "" where it is no text.

    Raises:
        AnswerUnusable: it holds no message.
    """
    try:
        content = reply["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        raise AnswerUnusable("its reply holds no message") from None
    return content if isinstance(content, str) else ""


def verdict(reply: str) -> float | None:
    """Return the logit that a reply stands for, or None where it does not hold exactly one of the verdicts."""
    found = set(_VERDICT.findall(reply))
    return VERDICTS[found.pop()] if len(found) == 1 else None
