"""A vLLM server without a model that streams, caches prefixes and counts blocks."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

BLOCK = 32


class FakeServing:
    """Stands in for `bench.serving_servers.Server`.

    It begins to answer once `at_once` requests have arrived, so a client that sends them one after
    another gets no answer.
    """

    def __init__(self, token_bytes: int, flags: Sequence[str], size: int, at_once: int = 1) -> None:
        self.flags = list(flags)
        self.total = size // (BLOCK * token_bytes)
        self.caches = "--no-enable-prefix-caching" not in flags
        self.adapter_changes = "--enable-lora" in flags
        self.barrier = threading.Barrier(at_once)
        self.cached: set[tuple[int, ...]] = set()
        self.held: dict[int, set[Any]] = {}  # the blocks of each request that runs
        self.prompts: list[tuple[int, ...]] = []
        self.lock = threading.Lock()
        self.token_seconds = 0.002
        self.until_looked = False  # whether a second token waits for a look at the blocks
        self.looked = threading.Event()
        self.most_tokens = 1 << 20
        self.prompt_tokens = 0  # that it says it got; 0: what it got

        class Handler(_Handler):
            fake = self

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        run = {"poll_interval": 0.02}
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs=run)
        self._thread.start()

    def wait_until_ready(self) -> None: ...

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def used(self) -> int:
        return len(set().union(*self.held.values()))

    def metrics(self) -> str:
        with self.lock:
            usage = self.used() / (self.total - 1)
        labels = f'block_size="{BLOCK}",engine="0",num_gpu_blocks="{self.total}"'
        return (
            "# TYPE vllm:cache_config_info gauge\n"
            f"vllm:cache_config_info{{{labels}}} 1.0\n"
            f'vllm:kv_cache_usage_perc{{engine="0",model_name="base"}} {usage}\n'
        )

    def begin(self, prompt: tuple[int, ...], length: int) -> tuple[int, int]:
        """A request's number, and how many tokens of its prompt are cached."""
        full = [prompt[: end * BLOCK] for end in range(1, len(prompt) // BLOCK + 1)]
        with self.lock:
            number = len(self.prompts)
            self.prompts.append(prompt)
            hits = 0
            while self.caches and hits < len(full) and full[hits] in self.cached:
                hits += 1
            if self.caches:
                self.cached.update(full)
            blocks: set[Any] = set(full[:hits])
            count = -(-(len(prompt) + length) // BLOCK)
            # a block that this request computes may be shared by later ones
            own = [b if self.caches else (number, b) for b in full[hits:]]
            blocks.update(own)
            blocks.update((number, i) for i in range(len(full), count))
            self.held[number] = blocks
        return number, hits * BLOCK


class _Handler(BaseHTTPRequestHandler):
    fake: FakeServing
    protocol_version = "HTTP/1.0"

    def do_GET(self) -> None:
        assert self.path == "/metrics"
        self._send(self.fake.metrics().encode())
        self.fake.looked.set()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/completions":
            self._send(b"no such page", 404)
            return
        if not body.get("stream"):
            shift = -0.5 if self.fake.adapter_changes and body["model"] == "adapter" else 0.0
            top = [{"token_id:5": -1.0 + shift, "token_id:7": -2.0}]
            self._send(json.dumps({"choices": [{"logprobs": {"top_logprobs": top}}]}).encode())
            return
        prompt, tokens = tuple(body["prompt"]), min(body["max_tokens"], self.fake.most_tokens)
        self.fake.barrier.wait(timeout=10)
        number, cached = self.fake.begin(prompt, tokens)
        self.send_response(200)
        self.end_headers()
        for count in range(1, tokens + 1):
            self._chunk([{"text": ""}], len(prompt), count, {})
            if self.fake.until_looked:
                assert self.fake.looked.wait(timeout=10)
            time.sleep(self.fake.token_seconds)
        details = {"prompt_tokens_details": {"cached_tokens": cached}}
        self._chunk([], len(prompt), tokens, details)
        with self.fake.lock:
            del self.fake.held[number]
        self.wfile.write(b"data: [DONE]\n\n")

    def _chunk(self, choices: list[Any], prompt: int, count: int, more: dict[str, Any]) -> None:
        prompt = self.fake.prompt_tokens or prompt
        usage = {"prompt_tokens": prompt, "completion_tokens": count, **more}
        data = json.dumps({"choices": choices, "usage": usage})
        self.wfile.write(f"data: {data}\n\n".encode())

    def _send(self, data: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None: ...
