"""One JSON request to a server: with a total time limit, retried with back-off, its key and its content never shown."""

from __future__ import annotations

import http.client
import json
import os
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from email.message import Message
from typing import IO, Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

T = TypeVar("T")
RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
LONGEST_PAUSE = 60.0


class ServerError(ValueError):
    """The server cannot be used; the message names its address and what it said."""


class AttemptFailed(Exception):
    """One attempt failed in a way that may pass; `pause` is what the server asked to wait, in seconds."""

    def __init__(self, reason: str, pause: float = 0.0) -> None:
        super().__init__(reason)
        self.pause = pause


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key and the prompts to another address."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> None:
        return None


@dataclass
class JsonClient:
    """Talks JSON to one server; safe to use from several threads.

    Args:
        base_url: address up to and including `/v1`.
        key_variable: environment variable with the key; without one, none is sent.
        timeout: seconds for one attempt, from the first byte sent to the last received.
        retries: further attempts after the first.
        first_pause: seconds before the first further attempt; each later pause is twice as long, up to a minute.
        stopped: when set, nothing is attempted again.
    """

    base_url: str
    key_variable: str
    timeout: float
    retries: int
    first_pause: float = 1.0
    stopped: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        parts = urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ServerError(
                f"base_url {self.address!r} is not an address such as http://localhost:8000/v1 (http or https)."
            )
        if parts.username or parts.password:
            raise ServerError(
                f"base_url {self.address!r} holds a password: put the key into {self.key_variable} instead."
            )

    @property
    def address(self) -> str:
        """The address without anything secret in it."""
        parts = urlsplit(self.base_url)
        return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))

    def request(self, path: str, body: dict[str, Any] | None, read: Callable[[dict[str, Any]], T]) -> T:
        """What `read` makes of the answer to a POST request of `path` (GET where there is no body).

        Args:
            path: such as "completions".
            body: the request, JSON-like.
            read: takes the answer, a JSON object; raises `AttemptFailed` where it lacks something.

        Raises:
            ServerError: the server refuses the request, or failed in every attempt.
        """
        attempts = self.retries + 1
        for attempt in range(attempts):
            try:
                return read(self._once(path, body))
            except AttemptFailed as failure:
                if attempt + 1 == attempts or self.stopped.is_set():
                    times = "once" if attempt == 0 else f"{attempt + 1} times"
                    raise ServerError(
                        f"The server at {self.address} failed {times}; the last time: {failure}."
                    ) from None
                pause = min(self.first_pause * 2**attempt, LONGEST_PAUSE) * random.uniform(0.75, 1.25)
                self.stopped.wait(min(max(pause, failure.pause), LONGEST_PAUSE))
        raise AssertionError("at least one attempt")

    def request_all(self, asks: Sequence[Callable[[], T]], concurrency: int, on_done: Callable[[T], None]) -> list[T]:
        """What each of `asks` returns, in order; when one fails or is interrupted, those that have not begun are given up.

        Args:
            asks: functions that call `request`.
            concurrency: how many run at a time.
            on_done: called with each result, from several threads.

        Raises:
            ServerError: one failed for good.
        """
        self.stopped.clear()
        with ThreadPoolExecutor(concurrency) as pool:
            try:
                futures = [pool.submit(_then, ask, on_done) for ask in asks]
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
            except BaseException:
                self.stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return [future.result() for future in futures]

    def _once(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        request = urllib.request.Request(
            f"{self.base_url.rstrip('/')}/{path}",
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json", "Accept": "application/json"},
        )
        key = self._key()
        if key:
            request.add_unredirected_header("Authorization", f"Bearer {key}")
        deadline = time.monotonic() + self.timeout
        try:
            with urllib.request.build_opener(_NoRedirect).open(request, timeout=self.timeout) as response:
                content = self._read(response, deadline)
        except urllib.error.HTTPError as error:
            raise self._refusal(error, key) from None
        except TimeoutError:
            raise AttemptFailed(f"no answer within {self.timeout:g} s") from None
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise AttemptFailed(f"no connection within {self.timeout:g} s") from None
            raise AttemptFailed(f"it cannot be reached ({error.reason})") from None
        except (OSError, http.client.HTTPException) as error:
            raise AttemptFailed(f"the connection broke ({type(error).__name__})") from None
        try:
            value = json.loads(content)
        except ValueError:
            raise AttemptFailed(f"its answer is not JSON ({_short(content, key)!r})") from None
        if not isinstance(value, dict):
            raise AttemptFailed(f"its answer is not a JSON object ({_short(content, key)!r})")
        return value

    def _key(self) -> str:
        """The key, or nothing; the HTTP library would show one that it cannot send."""
        key = os.environ.get(self.key_variable, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise ServerError(
                f"The key in {self.key_variable} holds a character that cannot be sent, such as a line break."
            )
        return key

    def _read(self, response: http.client.HTTPResponse, deadline: float) -> bytes:
        """The body; a server that sends a byte now and then is cut off at the deadline like a silent one."""
        parts = []
        while part := response.read1(1 << 16):
            parts.append(part)
            if time.monotonic() > deadline:
                raise TimeoutError
        if response.length:
            raise AttemptFailed("its answer was cut off")
        return b"".join(parts)

    def _refusal(self, error: urllib.error.HTTPError, key: str) -> Exception:
        with error:
            try:
                said = _short(error.read(2000), key)
            except (OSError, http.client.HTTPException):
                said = ""
        reason = f"HTTP {error.code}" + (f", {said!r}" if said else "")
        if error.code in RETRIED:
            asked = (error.headers.get("Retry-After") or "").strip()
            return AttemptFailed(reason, float(asked) if asked.isdigit() else 0.0)
        hint = ""
        if error.code in (401, 403):
            hint = f" The key is read from the environment variable {self.key_variable}, which is " + (
                "set." if key else "not set."
            )
        if 300 <= error.code < 400:
            hint = " It wants to redirect the request; give the final address as base_url."
        return ServerError(f"The server at {self.address} refused the request: {reason}.{hint}")


def _then(ask: Callable[[], T], on_done: Callable[[T], None]) -> T:
    result = ask()
    on_done(result)
    return result


def _short(content: bytes, key: str) -> str:
    """The beginning of what a server said, on one line; some servers repeat the key that they were given."""
    text = " ".join(content.decode("utf-8", "replace").split())
    if key:
        text = text.replace(key, "[key]")
    return text[:300]
