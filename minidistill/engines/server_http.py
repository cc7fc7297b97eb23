"""The requests that a vLLM server is sent."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import httpx

KEY = "VLLM_API_KEY"
CONNECT_SECONDS = 10.0
IN_FLIGHT = 512  # requests at a time; the server schedules them
_LIMITS = httpx.Limits(max_connections=IN_FLIGHT, max_keepalive_connections=IN_FLIGHT)
_WATCHED = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 6}

Check = Callable[[httpx.Response], httpx.Response]


class GoneError(Exception):
    """The server cannot be reached, or failed as a whole."""


def request(url: str, method: str, path: str, body: Any = None) -> httpx.Response:
    """The answer to one request. Raises GoneError."""
    # proxies of the environment are not asked: the server is the user's own
    transport = httpx.HTTPTransport(socket_options=_keep_alive())
    try:
        with httpx.Client(transport=transport, **_options(url)) as client:
            return client.request(method, path, json=body)
    except httpx.TransportError as error:
        raise GoneError(_reason(error)) from error


def post_all(
    url: str,
    path: str,
    bodies: Mapping[int, dict[str, Any]],
    check: Check,
    take: Callable[[int, Any], None],
) -> None:
    """Send all at once; `take` is given the data of each answer that passes `check` as it comes.

    Raises GoneError, and what `check` raises; what is still in flight is then given up.
    """

    async def ask() -> None:
        room = asyncio.Semaphore(IN_FLIGHT)
        transport = httpx.AsyncHTTPTransport(limits=_LIMITS, socket_options=_keep_alive())
        async with httpx.AsyncClient(transport=transport, **_options(url)) as client:

            async def one(index: int, body: dict[str, Any]) -> None:
                async with room:
                    answer = await client.post(path, json=body)
                take(index, check(answer).json())

            tasks = [asyncio.create_task(one(i, body)) for i, body in bodies.items()]
            try:
                await asyncio.gather(*tasks)
            except httpx.TransportError as error:
                raise GoneError(_reason(error)) from error
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(ask())


def message(answer: httpx.Response) -> str:
    """What a server says went wrong, in one line."""
    try:
        found = answer.json()
        text = found["error"]["message"] if "error" in found else found["detail"]
    except (ValueError, KeyError, TypeError):
        text = answer.text or answer.reason_phrase
    lines = str(text).strip().splitlines() or [answer.reason_phrase]
    return f"{lines[0][:300]} (HTTP {answer.status_code})"


def _options(url: str) -> dict[str, Any]:
    """Connecting is bounded in time; a completion may take as long as it does."""
    secret = os.environ.get(KEY)
    return {
        "base_url": url,
        "headers": {"Authorization": f"Bearer {secret}"} if secret else {},
        "timeout": httpx.Timeout(None, connect=CONNECT_SECONDS),
    }


def _keep_alive() -> Sequence[tuple[int, int, int]]:
    """Have a machine noticed that vanishes without a word while it is waited for."""
    known = {n: v for n, v in _WATCHED.items() if hasattr(socket, n)}
    watched = [(socket.IPPROTO_TCP, getattr(socket, n), v) for n, v in known.items()]
    return [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1), *watched]


def _reason(error: httpx.TransportError) -> str:
    return str(error) or type(error).__name__
