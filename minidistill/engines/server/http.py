"""HTTP requests to a vLLM server."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from minidistill.system.http import Answer, BrokenError, ask, headers, opening
from minidistill.system.subprocesses import Silence

logger = logging.getLogger(__name__)

KEY = "VLLM_API_KEY"
CONNECT_SECONDS = 10.0
ANSWER_SECONDS = 120.0  # for anything but a completion
SAID_SECONDS = 10.0  # of waiting for such an answer, before it is said
CLOSED_SECONDS = 0.2  # how often to check whether the engine was closed
IN_FLIGHT = 512  # requests at a time; the server schedules them
SMALL = 4 << 20  # bytes of an answer to anything but a completion
_KEEP_ALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 6}

Post = Callable[[str, Any], Awaitable[Answer]]


class GoneError(Exception):
    """The server cannot be reached, or failed as a whole."""


@dataclass(frozen=True, slots=True)
class Client:
    """Sends requests to one server. Raises BadAnswerError for what is no answer to them.

    The environment's proxies are ignored: the server is the user's.
    """

    url: str
    key: str = field(repr=False)
    silence: float
    """Seconds that the server may answer none of the completions that it was asked for."""
    largest: int
    """Bytes of an answer to one of them."""

    def request(
        self, method: str, path: str, body: Any = None, seconds: float | None = None
    ) -> Answer:
        """The answer to one short request. Raises GoneError."""
        seconds = seconds or ANSWER_SECONDS
        text = f"waiting for {self.url}{path}, for up to {seconds:g} s"

        async def send() -> Answer:
            said = asyncio.get_running_loop().call_later(SAID_SECONDS, logger.info, text)
            try:
                async with self._open() as client, asyncio.timeout(seconds):
                    return await ask(client, method, path, body, self.key, SMALL)
            except TimeoutError:
                raise GoneError(f"no answer within {seconds:g} s") from None
            except BrokenError as error:
                raise GoneError(str(error)) from None
            finally:
                said.cancel()

        return asyncio.run(send())

    def send_all(
        self,
        send: Callable[[Post, int], Coroutine[Any, Any, None]],
        indices: Sequence[int],
        closed: Callable[[], bool],
    ) -> None:
        """Run `send` for all indices concurrently. It gets a function that posts a body to a path.

        Raises what `send` raises, GoneError if the server or this engine (`closed`) goes away, and
        UserError (exit code 3) if the server is silent. Requests in flight are then cancelled,
        which the server notices.
        """
        silence = Silence(f"the server at {self.url}", self.silence, "silence.step")
        tick = min(CLOSED_SECONDS, silence.tick)

        async def run() -> None:
            semaphore = asyncio.Semaphore(IN_FLIGHT)
            progress = False

            def arrived() -> None:
                nonlocal progress
                progress = True

            async with self._open() as client:

                async def post(path: str, body: Any) -> Answer:
                    try:
                        return await ask(
                            client, "POST", path, body, self.key, self.largest, arrived
                        )
                    except BrokenError as error:
                        raise GoneError(str(error)) from None

                async def run_one(index: int) -> None:
                    async with semaphore:
                        await send(post, index)

                tasks = {asyncio.create_task(run_one(index)) for index in indices}
                left = tasks
                try:
                    while left:
                        done, left = await asyncio.wait(
                            left, timeout=tick, return_when=asyncio.FIRST_EXCEPTION
                        )
                        for task in done:
                            task.result()
                        if left and closed():
                            raise GoneError("this run has ended")
                        doing = f"{len(left)} requests to answer"
                        if progress or done:
                            progress = False
                            silence.broken()
                        elif silence.lasts(tick, doing):
                            raise silence.error(doing, fix="see the server's log")
                finally:
                    for task in tasks:
                        task.cancel()
                    await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run(run())

    def _open(self) -> httpx.AsyncClient:
        """A client that bounds connecting only: who waits for an answer bounds that."""
        limits = httpx.Limits(max_connections=IN_FLIGHT, max_keepalive_connections=IN_FLIGHT)
        with opening(self.key, self.url):
            return httpx.AsyncClient(
                base_url=self.url,
                headers=headers(self.key),
                # an explicit transport ignores the environment's proxies
                transport=httpx.AsyncHTTPTransport(limits=limits, socket_options=_keep_alive()),
                timeout=httpx.Timeout(None, connect=CONNECT_SECONDS),
            )


def _keep_alive() -> Sequence[tuple[int, int, int]]:
    """TCP keep-alive, to notice that the server's machine is gone while waiting for it."""
    intervals = [
        (socket.IPPROTO_TCP, getattr(socket, name), value)
        for name, value in _KEEP_ALIVE.items()
        if hasattr(socket, name)  # not on every platform
    ]
    return [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1), *intervals]
