"""A vLLM server without a model, whose answers, faults among them, a test decides."""

from __future__ import annotations

import contextlib
import json
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from minidistill.engines.server.engine import ServerEngine
from minidistill.trainer.policy import Weights

CERTIFICATE = Path(__file__).parent / "localhost.pem"
VOCABULARY = 100
LENGTH = 64  # the server's longest sequence
Answer = Callable[["Handler", dict[str, Any]], None]
"""Answers a request for a completion."""


@dataclass
class FakeVllm:
    """The server's address, and what it got."""

    url: str
    bodies: list[dict[str, Any]] = field(default_factory=list)
    """Of the requests for completions."""
    headers: list[dict[str, str]] = field(default_factory=list)
    """Of all requests."""
    hang_up: threading.Event = field(default_factory=threading.Event)
    """Ends answers that never end."""


class Handler(BaseHTTPRequestHandler):
    """Answers as vLLM does; completions with the test's function, model cards with `models`."""

    fake: FakeVllm
    answer: Answer
    models: Answer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.fake.headers.append(dict(self.headers))
        with contextlib.suppress(OSError):  # the client has gone
            type(self).models(self, {})

    def do_POST(self) -> None:
        self.fake.headers.append(dict(self.headers))
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with contextlib.suppress(OSError):
            if self.path == "/v1/completions":
                self.fake.bodies.append(body)
                type(self).answer(self, body)
            else:
                self.send(b'{"message": "no such page"}', 404)

    def send(self, data: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def say(self, value: object) -> None:
        self.send(json.dumps(value).encode(), Content_Type="application/json")

    def log_message(self, *args: object) -> None: ...


def sample(body: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """What vLLM answers: all the tokens asked for, and the prompt's scores if asked for."""
    ids = [7] * body["max_tokens"]
    choice: dict[str, Any] = {
        "token_ids": ids,
        "logprobs": {"token_logprobs": [-0.5] * len(ids)},
        "finish_reason": "length",
    }
    if "prompt_logprobs" in body:
        rows = [{str(token): {"logprob": -0.25}} for token in body["prompt"]]
        choice["prompt_logprobs"] = [None, *rows[1:]]
    return {"choices": [choice | changes]}


def well(handler: Handler, body: dict[str, Any]) -> None:
    handler.say(sample(body))


def one_model(handler: Handler, body: dict[str, Any]) -> None:
    handler.say({"data": [{"id": "m", "max_model_len": LENGTH}]})


@contextlib.contextmanager
def serving(
    answer: Answer = well, models: Answer = one_model, *, secure: bool = False
) -> Iterator[FakeVllm]:
    """A server on a free port; a `secure` one has a certificate that nobody has signed."""

    class Answering(Handler): ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answering)
    server.daemon_threads = True
    server.handle_error = lambda *args: None  # type: ignore[method-assign]
    if secure:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(CERTIFICATE)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    fake = FakeVllm(f"http{'s' * secure}://127.0.0.1:{server.server_address[1]}")
    Answering.fake = fake
    Answering.answer, Answering.models = staticmethod(answer), staticmethod(models)  # type: ignore[assignment]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield fake
    finally:
        fake.hang_up.set()
        server.shutdown()
        server.server_close()
        thread.join()


def engine_at(
    url: str, folder: Path, *, max_restarts: int = 0, silence: float = 60.0
) -> ServerEngine:
    """An engine of the base model there, for a policy without weights."""
    engine = ServerEngine(
        url, "inference.server_urls", "vllm serve M", LENGTH, folder, max_restarts, silence
    )
    policy: Any = SimpleNamespace(
        lora=False,
        weights_of=lambda role: Weights.BASE,
        head_VH=range(VOCABULARY),
        eos_ids={1},
    )
    engine.attach(policy, ())
    return engine
