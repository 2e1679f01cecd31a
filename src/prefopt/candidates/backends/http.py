"""JSON-over-HTTP client with a deadline and retries; error messages never contain the API key or prompts."""

from __future__ import annotations

import asyncio
import html
import json
import os
import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from email.utils import mktime_tz, parsedate_tz
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit, urlunsplit

import httpx2
from anyio.from_thread import start_blocking_portal

T = TypeVar("T")
RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
LONGEST_PAUSE = 60.0
LARGEST_ANSWER = 1 << 26  # bytes
LARGEST_UNUSABLE_SHARE = 0.5


class ServerError(ValueError):
    """The server cannot be used; the message names its address and its answer."""


class AttemptFailed(Exception):
    """One attempt failed in a way that may pass; `pause` is how many seconds the server asked to wait."""

    def __init__(self, reason: str, pause: float = 0.0) -> None:
        super().__init__(reason)
        self.pause = pause


class AnswerUnusable(AttemptFailed):
    """The server answered, but with nonsense: a fault of one answer, which need not end the work."""


@dataclass(frozen=True)
class Unusable:
    """Stands for the result of a call whose answer was unusable in every attempt."""

    reason: str


@dataclass(frozen=True)
class Call(Generic[T]):
    """One request: a POST of `body` to `path`, or a GET where there is no body.

    Args:
        path: such as "completions".
        body: the request, JSON-like.
        read: turns the answer, a JSON object, into the result; raises `AnswerUnusable` where it cannot.
    """

    path: str
    body: dict[str, Any] | None
    read: Callable[[dict[str, Any]], T]


