"""A real HTTP server in a thread that speaks /v1/completions and misbehaves on command."""

import json
import socket
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Endpoint:
    """What the server saw, and what it does next.

    `faults` are taken in turn, one a POST request, before anything is answered well: an HTTP status, "hang" (no answer
    while the
    server runs), "drip" (a byte now and then), "cut" (less than announced), "text" (no JSON), "list", "empty" (an
    object
    without choices), "aborted" (another finish_reason), "close" (no answer at all) or "redirect".
    `gather` holds requests back until that many are there, and a moment longer for more to come.
    """

    def __init__(self, *, models=("tiny",), max_model_len=512, faults=(), return_ids=True, key=None, always=None):
        self.models, self.max_model_len = list(models), max_model_len
        self.faults, self.return_ids, self.key, self.always = list(faults), return_ids, key, always
        self.bodies, self.keys, self.open_requests, self.most_at_once = [], [], 0, 0
        self.lock = threading.Lock()
        self.answer = lambda body: ([7, 8, 9], "stop")
        self.delay, self.gather = 0.0, None
        self.raw = lambda body: None  # or the text of an answer, whatever it is
        self.said = None  # what an HTTP fault says
        self.over = threading.Event()

    def take_fault(self):
        with self.lock:
            return self.always or (self.faults.pop(0) if self.faults else None)


def handler_for(endpoint):
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            if self.path == "/stolen/completions":
                endpoint.keys.append(("elsewhere", self.headers.get("Authorization")))
            models = [{"id": name, "max_model_len": endpoint.max_model_len} for name in endpoint.models]
            self.reply(200, json.dumps({"data": models}).encode())

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with endpoint.lock:
                endpoint.bodies.append(body)
                endpoint.keys.append(("here", self.headers.get("Authorization")))
                endpoint.open_requests += 1
                endpoint.most_at_once = max(endpoint.most_at_once, endpoint.open_requests)
            if endpoint.gather is not None:
                endpoint.gather.wait(30)
            time.sleep(endpoint.delay)
            with endpoint.lock:  # before the answer: a client that has it may ask again at once
                endpoint.open_requests -= 1
            try:
                self.answer(body, endpoint.take_fault())
            except (BrokenPipeError, ConnectionResetError):
                pass  # the client had enough

        def answer(self, body, fault):
            if endpoint.key is not None and self.headers.get("Authorization") != f"Bearer {endpoint.key}":
                said = f"wrong key {self.headers.get('Authorization')}"
                return self.reply(401, json.dumps({"error": said}).encode())
            if isinstance(fault, int):
                said = endpoint.said or json.dumps({"error": "as told"})
                return self.reply(fault, said.encode(), {"Retry-After": "0"})
            if (raw := endpoint.raw(body)) is not None:
                return self.reply(200, raw.encode())
            ids, reason = endpoint.answer(body)
            choice = {"index": 0, "text": "from the server", "finish_reason": reason}
            if endpoint.return_ids:
                choice["token_ids"] = ids
            good = json.dumps({"choices": [choice], "usage": {"completion_tokens": len(ids)}}).encode()
            if fault == "hang":
                endpoint.over.wait(30)
                self.reply(200, good)
            elif fault == "drip":
                self.start(200, len(good))
                for byte in good:
                    self.wfile.write(bytes([byte]))
                    self.wfile.flush()
                    time.sleep(0.1)
            elif fault == "cut":
                self.start(200, len(good) + 100)
                self.wfile.write(good)
            elif fault == "close":
                self.close_connection = True
            elif fault == "redirect":
                self.reply(302, b"", {"Location": "/stolen/completions"})
            else:
                choice = {**choice, "finish_reason": "abort"}
                bad = {
                    "text": b"<html>busy</html>",
                    "list": b"[1, 2]",
                    "deep": b"[" * 100_000 + b"]" * 100_000,
                    "empty": b"{}",
                    "aborted": json.dumps({"choices": [choice], "usage": {"completion_tokens": 1}}).encode(),
                }
                self.reply(200, bad.get(fault, good))

        def start(self, status, length, headers=()):
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(length))
            for name, value in dict(headers).items():
                self.send_header(name, value)
            self.end_headers()

        def reply(self, status, content, headers=()):
            self.start(status, len(content), headers)
            self.wfile.write(content)

    return Handler


@contextmanager
def serving(endpoint):
    """The address of a running server."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_for(endpoint))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        endpoint.over.set()
        server.shutdown()
        server.server_close()


# what a server sends at once, and then again and again
DRIPS = {
    "nothing": (b"", b""),
    "status line": (b"", b"H"),
    "headers": (b"HTTP/1.1 200 OK\r\n", b"X-A: b\r\n"),
    "100 continue": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "chunks": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
    "chunk line": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"0"),
    "body": (b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n", b" "),
    "error body": (b"HTTP/1.1 500 No\r\nContent-Length: 100000\r\n\r\n", b"x"),
    "redirect body": (b"HTTP/1.1 302 Go\r\nLocation: /\r\nContent-Length: 100000\r\n\r\n", b"x"),
}


@contextmanager
def dripping(drip, *, seconds=20.0):
    """The address of a server that sends a little now and then, and never all."""
    listener = socket.create_server(("127.0.0.1", 0))
    over = threading.Event()

    def serve():
        try:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(drip[0])
                end = time.monotonic() + seconds
                while time.monotonic() < end and not over.wait(0.05):
                    connection.sendall(drip[1])
        except OSError:
            pass  # the client had enough

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    finally:
        over.set()
        listener.close()
