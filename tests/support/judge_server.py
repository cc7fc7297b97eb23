"""A judge on this machine: an HTTP server whose answers, faults among them, a test decides."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[["Handler", dict[str, Any]], None]


@dataclass
class Judge:
    """The server's address, and the requests that it got."""

    url: str
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    busiest: int = 0
    """The most requests that were answered at the same time."""
    hang_up: threading.Event = field(default_factory=threading.Event)
    """Ends answers that never end."""


class Handler(BaseHTTPRequestHandler):
    """Answers POST requests with the test's function."""

    judge: Judge
    answer: Answer
    protocol_version = "HTTP/1.1"
    lock = threading.Lock()
    busy = 0
    models = 200
    """The status of the answer to GET requests."""

    def do_GET(self) -> None:
        self.judge.headers.append(dict(self.headers))
        self.judge.paths.append(self.path)
        self.send(b"{}", self.models)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.lock:
            type(self).busy += 1
            self.judge.busiest = max(self.judge.busiest, self.busy)
            self.judge.requests.append(body)
            self.judge.headers.append(dict(self.headers))
            self.judge.paths.append(self.path)
        try:
            with contextlib.suppress(OSError):  # the client has gone
                type(self).answer(self, body)
        finally:
            with self.lock:
                type(self).busy -= 1

    def send(self, data: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def say(self, content: object) -> None:
        """A chat completion."""
        self.send_json({"choices": [{"message": {"role": "assistant", "content": content}}]})

    def send_json(self, value: object) -> None:
        self.send(json.dumps(value).encode())

    def log_message(self, *args: object) -> None: ...


@contextlib.contextmanager
def serving(answer: Answer, models: int = 200) -> Iterator[Judge]:
    """A server on a free port, which calls `answer(handler, body)` for each POST request.

    `models` is the status of its answer to others.
    """

    class Answering(Handler): ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answering)
    server.daemon_threads = True
    judge = Judge(f"http://127.0.0.1:{server.server_address[1]}/v1")
    Answering.judge, Answering.answer = judge, staticmethod(answer)  # type: ignore[assignment]
    Answering.models = models
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield judge
    finally:
        judge.hang_up.set()
        server.shutdown()
        server.server_close()
        thread.join()
