"""A client of verifiers, before its version 0.4, that hands each request to a policy."""

from __future__ import annotations

import json
import time
import uuid
from typing import Any

from minidistill.envs.endpoint.chat import plain_message
from minidistill.envs.endpoint.tool_calls import parse
from minidistill.envs.multi_turn import Policy
from minidistill.envs.verifiers.rows import without_empty
from minidistill.types import Turn

MODEL = "policy"
"""The model's name, as the environment sees it."""
Answer = tuple[Turn, list[str]]
"""An answer, and the names of the tools that it could call."""


def client_class() -> Any:
    """The class of such clients. It is made when verifiers is there to inherit from."""
    from verifiers.clients import Client
    from verifiers.errors import OverlongPromptError
    from verifiers.types import Response, ResponseMessage, ToolCall, Usage

    class PolicyClient(Client):
        """A client for one conversation, whose `client` is the policy."""

        def __init__(self, policy: Policy) -> None:
            super().__init__(policy)
            self._texts: dict[
                str, str
            ] = {}  # of answers with calls of tools, by the first one's id

        def setup_client(self, config: Any) -> Policy:
            raise TypeError("the policy of a run has no configuration")

        async def to_native_tool(self, tool: Any) -> dict[str, Any]:
            shown = {key: getattr(tool, key) for key in ("name", "description", "parameters")}
            return {"type": "function", "function": shown}

        async def to_native_prompt(
            self, messages: Any
        ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
            return [self._native(without_empty(message)) for message in messages], {}

        def _native(self, message: dict[str, Any]) -> dict[str, Any]:
            """A message as the policy reads it: its own answers as it has written them."""
            calls = message.get("tool_calls") or []
            if calls and (text := self._texts.get(calls[0]["id"])) is not None:
                return {"role": "assistant", "content": text}
            if calls:
                functions = [{k: c[k] for k in ("name", "arguments")} for c in calls]
                message = {**message, "tool_calls": [{"function": f} for f in functions]}
            return plain_message(message)

        async def get_native_response(
            self,
            prompt: list[dict[str, Any]],
            model: str,
            sampling_args: Any,
            tools: list[dict[str, Any]] | None = None,
            **kwargs: Any,
        ) -> Answer:
            turn = await self.client(prompt, tools=tools or [])
            return turn, [tool["function"]["name"] for tool in tools or []]

        async def raise_from_native_response(self, response: Answer) -> None:
            if not response[0].token_ids:
                raise OverlongPromptError("the conversation has no room for another turn")

        async def from_native_response(self, response: Answer) -> Any:
            turn, tools = response
            content, calls = parse(turn.text, tools) if tools else (turn.text, [])
            ids = [f"call{len(self._texts)}-{number}" for number in range(len(calls))]
            if calls:
                self._texts[ids[0]] = turn.text
            finish = "tool_calls" if calls else "stop"
            message = ResponseMessage(
                content=content,
                finish_reason="length" if turn.truncated else finish,
                is_truncated=turn.truncated,
                tool_calls=[
                    ToolCall(id=id, name=call.name, arguments=json.dumps(call.arguments))
                    for id, call in zip(ids, calls, strict=True)
                ]
                or None,
            )
            read, written = turn.prompt_tokens, len(turn.token_ids)
            usage = Usage(
                prompt_tokens=read,
                reasoning_tokens=0,
                completion_tokens=written,
                total_tokens=read + written,
            )
            return Response(
                id=uuid.uuid4().hex,
                created=int(time.time()),
                model=MODEL,
                usage=usage,
                message=message,
            )

        async def close(self) -> None:
            """The engine is the run's."""

    return PolicyClient
