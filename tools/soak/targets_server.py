"""Answers of a vLLM server, to the engine that asks one."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any
from unittest import mock

import httpx
import numpy as np

from tools.soak import mutate

PROMPT = (5, 6, 7)
COMPLETION = (8, 9)
MODELS = {
    "object": "list",
    "data": [{"id": "m", "object": "model", "max_model_len": 4096, "parent": None, "root": "m"}],
}
SAMPLED = {
    "id": "cmpl-1", "object": "text_completion", "model": "m",
    "choices": [{
        "index": 0, "text": " a b", "token_ids": [8, 9, 2], "prompt_token_ids": [5, 6, 7],
        "finish_reason": "stop", "stop_reason": None,
        "logprobs": {
            "tokens": ["token_id:8", "token_id:9", "token_id:2"],
            "token_logprobs": [-0.5, -1.0, -0.1], "text_offset": [0, 2, 4],
            "top_logprobs": [{"token_id:8": -0.5}, {"token_id:9": -1.0}, {"token_id:2": -0.1}],
        },
    }],
    "usage": {"prompt_tokens": 3, "total_tokens": 6, "completion_tokens": 3},
}  # fmt: skip
SCORED = {
    "id": "cmpl-2", "object": "text_completion", "model": "m",
    "choices": [{
        "index": 0, "text": "", "finish_reason": "length",
        "prompt_logprobs": [
            None, *({str(t): {"logprob": -0.7, "rank": 1}} for t in (6, 7, 8, 9)),
        ],
    }],
    "usage": {"prompt_tokens": 5, "total_tokens": 6, "completion_tokens": 1},
}  # fmt: skip
ADAPTER = "Success: LoRA adapter added."
STATUSES = (200,) * 12 + (201, 204, 400, 401, 404, 429, 500, 503)


def server_target(folder: Path) -> Any:
    from tools.soak.targets import Target

    return Target("server", make, lambda value: run(value, folder / "sync"), prepare)


def prepare() -> None:
    """Import what takes longer than an input may."""
    import minidistill.engines.server.engine  # noqa: F401


def make(random: Random) -> dict[str, Any]:
    """One wrong answer: which request gets it, its status, and its content."""
    request = random.choice(["models", "sample", "score"])
    right: Any = {"models": MODELS, "sample": SAMPLED, "score": SCORED}[request]
    if random.random() < 0.75:
        data = mutate.encode(mutate.as_json(random, mutate.change(random, right)))
    else:
        data = mutate.damage(random, json.dumps(right).encode())
    kind = random.choice(
        ["application/json"] * 6 + ["text/html", "application/json; charset=x\x7f"]
    )
    return {
        "request": request,
        "status": random.choice(STATUSES),
        "type": kind,
        "data": data.decode("latin-1"),
    }


def run(value: dict[str, Any], folder: Path) -> None:
    from minidistill.engines.server.engine import ServerEngine
    from minidistill.types import Request, Role, SamplingParams

    def answer(request: httpx.Request) -> httpx.Response:
        kind = _kind(request)
        right = {"models": MODELS, "sample": SAMPLED, "score": SCORED}[kind]
        data, status, content_type = json.dumps(right).encode(), 200, "application/json"
        if kind == value["request"]:
            data, status, content_type = (
                value["data"].encode("latin-1"),
                value["status"],
                value["type"],
            )
        headers = {"content-type": content_type, "content-length": str(len(data))}
        return httpx.Response(status, headers=headers, stream=httpx.ByteStream(data))

    with _answering(answer):
        where, command = "inference.server_urls", "vllm serve M"
        engine = ServerEngine("http://server:1", where, command, 64, folder, 0, silence=5.0)
        engine.server.patience = 0.0
        policy: Any = SimpleNamespace(
            lora=False,
            eos_ids=frozenset({2}),
            weights_of=lambda role: "base",
            tokenizer=range(64),
            head_VH=np.zeros((64, 8)),
        )
        try:
            engine.attach(policy, [Role.STUDENT])
            engine.wait_until_ready()
            (sampled,) = engine.generate([Request(PROMPT, 1)], SamplingParams(4), Role.STUDENT)
            assert len(sampled.token_ids) == len(sampled.logprobs) <= 4, "unequal lengths"
            assert all(type(t) is int and 0 <= t < 64 for t in sampled.token_ids), "ids of no token"
            assert all(type(p) is float and p == p for p in sampled.logprobs), (
                "log-probs of no kind"
            )
            (scores,) = engine.score([PROMPT], [COMPLETION], Role.STUDENT)
            assert len(scores) == len(COMPLETION), "unequal lengths"
            assert all(type(p) is float and p == p for p in scores), "log-probs of no kind"
        finally:
            engine.close()


def _kind(request: httpx.Request) -> str:
    if request.url.path.endswith("/models"):
        return "models"
    return "score" if b"prompt_logprobs" in request.content else "sample"


@contextlib.contextmanager
def _answering(answer: Any) -> Iterator[None]:
    """Nothing is sent: `answer` makes the answer of each request."""

    def transport(**options: Any) -> httpx.MockTransport:
        return httpx.MockTransport(answer)

    with (
        mock.patch.object(httpx, "HTTPTransport", transport),
        mock.patch.object(httpx, "AsyncHTTPTransport", transport),
    ):
        yield
