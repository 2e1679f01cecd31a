"""One judge behind an OpenAI-compatible server: replies that are kept, so that nothing is paid for twice; its cost."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt.candidates.backends.http import Call, JsonClient, Unusable
from prefopt.candidates.rankers.judge import LARGEST_UNREADABLE_SHARE, absent_fields, judge_call, message_of
from prefopt.candidates.shards import current_processes
from prefopt.data.rows import Row
from prefopt.evaluation.settings import JudgeSettings, prompt_hash
from prefopt.files import content_hash, read_jsonl, user_path
from prefopt.progress import Progress

REPLIES_FILE = "judge_replies.jsonl"


@dataclass(frozen=True)
class Reply:
    """What the judge said, and the tokens that the server counted; 0 where it counts none."""

    text: str
    input_tokens: int
    output_tokens: int


def judge_template(settings: JudgeSettings, built_in: str, fields: tuple[str, ...]) -> str:
    """Return the judge's prompt: the user's file, or the built-in one.

    Raises:
        ValueError: the file lacks one of the fields, such as {question}.
    """
    if settings.template is None:
        return built_in
    text = user_path(settings.template).read_text(encoding="utf-8")
    if absent := absent_fields(text, fields):
        raise ValueError(f"judge: template: {settings.template} has no {{{absent[0]}}}; it needs {', '.join(fields)}.")
    return text


def ask(settings: JudgeSettings, questions: Mapping[str, str], folder: Path) -> dict[str, Reply]:
    """Put each question to the judge; replies of an earlier run with the same judge and words are taken from disk.

    Args:
        settings: the judge.
        questions: key -> what it is asked.
        folder: holds `judge_replies.jsonl`.

    Returns:
        key -> reply; a reply that stayed unusable is an empty text.

    Raises:
        ValueError: the server cannot be reached, or failed for good; what has been answered is kept.
    """
    team = current_processes()
    if team.is_main:
        _ask_missing(settings, questions, folder / REPLIES_FILE)
    team.gather(None)
    known = _known(folder / REPLIES_FILE)
    found = {key: known.get(_identity(settings, question)) for key, question in questions.items()}
    return {
        key: Reply("", 0, 0) if row is None else Reply(row["reply"], row["input_tokens"], row["output_tokens"])
        for key, row in found.items()
    }


def _ask_missing(settings: JudgeSettings, questions: Mapping[str, str], place: Path) -> None:
    known = _known(place)
    by_identity = {_identity(settings, question): question for question in questions.values()}
    missing = [identity for identity in by_identity if identity not in known]
    if not missing:
        return
    client = JsonClient(settings.base_url, settings.key_variable, settings.request_timeout, settings.retries)
    place.parent.mkdir(parents=True, exist_ok=True)
    with (
        open(place, "a", encoding="utf-8") as file,
        Progress(len(missing), f"Judging with {settings.model}", unit="judgments") as progress,
    ):
        for start in range(0, len(missing), 4 * settings.concurrency):  # what is answered is on disk after each part
            part = missing[start : start + 4 * settings.concurrency]
            calls = [_call(settings, by_identity[identity]) for identity in part]
            replies = client.request_all(calls, settings.concurrency, lambda reply: progress.advance(1))
            for identity, reply in zip(part, replies, strict=True):
                if not isinstance(reply, Unusable):
                    row = {"id": identity, "judge": settings.model, "reply": reply.text}
                    tokens = {"input_tokens": reply.input_tokens, "output_tokens": reply.output_tokens}
                    file.write(json.dumps({**row, **tokens}, ensure_ascii=False) + "\n")
            file.flush()


def _known(place: Path) -> dict[str, Row]:
    if not place.is_file():
        return {}
    text = place.read_bytes()
    if text and not text.endswith(b"\n"):  # a run that was killed while it wrote
        place.write_bytes(text[: text.rfind(b"\n") + 1])
    return {row["id"]: row for row in read_jsonl(place)}


def _identity(settings: JudgeSettings, question: str) -> str:
    return content_hash(settings.model, settings.temperature, settings.max_tokens, question)


def _call(settings: JudgeSettings, question: str) -> Call[Reply]:
    return judge_call(
        settings.model, question, _read, temperature=settings.temperature, max_tokens=settings.max_tokens
    )


def _read(reply: dict[str, Any]) -> Reply:
    text = message_of(reply)
    usage = reply.get("usage")
    counts = [
        value if isinstance(usage, dict) and isinstance(value := usage.get(name), int) else 0
        for name in ("prompt_tokens", "completion_tokens")
    ]
    return Reply(text, *counts)


def judge_record(settings: JudgeSettings, template: str, replies: Mapping[str, Reply], unreadable: int) -> Row:
    """Return what is recorded about a judge: its name, its prompt's hash, tokens, cost and unreadable verdicts.

    Raises:
        ValueError: more than half of the verdicts cannot be read.
    """
    if replies and unreadable > LARGEST_UNREADABLE_SHARE * len(replies):
        sample = next(iter(replies.values())).text[:200]
        raise ValueError(
            f"{unreadable} of {len(replies)} replies of the judge {settings.model!r} hold no verdict; one of them: "
            f"{sample!r}. Change its template, raise max_tokens, or take another judge."
        )
    tokens = [sum(reply.input_tokens for reply in replies.values()), sum(r.output_tokens for r in replies.values())]
    cost = None
    if settings.input_price is not None and settings.output_price is not None:
        cost = (tokens[0] * settings.input_price + tokens[1] * settings.output_price) / 1e6
    return {
        "model": settings.model,
        "prompt_hash": prompt_hash(template),
        "temperature": settings.temperature,
        "judgments": len(replies),
        "unreadable": unreadable,
        "input_tokens": tokens[0],
        "output_tokens": tokens[1],
        "cost": cost,
    }
