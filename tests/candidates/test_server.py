"""The server backend against a real HTTP server on this machine, well and badly behaved."""

import html
import json
import logging
import os
import signal
import socket
import threading
import time
import traceback
from email.utils import formatdate
from urllib.parse import quote

import pytest

from prefopt.candidates.backends import AnswerRequest, Sampling, http
from prefopt.candidates.backends.http import Call, JsonClient, ServerError, seconds_to_wait
from prefopt.candidates.backends.server import ServerBackend, find_model
from prefopt.candidates.generate import GenerateArguments, run
from prefopt.candidates.records import read_records
from prefopt.candidates.shards import ShardFailed
from tests.candidates.endpoint import DRIPS, Endpoint, dripping, serving
from tests.candidates.folders import HARD_PROMPTS, save_prompts, save_tiny
from tests.tiny import tiny_tokenizer

KEY_VARIABLE = "PREFOPT_TEST_KEY"
SECRET = "sk-very-secret"


def backend_for(address, *, timeout=30.0, retries=3, concurrency=4, tokenizer=None):
    client = JsonClient(address, KEY_VARIABLE, timeout, retries, first_pause=0.01)
    sampling = Sampling(0.7, 0.9, 0, 1.1, (5, 9))
    return ServerBackend(client, "tiny", tokenizer or tiny_tokenizer("llama3"), sampling, concurrency=concurrency)


def no_progress(answers, tokens):
    pass


def complete(endpoint, number=1, **changes):
    with serving(endpoint) as address:
        requests = [AnswerRequest([1, 20 + n], 16, seed=100 + n) for n in range(number)]
        return backend_for(address, **changes).complete(requests, 0, no_progress)


def test_every_setting_is_sent_with_token_ids():
    endpoint = Endpoint()
    tokenizer = tiny_tokenizer("llama3")
    (answer,) = complete(endpoint, tokenizer=tokenizer)
    assert endpoint.bodies == [
        {
            "model": "tiny",
            "prompt": [1, 20],
            "max_tokens": 16,
            "n": 1,
            "temperature": 0.7,
            "top_p": 0.9,
            "top_k": -1,
            "repetition_penalty": 1.1,
            "stop_token_ids": [5, 9],
            "seed": 100,
            "return_token_ids": True,
        }
    ]
    assert (answer.text, answer.finish_reason, answer.num_tokens) == (tokenizer.decode([7, 8]), "stop", 3)
    (answer,) = complete(Endpoint(return_ids=False))
    assert (answer.text, answer.finish_reason, answer.num_tokens) == ("from the server", "stop", 3)


def test_requests_run_at_once_and_come_back_in_order():
    """The server answers nothing until four requests are there, and waits for a fifth, which must not come."""
    endpoint = Endpoint()
    endpoint.gather, endpoint.delay = threading.Barrier(4), 0.1
    endpoint.answer = lambda body: ([body["seed"], 9], "stop")
    answers = complete(endpoint, 12, concurrency=4, timeout=60.0)
    assert [answer.token_ids for answer in answers] == [(100 + n, 9) for n in range(12)]
    assert endpoint.most_at_once == 4


@pytest.mark.parametrize("fault", [500, 503, 429, "text", "list", "empty", "aborted", "close", "cut"])
def test_a_passing_fault_is_retried(fault):
    endpoint = Endpoint(faults=[fault, fault])
    answers = complete(endpoint, 3)
    assert len(answers) == 3 and all(answer.num_tokens == 3 for answer in answers)
    assert len(endpoint.bodies) == 5


@pytest.mark.parametrize("fault", ["hang", "drip"])
def test_a_request_has_a_time_limit(fault):
    endpoint = Endpoint(faults=[fault])
    (answer,) = complete(endpoint, timeout=0.4)
    assert answer.num_tokens == 3
    assert len(endpoint.bodies) > 1  # it waited for no end of the first
    with pytest.raises(ServerError, match=r"failed 2 times; the last time: no answer within 0\.3 s"):
        complete(Endpoint(always=fault), timeout=0.3, retries=1)