@dataclass
class JsonClient:
    """Sends JSON requests to one server.

    Args:
        base_url: address up to and including `/v1`.
        key_variable: environment variable with the key; without one, none is sent.
        timeout: seconds for one attempt, from looking up the address to the last byte received.
        retries: further attempts after the first.
        first_pause: seconds before the first further attempt; each later pause is twice as long, up to a minute.

    Raises:
        ServerError: `base_url` is no address, or holds a password.
    """

    base_url: str
    key_variable: str
    timeout: float
    retries: int
    first_pause: float = 1.0

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.base_url)
            sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
            httpx2.URL(self.base_url)
        except (httpx2.InvalidURL, ValueError):  # such as a port that is no number, or [ without ]
            sound = False
        if not sound:
            raise ServerError(
                f"base_url {self.address!r} is not an address such as http://localhost:8000/v1 (http or https)."
            )
        if parts.query or parts.fragment:  # the path of a request would be put behind it
            raise ServerError(f"base_url {self.address!r} ends with ?... or #...: give it up to /v1 alone.")
        if parts.username or parts.password:
            raise ServerError(
                f"base_url {self.address!r} holds a password: put the key into {self.key_variable} instead."
            )

    @property
    def address(self) -> str:
        """The address without anything secret in it."""
        try:
            parts = urlsplit(self.base_url)
        except ValueError:
            return self.base_url.rpartition("@")[2].partition("?")[0]
        return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))

    def request(self, call: Call[T]) -> T:
        """Make one call.

        Raises:
            ServerError: the server rejects the request, or failed in every attempt.
        """
        (result,) = self.request_all([call], 1, lambda result: None)
        assert not isinstance(result, Unusable), "one of one is more than half"
        return result

    def request_all(
        self, calls: Sequence[Call[T]], concurrency: int, on_done: Callable[[T], None]
    ) -> list[T | Unusable]:
        """Make all calls and return their results in order; when one fails, the others are cancelled.

        A server that rejects a request or cannot be reached fails. Nonsense in every attempt is a fault of that one
        answer: `Unusable` stands in its place, unless that happens to more than half of the calls.

        Args:
            calls: the calls.
            concurrency: how many are under way at a time.
            on_done: called with each result, from another thread.

        Raises:
            ServerError: one failed for good, or most answers are unusable.
        """
        # the event loop runs in a thread, as this one may run a loop already (in a notebook)
        with start_blocking_portal() as portal:
            results = portal.call(self._all, calls, concurrency, on_done)
        unusable = [result for result in results if isinstance(result, Unusable)]
        if len(unusable) > LARGEST_UNUSABLE_SHARE * len(results):
            raise ServerError(unusable[0].reason)
        return results

    async def _all(
        self, calls: Sequence[Call[T]], concurrency: int, on_done: Callable[[T], None]
    ) -> list[T | Unusable]:
        slots = asyncio.Semaphore(concurrency)
        # A kept connection may be closed by the server just as the next request is sent, which would cost an attempt.
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=0)
        try:
            # no redirects: one would carry the key and the prompts to another address
            client = httpx2.AsyncClient(timeout=None, limits=limits, follow_redirects=False)
        except (ValueError, OSError) as error:  # it reads them from the environment
            raise ServerError(
                f"No connection can be made: a proxy (HTTP_PROXY, ...) or the certificates (SSL_CERT_FILE) of the "
                f"environment cannot be used ({error})."
            ) from None
        try:
            async with client as http:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(self._repeat(http, slots, call, on_done)) for call in calls]
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _repeat(
        self, http: httpx2.AsyncClient, slots: asyncio.Semaphore, call: Call[Any], on_done: Callable[[Any], None]
    ) -> Any:
        async with slots:
            for attempt in range(1, self.retries + 2):
                try:
                    result = call.read(await self._once(http, call))
                except AttemptFailed as failure:
                    if attempt > self.retries:
                        times = "once" if attempt == 1 else f"{attempt} times"
                        reason = self.masked(f"The server at {self.address} failed {times}; the last time: {failure}.")
                        if isinstance(failure, AnswerUnusable):
                            return Unusable(reason)
                        raise ServerError(reason) from None
                    pause = min(self.first_pause * 2 ** (attempt - 1), LONGEST_PAUSE) * random.uniform(0.75, 1.25)
                    await asyncio.sleep(min(max(pause, failure.pause), LONGEST_PAUSE))
                else:
                    on_done(result)
                    return result
        raise AssertionError("at least one attempt")

    async def _once(self, http: httpx2.AsyncClient, call: Call[Any]) -> dict[str, Any]:
        key = self._key()
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        # escaped, so that a lone surrogate in a text can be sent too
        content = None if call.body is None else json.dumps(call.body).encode()
        try:
            async with asyncio.timeout(self.timeout):  # httpx's own timeouts bound single operations only
                method, url = "GET" if content is None else "POST", f"{self.base_url.rstrip('/')}/{call.path}"
                async with http.stream(method, url, content=content, headers=headers) as response:
                    answer = await _read(response)
        except TimeoutError:
            raise AttemptFailed(f"no answer within {self.timeout:g} s") from None
        except httpx2.ConnectError as error:
            raise AttemptFailed(f"it cannot be reached ({error})") from None
        except httpx2.HTTPError as error:
            raise AttemptFailed(f"the connection broke ({type(error).__name__})") from None
        if not response.is_success:
            raise self._rejection(response, answer)
        try:
            value = json.loads(answer)
        except ValueError:
            raise AnswerUnusable(f"its answer is not JSON ({self._short(answer)!r})") from None
        except RecursionError:
            raise AnswerUnusable("its answer is JSON of too many levels") from None
        if not isinstance(value, dict):
            raise AnswerUnusable(f"its answer is not a JSON object ({self._short(answer)!r})")
        return value

    def _key(self) -> str:
        """Return the key, or nothing; the HTTP library would show one that it cannot send."""
        key = os.environ.get(self.key_variable, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise ServerError(
                f"The key in {self.key_variable} holds a character that cannot be sent, such as a line break."
            )
        return key

    def _rejection(self, response: httpx2.Response, answer: bytes) -> Exception:
        text = self._short(answer)
        reason = f"HTTP {response.status_code}" + (f", {text!r}" if text else "")
        if response.status_code in RETRIED:
            return AttemptFailed(reason, seconds_to_wait(response.headers.get("Retry-After", "")))
        hint = ""
        if response.status_code in (401, 403):
            state = "set" if self._key() else "not set"
            hint = f" The key is read from the environment variable {self.key_variable}, which is {state}."
        if response.is_redirect:
            hint = " It wants to redirect the request; give the final address as base_url."
        return ServerError(f"The server at {self.address} refused the request: {reason}.{hint}")

    def masked(self, text: str) -> str:
        """Replace the key in a text: some servers repeat the key that they were given, as it is or escaped."""
        key = self._key()
        return re.sub("".join(map(_escapes, key)), "[key]", text) if key else text

    def _short(self, answer: bytes) -> str:
        """Return the beginning of an answer on one line, without the key."""
        return " ".join(self.masked(answer.decode("utf-8", "replace")).split())[:300]


async def _read(response: httpx2.Response) -> bytes:
    answer = bytearray()
    async for part in response.aiter_bytes():
        answer += part
        if len(answer) > LARGEST_ANSWER:
            raise AnswerUnusable(f"its answer is larger than {LARGEST_ANSWER >> 20} MiB")
    return bytes(answer)


def _escapes(character: str) -> str:
    """Return a pattern of the ways in which JSON, Python, HTML and URLs write a character."""
    code = ord(character)
    named = html.escape(character)  # &amp; and the like
    escaped = rf"\\+(?:u00|x)(?i:{code:02x})|\\*{re.escape(character)}"
    return rf"(?:{escaped}|{re.escape(named)}|&#0*{code};|&#[xX]0*(?i:{code:x});|%(?i:{code:02x}))"


def seconds_to_wait(retry_after: str) -> float:
    """Read a Retry-After header, seconds (also a fraction) or a date; 0 where it is neither, or lies in the past."""
    try:
        seconds = float(retry_after)
    except ValueError:
        date = parsedate_tz(retry_after)
        try:
            seconds = mktime_tz(date) - time.time() if date else 0.0
        except (ValueError, OverflowError):
            seconds = 0.0
    return seconds if seconds > 0 else 0.0
