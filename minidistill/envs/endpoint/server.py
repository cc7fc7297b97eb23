"""The policy at an address of this machine, which one program gets for one episode."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any, Self

from minidistill.envs.endpoint import chat, http
from minidistill.envs.endpoint.chat import ChatRequest, Choice
from minidistill.envs.endpoint.http import Head, HttpError
from minidistill.envs.endpoint.tool_calls import parse
from minidistill.envs.multi_turn import Policy
from minidistill.envs.outcomes import RefusedError, ScoringError
from minidistill.system.foreign import describe
from minidistill.types import Turn

logger = logging.getLogger(__name__)
HOST = "127.0.0.1"
MODEL = "student"
"""The name in the list of models. Requests may name any."""
MOST_CONNECTIONS = 256
_said: set[str] = set()


class Endpoint:
    """OpenAI's chat completions, answered by the `policy` of a rollout.

    Used in a rollout, as `async with Endpoint(policy) as endpoint`: a program that has `url` and
    `key` is then answered by the policy until the block ends. Requests are answered one after the
    other, whatever their connections. Each is a question to the policy, and with `n` several. An
    answer that its client has not waited for is forgotten, so that it is not trained on.
    """

    def __init__(
        self,
        policy: Policy,
        max_requests: int | None = None,
        exceeded: Callable[[], object] = lambda: None,
    ) -> None:
        """Of more answers than `max_requests` each is an error, and `exceeded` is called."""
        self.key = secrets.token_urlsafe(32)
        self.url = ""
        self.requests = 0
        """Answers that were asked for."""
        self.messages: list[dict[str, Any]] = []
        """The last request that was answered, and its answer."""
        self._policy, self._most, self._exceeded = policy, max_requests, exceeded
        self._turn = asyncio.Lock()
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self._texts: dict[str, str] = {}  # the sampled text of answers that were given otherwise
        self._calls = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(
            self._connected, HOST, 0, limit=http.HEAD_BYTES, backlog=MOST_CONNECTIONS
        )
        self.url = f"http://{HOST}:{self._server.sockets[0].getsockname()[1]}/v1"
        return self

    async def __aexit__(self, *error: object) -> None:
        assert self._server is not None
        self._server.close()
        for connection in self._connections:
            connection.cancel()
        if self._connections:
            await asyncio.wait(self._connections)

    # -- connections ---------------------------------------------------------------------------

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        if len(self._connections) >= MOST_CONNECTIONS:
            writer.transport.abort()
            return
        self._connections.add(task)
        try:
            patience = http.HEAD_SECONDS
            while await self._serve(reader, writer, patience):
                patience = http.IDLE_SECONDS
        except (OSError, EOFError, asyncio.CancelledError):
            pass  # the client has gone, or the episode has ended
        finally:
            self._connections.discard(task)
            writer.close()

    async def _serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, patience: float
    ) -> bool:
        """Answer one request, which is to come within `patience` seconds. Returns whether the
        connection stays open."""
        try:
            head = await http.read_head(reader, patience)
            if head is None:
                return False
            self._check_key(head)
            body = await http.read_body(head, reader, writer)
        except HttpError as error:  # what follows may be anything
            await _send(writer, error.status, http.as_json(error.body))
            return False
        choices: list[Choice] = []
        kind, keeps_open = "application/json", head.keeps_open
        try:
            request = self._route(head, body)
            if request is None:
                status, answer = 200, self._models(head.path)
            else:
                gone = asyncio.ensure_future(reader.read(1))
                try:
                    async with self._turn:
                        await self._answer(request, choices, gone)
                        self._check_present(gone)
                        self._remember(request, choices)
                finally:
                    gone.cancel()
                    await asyncio.wait([gone])
                    keeps_open &= gone.cancelled()  # else it sent something without an answer
                id, now = f"chatcmpl-{secrets.token_hex(12)}", int(time.time())
                write = chat.events if request.stream else chat.completion
                status, answer = 200, write(request, choices, id, now)
                kind = "text/event-stream" if request.stream else kind
            await _send(writer, status, answer, kind, keeps_open=keeps_open)
        except HttpError as error:
            self._forget(choices)
            answer = http.as_json(error.body)
            await _send(writer, error.status, answer, keeps_open=keeps_open)
        except (OSError, EOFError, asyncio.CancelledError):
            self._forget(choices)
            raise
        except Exception as error:
            logger.warning(f"a request could not be answered: {describe(error)}")
            self._forget(choices)
            answer = http.as_json(HttpError(500, "the request could not be answered").body)
            await _send(writer, 500, answer)
            return False
        return keeps_open

    def _check_key(self, head: Head) -> None:
        kind, _, key = head.headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(key.strip().encode("latin-1"), self.key.encode())
        if kind.lower() != "bearer" or not right:
            raise HttpError(401, "the key is not that of this episode", code="invalid_api_key")

    # -- routes --------------------------------------------------------------------------------

    def _route(self, head: Head, body: bytes) -> ChatRequest | None:
        """The chat request, None for one about models. Raises HttpError."""
        if head.path == "/v1/chat/completions":
            if head.method != "POST":
                raise HttpError(405, f"{head.path} takes POST")
            return chat.parse_request(body)
        if head.path == "/v1/models" or head.path.startswith("/v1/models/"):
            if head.method != "GET":
                raise HttpError(405, f"{head.path} takes GET")
            return None
        raise HttpError(404, f"there is no {head.method} {head.path[:100]}", code="unknown_url")

    def _models(self, path: str) -> bytes:
        name = path.removeprefix("/v1/models").removeprefix("/")
        model = {"id": name or MODEL, "object": "model", "created": 0, "owned_by": "minidistill"}
        return http.as_json(model if name else {"object": "list", "data": [model]})

    # -- answers -------------------------------------------------------------------------------

    async def _answer(
        self, request: ChatRequest, choices: list[Choice], gone: asyncio.Future[bytes]
    ) -> None:
        """Add the answers of the policy to `choices`. Raises HttpError."""
        _say(request.not_applied)
        messages = self._as_sampled(request.messages)
        for _ in range(request.n):
            self._check_present(gone)
            self.requests += 1
            if self._most is not None and self.requests > self._most:
                self._exceeded()
                what = f"more than {self._most} answers were asked for (max_requests)"
                raise HttpError(429, what, code="rate_limit_exceeded")
            try:
                turn = await self._policy(
                    messages,
                    tools=request.tools,
                    max_tokens=request.max_tokens,
                    stop=request.stop,
                )
            except (RefusedError, TypeError) as error:
                raise HttpError(400, str(error), param="messages") from None
            except ScoringError as error:
                raise HttpError(503, str(error)) from None
            if not turn.token_ids:
                what = "the messages leave no room for an answer (seq_len)"
                raise HttpError(400, what, code="context_length_exceeded", param="messages")
            choices.append(self._choice(turn, request))

    def _choice(self, turn: Turn, request: ChatRequest) -> Choice:
        content, calls = parse(turn.text, request.tool_names) if request.tools else (turn.text, [])
        self._calls += len(calls)
        first = self._calls - len(calls)
        # nine letters and digits, which the strictest templates ask for; the same in each run
        return Choice(turn, content, [(f"call{first + i:05d}", c) for i, c in enumerate(calls)])

    def _check_present(self, gone: asyncio.Future[bytes]) -> None:
        """Raise EOFError if the client has closed the connection."""
        if gone.done() and (gone.cancelled() or gone.exception() or not gone.result()):
            raise EOFError

    def _forget(self, choices: Sequence[Choice]) -> None:
        for choice in choices:
            self._policy.forget(choice.turn)

    def _remember(self, request: ChatRequest, choices: Sequence[Choice]) -> None:
        for choice in choices:
            answer = chat.plain_message(choice.message)
            self.messages = [*request.messages, answer]
            if choice.calls:
                self._texts[_keys(self.messages)[-1]] = choice.turn.text

    def _as_sampled(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The messages with calls of tools as the policy wrote them, so that they extend it."""
        if not self._texts:
            return messages
        texts = [self._texts.get(key) for key in _keys(messages)]
        return [
            message if text is None else {"role": "assistant", "content": text}
            for message, text in zip(messages, texts, strict=True)
        ]


def _keys(messages: Sequence[dict[str, Any]]) -> list[str]:
    """For each message a hash of the conversation up to it. Ids of tool calls do not count."""
    whole, keys = hashlib.sha256(), []
    for message in messages:
        calls = [call["function"] for call in message.get("tool_calls", [])]
        part = [message["role"], message["content"], calls]
        whole.update(json.dumps(part, sort_keys=True).encode() + b"\n")
        keys.append(whole.hexdigest())
    return keys


async def _send(
    writer: asyncio.StreamWriter,
    status: int,
    body: bytes,
    kind: str = "application/json",
    *,
    keeps_open: bool = False,
) -> None:
    writer.write(http.response(status, body, kind, keeps_open=keeps_open))
    await writer.drain()


def _say(names: Sequence[str]) -> None:
    """Warn once about parameters that are ignored."""
    new = [name for name in names if name not in _said]
    _said.update(new)
    if new:
        logger.warning(
            f"a program sets {', '.join(new)} in its requests: not applied, because the policy "
            "that is trained is sampled as orchestrator.sampling says"
        )
