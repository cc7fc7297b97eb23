"""HTTP requests to a vLLM server."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

import httpx

KEY = "VLLM_API_KEY"
CONNECT_SECONDS = 10.0
ANSWER_SECONDS = 120.0  # for anything but a completion
CLOSED_SECONDS = 0.2  # how often to check whether the engine was closed
IN_FLIGHT = 512  # requests at a time; the server schedules them
_LIMITS = httpx.Limits(max_connections=IN_FLIGHT, max_keepalive_connections=IN_FLIGHT)
_KEEP_ALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 6}

Post = Callable[[str, Any], Awaitable[httpx.Response]]


class GoneError(Exception):
    """The server cannot be reached, or failed as a whole."""


def request(url: str, method: str, path: str, body: Any = None) -> httpx.Response:
    """The answer to one short request. Raises GoneError."""
    # an explicit transport ignores the environment's proxies: the server is the user's
    transport = httpx.HTTPTransport(socket_options=_keep_alive())
    try:
        with httpx.Client(transport=transport, **_options(url, ANSWER_SECONDS)) as client:
            return client.request(method, path, json=body)
    except httpx.TransportError as error:
        raise GoneError(_reason(error)) from error


def send_all(
    url: str,
    send: Callable[[Post, int], Coroutine[Any, Any, None]],
    indices: Sequence[int],
    closed: Callable[[], bool],
) -> None:
    """Run `send` for all indices concurrently. It gets a function that posts a body to a path.

    Raises what `send` raises, and GoneError if the server or this engine (`closed`) goes away.
    Requests in flight are then cancelled, which the server notices.
    """

    async def run() -> None:
        semaphore = asyncio.Semaphore(IN_FLIGHT)
        transport = httpx.AsyncHTTPTransport(limits=_LIMITS, socket_options=_keep_alive())
        async with httpx.AsyncClient(transport=transport, **_options(url, None)) as client:

            async def post(path: str, body: Any) -> httpx.Response:
                try:
                    return await client.post(path, json=body)
                except httpx.TransportError as error:
                    raise GoneError(_reason(error)) from error

            async def run_one(index: int) -> None:
                async with semaphore:
                    await send(post, index)

            tasks = {asyncio.create_task(run_one(index)) for index in indices}
            left = tasks
            try:
                while left:
                    done, left = await asyncio.wait(
                        left, timeout=CLOSED_SECONDS, return_when=asyncio.FIRST_EXCEPTION
                    )
                    for task in done:
                        task.result()
                    if left and closed():
                        raise GoneError("this run has ended")
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(run())


def message(answer: httpx.Response) -> str:
    """A server's error message in one line."""
    try:
        body = answer.json()
        text = body["error"]["message"] if "error" in body else body["detail"]
    except (ValueError, KeyError, TypeError):
        text = answer.text or answer.reason_phrase
    lines = str(text).strip().splitlines() or [answer.reason_phrase]
    return f"{lines[0][:300]} (HTTP {answer.status_code})"


def _options(url: str, seconds: float | None) -> dict[str, Any]:
    """`seconds` bounds the time to an answer; None (for completions) bounds connecting only."""
    secret = os.environ.get(KEY)
    return {
        "base_url": url,
        "headers": {"Authorization": f"Bearer {secret}"} if secret else {},
        "timeout": httpx.Timeout(seconds, connect=CONNECT_SECONDS),
    }


def _keep_alive() -> Sequence[tuple[int, int, int]]:
    """TCP keep-alive, to notice that the server's machine is gone while waiting for it."""
    intervals = [
        (socket.IPPROTO_TCP, getattr(socket, name), value)
        for name, value in _KEEP_ALIVE.items()
        if hasattr(socket, name)  # not on every platform
    ]
    return [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1), *intervals]


def _reason(error: httpx.TransportError) -> str:
    return str(error) or type(error).__name__