@pytest.mark.parametrize("drip", DRIPS)
def test_a_dripping_server_cannot_stretch_the_time_limit(drip):
    """Whatever it drips (address kept open, headers, 100 Continue, chunks, a status with its body) for 20 seconds."""
    with dripping(DRIPS[drip]) as address:
        started = time.monotonic()
        with pytest.raises(ServerError, match=r"failed once; the last time: no answer within 0\.4 s"):
            backend_for(address, timeout=0.4, retries=0).complete([AnswerRequest([1], 4, 0)], 0, no_progress)
        assert time.monotonic() - started < 4


BAD_ANSWERS = {
    "count below zero": {"count": -1},
    "count above the limit": {"count": 10**12},
    "count that is no number": {"count": True},
    "id below zero": {"ids": [-1, 9]},
    "id beyond the vocabulary": {"ids": [10**12, 9]},
    "id that is no number": {"ids": ["7", 9]},
    "ids that are no list": {"ids": "789"},
    "more ids than asked for": {"ids": [7] * 1000},
    "lone surrogate": {"ids": None, "text": "half \ud83d"},
    "text that is no text": {"ids": None, "text": ["a"]},
    "another reason": {"reason": {"a": 1}},
}


def bad_answer(body, kind):
    """A reply to one request with what `kind` names in it."""
    good = {"ids": [7, 8, 9], "text": "x", "reason": "stop", "count": 3}
    change = {**good, **BAD_ANSWERS[kind]}
    choice = {"text": change["text"], "finish_reason": change["reason"], "token_ids": change["ids"]}
    return {"choices": [choice], "usage": {"completion_tokens": change["count"]}}


@pytest.mark.parametrize("kind", [*BAD_ANSWERS, "deep JSON"])
def test_nonsense_is_a_fault_of_one_answer(kind, capsys):
    """It is asked for again; where it stays nonsense that answer is left out, and the others are kept."""
    for lasting in (False, True):
        endpoint = Endpoint()
        seen = []

        def raw(body, lasting=lasting, seen=seen):
            if body["seed"] != 101 or (seen and not lasting):
                return None
            seen.append(body["seed"])
            return "[" * 100_000 + "]" * 100_000 if kind == "deep JSON" else json.dumps(bad_answer(body, kind))

        endpoint.raw = raw
        answers = complete(endpoint, 4, retries=1)
        assert [answer is None for answer in answers] == [False, lasting, False, False]
        assert ("1 unusable answers are left out" in capsys.readouterr().err) == lasting


def test_a_server_that_answers_mostly_nonsense_ends_the_run():
    endpoint = Endpoint()
    endpoint.raw = lambda body: "{}" if body["seed"] < 103 else None
    with pytest.raises(ServerError, match="failed 2 times; the last time: its reply has not one choice"):
        complete(endpoint, 4, retries=1)


@pytest.mark.parametrize(
    ("header", "least", "most"),
    [
        ("7", 7, 7),
        ("0.5", 0.5, 0.5),
        pytest.param(formatdate(time.time() + 9000, usegmt=True), 5000, 9000, id="a date to come"),
        pytest.param(formatdate(time.time() - 30, usegmt=True), 0, 0, id="a date gone by"),
        ("-3", 0, 0),
        ("soon", 0, 0),
        ("nan", 0, 0),
        ("Fri, 99 Abc 99999 99:99:99 GMT", 0, 0),
        ("", 0, 0),
    ],
)
def test_retry_after_is_seconds_a_fraction_or_a_date(header, least, most):
    assert least <= seconds_to_wait(header) <= most


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (500, r"failed 3 times; the last time: HTTP 500, '\{\"error\": \"as told\"\}'"),
        ("text", "not JSON"),
        ("list", "not a JSON object"),
        ("deep", "JSON of too many levels"),
        ("empty", "its reply has not one choice"),
        ("aborted", "it ended an answer with 'abort'"),
        ("close", "the connection broke"),
        ("cut", "cut off|connection broke"),
    ],
)
def test_a_lasting_fault_is_told_after_the_last_attempt(fault, reason):
    endpoint = Endpoint(always=fault)
    with pytest.raises(ServerError, match=reason):
        complete(endpoint, retries=2)
    assert len(endpoint.bodies) == 3


@pytest.mark.parametrize(("status", "reason"), [(400, "HTTP 400, .*as told"), (404, "HTTP 404"), (403, KEY_VARIABLE)])
def test_a_refusal_is_not_repeated(status, reason):
    endpoint = Endpoint(always=status)
    with pytest.raises(ServerError, match=reason):
        complete(endpoint)
    assert len(endpoint.bodies) == 1


