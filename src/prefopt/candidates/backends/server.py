"""Generation by an OpenAI-compatible server such as `vllm serve` or SGLang: token ids in, many requests at a time."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from prefopt.candidates.backends import AnswerRequest, Completion, OnDone, Sampling, completion_of
from prefopt.candidates.backends.http import AnswerUnusable, Call, JsonClient, ServerError, Unusable


class ServerBackend:
    """Draws through `/v1/completions`, one request an answer, each with its own seed.

    Args:
        client: sends the requests.
        model: the name under which the server knows the model.
        tokenizer: decodes the answers where the server returns token ids (vLLM does).
        sampling: how tokens are drawn; every setting is sent, so that the server's own defaults are ignored.
        concurrency: requests under way at a time.
    """

    def __init__(
        self,
        client: JsonClient,
        model: str,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        *,
        concurrency: int,
    ) -> None:
        self.client = client
        self.model = model
        self.tokenizer = tokenizer
        self.sampling = sampling
        self.concurrency = concurrency

    def complete(self, requests: Sequence[AnswerRequest], seed: int, on_done: OnDone) -> list[Completion | None]:
        """See `Backend.complete`.

        Raises:
            ServerError: one request failed for good, and the others are cancelled; or most answers are unusable.
        """
        answers = self.client.request_all(
            [self._call(request) for request in requests],
            self.concurrency,
            lambda answer: on_done(1, answer.num_tokens),
        )
        faults = [answer.reason for answer in answers if isinstance(answer, Unusable)]
        if faults:
            print(f"generate: {len(faults)} unusable answers are left out; the first: {faults[0]}", file=sys.stderr)
        return [None if isinstance(answer, Unusable) else answer for answer in answers]

    def _call(self, request: AnswerRequest) -> Call[Completion]:
        sampling = self.sampling
        body = {
            "model": self.model,
            "prompt": request.prompt_ids,
            "max_tokens": request.max_new_tokens,
            "n": 1,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "repetition_penalty": sampling.repetition_penalty,
            "stop_token_ids": list(sampling.stop_token_ids),
            "seed": request.seed,
            "return_token_ids": True,
        }
        return Call("completions", body, lambda reply: read_completion(reply, request, sampling, self.tokenizer))


def read_completion(
    reply: dict[str, Any], request: AnswerRequest, sampling: Sampling, tokenizer: PreTrainedTokenizerBase
) -> Completion:
    """Read the answer from a server's reply.

    Raises:
        AnswerUnusable: the reply lacks what a completion has, or holds what no completion can.
    """
    try:
        (choice,) = reply["choices"]
        text, reason = choice["text"], choice["finish_reason"]
        count, ids = reply["usage"]["completion_tokens"], choice.get("token_ids")
    except (AttributeError, KeyError, TypeError, ValueError):
        raise AnswerUnusable("its reply has not one choice with a text, a finish_reason and usage") from None
    if not isinstance(text, str) or reason not in ("stop", "length"):
        raise AnswerUnusable(f"it ended an answer with {str(reason)[:80]!r}, not with stop or length")
    limit = request.max_new_tokens
    if not _is_within(count, limit + 1):
        raise AnswerUnusable(f"its completion_tokens are {str(count)[:80]}, not a number from 0 to {limit}")
    if ids is not None:
        if not isinstance(ids, list) or len(ids) > limit or not all(_is_within(i, len(tokenizer)) for i in ids):
            raise AnswerUnusable(f"its token_ids are not up to {limit} ids of the vocabulary ({str(ids)[:80]})")
        answer = completion_of(ids, sampling.stop_token_ids, tokenizer)
        if ids and answer.finish_reason == reason:
            return answer
    # no ids, or an end token that only the server knows
    try:
        text.encode()
    except UnicodeEncodeError:
        raise AnswerUnusable("its text holds half a character (a lone surrogate)") from None
    return Completion(text, reason, count, ids and tuple(ids))


def _is_within(value: Any, end: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < end


def find_model(client: JsonClient, wanted: str | None) -> tuple[str, int | None]:
    """Return the name of the model that the server serves, and its context length where the server names it.

    Raises:
        ServerError: nothing answers, or the server has no model of that name.
    """
    by_name = client.request(Call("models", None, _read_models))
    if wanted is None and len(by_name) == 1:
        wanted = next(iter(by_name))
    if wanted is None or wanted not in by_name:
        raise ServerError(
            client.masked(
                f"The server at {client.address} serves {sorted(by_name)}; choose one of them with server_model."
            )
        )
    length: Any = by_name[wanted].get("max_model_len")
    return wanted, length if _is_within(length, 2**31) and length > 0 else None


def _read_models(reply: dict[str, Any]) -> dict[str, dict[str, Any]]:
    models = reply.get("data")
    if not isinstance(models, list) or not all(isinstance(model, dict) and "id" in model for model in models):
        raise AnswerUnusable("it does not list its models under /models")
    return {str(model["id"]): model for model in models}