def test_pauses_grow_and_follow_the_server(monkeypatch):
    pauses = []

    async def sleep(seconds):
        pauses.append(seconds)

    monkeypatch.setattr(http.asyncio, "sleep", sleep)
    client = JsonClient("http://127.0.0.1:9/v1", KEY_VARIABLE, 1.0, 4)
    with pytest.raises(ServerError, match="failed 5 times; the last time: it cannot be reached"):
        client.request(Call("models", None, lambda reply: reply))
    assert [0.75 * 2**n <= pause <= 1.25 * 2**n for n, pause in enumerate(pauses)] == [True] * 4


def test_one_request_that_fails_for_good_ends_the_others():
    endpoint = Endpoint(faults=[400])
    endpoint.delay = 0.05
    with pytest.raises(ServerError, match="HTTP 400"):
        complete(endpoint, 100, concurrency=2)
    assert len(endpoint.bodies) < 50


class InterruptingAtTheSixth(list):
    """Bodies of requests; the sixth presses Ctrl-C, in the server's own thread: no other one must get a turn."""

    def append(self, body):
        super().append(body)
        if len(self) == 6:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def interruptible():
    """Have SIGINT raise, as it does in a terminal: what a shell starts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupted_run_waits_for_no_request_that_has_not_begun():
    endpoint = Endpoint()
    endpoint.delay = 0.05
    endpoint.bodies = InterruptingAtTheSixth()
    with pytest.raises(KeyboardInterrupt):
        complete(endpoint, 100, concurrency=2)
    assert len(endpoint.bodies) < 50


def test_the_key_comes_from_the_environment_and_is_never_shown(monkeypatch, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv(KEY_VARIABLE, SECRET)
    endpoint = Endpoint(key=SECRET)
    complete(endpoint)
    assert endpoint.keys == [("here", f"Bearer {SECRET}")]
    monkeypatch.setenv(KEY_VARIABLE, SECRET + "x")
    with pytest.raises(ServerError, match="HTTP 401") as caught:
        complete(Endpoint(key=SECRET))
    assert SECRET not in str(caught.value) and "[key]" in str(caught.value)
    assert SECRET not in repr(backend_for("http://localhost/v1").client)
    monkeypatch.delenv(KEY_VARIABLE)
    with pytest.raises(ServerError, match=f"{KEY_VARIABLE}, which is not set"):
        complete(Endpoint(key=SECRET))
    monkeypatch.setenv(KEY_VARIABLE, f"{SECRET}\nOTHER=1")  # the HTTP library's own message holds the key
    with pytest.raises(
        ServerError, match=f"The key in {KEY_VARIABLE} holds a character that cannot be sent"
    ) as caught:
        complete(Endpoint())
    assert SECRET not in "".join(traceback.format_exception(caught.value))
    output = capfd.readouterr()
    assert SECRET not in caplog.text + output.out + output.err


@pytest.mark.parametrize(
    "echo",
    [
        lambda key: json.dumps(key),
        lambda key: "".join(f"\\u{ord(c):04X}" for c in key),
        lambda key: key.replace("/", "\\/"),
        lambda key: repr(key) + " and " + json.dumps(json.dumps(key)),
        lambda key: html.escape(key),
        lambda key: "".join(f"&#{ord(c)};" for c in key),
        quote,
    ],
)
def test_an_escaped_echo_of_the_key_is_masked(monkeypatch, echo):
    key = 'sk-"quoted"/and\\slashed&more'
    monkeypatch.setenv(KEY_VARIABLE, key)
    endpoint = Endpoint(always=400)
    endpoint.said = f"bad key {echo(key)} given"
    with pytest.raises(ServerError, match="HTTP 400") as caught:
        complete(endpoint)
    assert "bad key" in str(caught.value) and "[key]" in str(caught.value) and "given" in str(caught.value)
    assert not any(part in str(caught.value) for part in ("quoted", "slashed", "0073", "#115"))


def test_a_redirect_is_refused_and_carries_no_key(monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, SECRET)
    endpoint = Endpoint(always="redirect")
    with pytest.raises(ServerError, match="wants to redirect"):
        complete(endpoint)
    assert [place for place, _ in endpoint.keys] == ["here"]


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("localhost:8000", "is not an address"),
        ("ftp://host/v1", "is not an address"),
        ("http://host:port/v1", "is not an address"),
        ("http://host:99999/v1", "is not an address"),
        ("http://[::1/v1", "is not an address"),
        (f"http://me:{SECRET}@[::1/v1", "is not an address"),
        (f"http://host/v1?key={SECRET}", r"ends with \?... or #...: give it up to /v1 alone"),
        ("http://host/v1#x", "ends with"),
        (f"http://me:{SECRET}@host/v1", "holds a password"),
    ],
)
def test_bad_addresses_are_told_without_their_secrets(address, reason):
    with pytest.raises(ServerError, match=reason) as caught:
        JsonClient(address, KEY_VARIABLE, 1.0, 0)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("variable", "value"), [("SSL_CERT_FILE", "/nowhere.pem"), ("HTTP_PROXY", "foo://me:word@proxy")]
)
def test_an_environment_without_a_way_out_is_told(monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ServerError, match=f"No connection can be made: .*{variable}") as caught:
        complete(Endpoint())
    assert "word" not in str(caught.value)


def test_the_served_model_is_found():
    with serving(Endpoint(models=["a", "b"], max_model_len=77)) as address:
        client = JsonClient(address, KEY_VARIABLE, 5.0, 0)
        assert find_model(client, "b") == ("b", 77)
        with pytest.raises(ServerError, match=r"serves \['a', 'b'\]; choose one of them with server_model"):
            find_model(client, None)
        with pytest.raises(ServerError, match="serves"):
            find_model(client, "c")
    with serving(Endpoint(models=["only"], max_model_len=None)) as address:
        assert find_model(JsonClient(address, KEY_VARIABLE, 5.0, 0), None) == ("only", None)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"))


def arguments(tmp_path, model, address, **changes):
    settings = {
        "output_dir": str(tmp_path / "out"),
        "num_samples": 2,
        "retries": 0,
        "shard_size": 2,
        "max_new_tokens": 600,
        "key_variable": KEY_VARIABLE,
    }
    prompts = save_prompts(tmp_path / "prompts.jsonl", HARD_PROMPTS)
    return GenerateArguments(model, prompts, backend="server", base_url=address, **{**settings, **changes})


def test_generate_through_a_server_that_dies_and_comes_back(tmp_path, model_folder, capsys):
    endpoint = Endpoint(max_model_len=300)
    endpoint.answer = lambda body: ([body["prompt"][-1], body["seed"] % 400, 9], "stop")
    with serving(endpoint) as address:
        whole = read_records(run(arguments(tmp_path, model_folder, address, output_dir=str(tmp_path / "whole"))))
    assert [record["prompt"][0]["content"] for record in whole] == HARD_PROMPTS
    assert all(body["max_tokens"] == 300 - len(body["prompt"]) for body in endpoint.bodies)
    assert len({(tuple(body["prompt"]), body["seed"]) for body in endpoint.bodies}) == 10
    dying = Endpoint(max_model_len=300, faults=[None, None, None, None, 500])
    dying.answer = endpoint.answer
    with serving(dying) as address, pytest.raises(ShardFailed, match=r"shard 1 of 3 failed.*HTTP 500"):
        run(arguments(tmp_path, model_folder, address, concurrency=1))
    assert not (tmp_path / "out" / "candidates.parquet").exists()
    with serving(Endpoint(max_model_len=300, models=["other"])) as address:
        with pytest.raises(ValueError, match="server_model was 'tiny' and is 'other'"):
            run(arguments(tmp_path, model_folder, address))
    back = Endpoint(max_model_len=300)
    back.answer = endpoint.answer
    with serving(back) as address:
        assert read_records(run(arguments(tmp_path, model_folder, address))) == whole
    assert len(back.bodies) == 6  # the first shard was kept


def test_an_unreachable_server_is_told_before_anything_is_written(tmp_path, model_folder):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}/v1"
        with pytest.raises(ServerError, match=r"failed once.*cannot be reached"):
            run(arguments(tmp_path, model_folder, address))
    assert not (tmp_path / "out").exists()
