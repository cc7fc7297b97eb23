"""Chat requests, checked, and the answers to them, in the shapes of OpenAI's API."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minidistill.envs.content import text_content
from minidistill.envs.endpoint.http import HttpError, as_json
from minidistill.envs.endpoint.tool_calls import ToolCall
from minidistill.types import Turn

MOST_CHOICES, MOST_STOPS, MOST_TOOLS, MOST_MESSAGES = 64, 16, 256, 10_000
DEEPEST = 64
ROLES = ("system", "developer", "user", "assistant", "tool")
# What would change the sampled distribution, with the values that change nothing
_SAMPLING: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("temperature", "top_k", "min_p", "seed", "chat_template_kwargs"), ()),
    **dict.fromkeys(("top_p", "repetition_penalty"), (1,)),
    **dict.fromkeys(("presence_penalty", "frequency_penalty"), (0,)),
    **{key: ({},) for key in ("logit_bias",)},
    "response_format": ({"type": "text"},),
    "parallel_tool_calls": (True,),
    "reasoning_effort": (),
}
_REFUSED = ("functions", "function_call", "audio", "web_search_options", "prompt", "input")


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A request that can be answered."""

    model: str
    messages: list[dict[str, Any]]
    """With contents that are text, and the arguments of tool calls as objects."""
    tools: list[dict[str, Any]]
    n: int
    max_tokens: int | None
    stop: tuple[str, ...]
    stream: bool
    stream_usage: bool
    logprobs: bool
    not_applied: tuple[str, ...]
    """What it asked for that would change the sampled distribution."""

    @property
    def tool_names(self) -> list[str]:
        return [tool["function"]["name"] for tool in self.tools]


@dataclass(frozen=True, slots=True)
class Choice:
    """One answer."""

    turn: Turn
    content: str
    calls: Sequence[tuple[str, ToolCall]]
    """Calls of tools, with their ids."""

    @property
    def finish_reason(self) -> str:
        if self.turn.truncated:
            return "length"
        return "tool_calls" if self.calls else "stop"

    @property
    def tool_calls(self) -> list[dict[str, Any]]:
        return [
            {
                "id": id,
                "type": "function",
                "function": {
                    "name": call.name,
                    "arguments": json.dumps(call.arguments, ensure_ascii=False),
                },
            }
            for id, call in self.calls
        ]

    @property
    def message(self) -> dict[str, Any]:
        content = None if self.calls and not self.content else self.content
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if self.calls:
            message["tool_calls"] = self.tool_calls
        return message

    @property
    def logprobs(self) -> dict[str, Any]:
        """Tokens are named by their ids: a token need not be a text of its own."""
        pairs = zip(self.turn.token_ids, self.turn.logprobs, strict=True)
        return {
            "content": [
                {"token": f"token_id:{id}", "bytes": None, "logprob": p, "top_logprobs": []}
                for id, p in pairs
            ],
            "refusal": None,
        }


# -- requests ----------------------------------------------------------------------------------


def parse_request(body: bytes) -> ChatRequest:
    """Read a request. Raises HttpError (400) for one that cannot be answered."""
    try:
        data = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise HttpError(400, f"the body is not JSON: {error}") from None
    _require(isinstance(data, dict), "the body is not a JSON object", None)
    _require(_is_flat(data), f"the body is nested more than {DEEPEST} times", None)
    given = {key: value for key, value in data.items() if value is not None}
    for key in _REFUSED:
        _require(key not in given, f"{key} is not supported", key)
    _require(given.get("modalities", ["text"]) == ["text"], "only text is answered", "modalities")
    model = given.get("model", "student")
    _require(isinstance(model, str) and len(model) <= 1000, "model is no text", "model")
    options = given.get("stream_options", {})
    _require(isinstance(options, dict), "stream_options is no object", "stream_options")
    tools, forced = _tools(given)
    top = _integer(given, "top_logprobs", 0, 0, 20)
    _require(not top, "top_logprobs: only those of the sampled tokens are known", "top_logprobs")
    longest = _integer(given, "max_tokens", 0, 0, 1 << 31)
    longest = _integer(given, "max_completion_tokens", longest, 0, 1 << 31)
    stop = given.get("stop", [])
    stop = [stop] if isinstance(stop, str) else stop
    texts = isinstance(stop, list) and all(isinstance(text, str) and text for text in stop)
    _require(texts and len(stop) <= MOST_STOPS, "stop is not a few texts", "stop")
    changed = [k for k, same in _SAMPLING.items() if k in given and given[k] not in same]
    return ChatRequest(
        model=model,
        messages=_messages(given.get("messages")),
        tools=tools,
        n=_integer(given, "n", 1, 1, MOST_CHOICES),
        max_tokens=longest or None,
        stop=tuple(stop),
        stream=_flag(given, "stream"),
        stream_usage=_flag(options, "include_usage"),
        logprobs=_flag(given, "logprobs"),
        not_applied=(*changed, *forced),
    )


def _is_flat(value: Any) -> bool:
    """Whether objects and lists are nested at most `DEEPEST` times: others are not walked."""
    level = [value]
    for _ in range(DEEPEST):
        inner = [each.values() if isinstance(each, dict) else each for each in level]
        level = [v for values in inner for v in values if isinstance(v, dict | list)]
        if not level:
            return True
    return False


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _require(condition: bool, message: str, param: str | None) -> None:
    if not condition:
        raise HttpError(400, message, param=param)


def _integer(given: Mapping[str, Any], key: str, default: int, least: int, most: int) -> int:
    value = given.get(key, default)
    right = isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
    _require(right, f"{key} is no whole number from {least} to {most}", key)
    return int(value)


def _flag(given: Mapping[str, Any], key: str) -> bool:
    value = given.get(key, False)
    _require(isinstance(value, bool), f"{key} is neither true nor false", key)
    return bool(value)


def _tools(given: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
    """The tools to show, and a name if a choice among them cannot be forced."""
    tools, choice = given.get("tools", []), given.get("tool_choice", "auto")
    _require(isinstance(tools, list) and len(tools) <= MOST_TOOLS, "tools is no list", "tools")
    for tool in tools:
        right = isinstance(tool, dict) and tool.get("type") == "function"
        function = tool.get("function") if right else None
        right = isinstance(function, dict) and isinstance(function.get("name"), str)
        _require(right, "each tool is a function with a name", "tools")
    if choice == "none":
        return [], []
    named = isinstance(choice, dict)
    known = named or choice in ("auto", "required")
    _require(known, f"tool_choice is not known: {str(choice)[:50]}", "tool_choice")
    return tools, ["tool_choice"] if tools and choice != "auto" else []


def _messages(messages: Any) -> list[dict[str, Any]]:
    right = isinstance(messages, list) and 0 < len(messages) <= MOST_MESSAGES
    _require(right, f"messages is no list of 1 to {MOST_MESSAGES}", "messages")
    return [plain_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def plain_message(message: Any, place: str = "message") -> dict[str, Any]:
    """One message as templates read it: no keys without a value, none that they do not know."""
    _require(isinstance(message, dict), f"{place} is no object", place)
    role = message.get("role")
    _require(role in ROLES, f"{place} has the role {str(role)[:50]!r}", place)
    try:
        content = text_content(message.get("content"))
    except ValueError as error:
        raise HttpError(400, f"{place}: {error}", param=place) from None
    calls = message.get("tool_calls") or []
    empty = content is None and role == "assistant"
    _require(isinstance(content, str) or empty, f"the content of {place} is no text", place)
    # templates know one role for instructions
    plain = {"role": "system" if role == "developer" else role, "content": content or ""}
    if role == "assistant" and calls:
        _require(isinstance(calls, list), f"tool_calls of {place} is no list", place)
        plain["tool_calls"] = [_call(call, place) for call in calls]
    for key in ("name", "tool_call_id"):
        value = message.get(key)
        _require(isinstance(value, str | None), f"{key} of {place} is no text", place)
        if value is not None and role in ("tool", "user"):
            plain[key] = value
    return plain


def _call(call: Any, place: str) -> dict[str, Any]:
    function: Any = call.get("function") if isinstance(call, dict) else None
    right = isinstance(function, dict) and isinstance(function.get("name"), str)
    _require(right, f"a tool call of {place} has no function with a name", place)
    arguments = function.get("arguments") or "{}"
    try:
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        _require(False, f"the arguments of a tool call of {place} are not JSON", place)
    id = call.get("id")
    function = {"name": function["name"], "arguments": arguments}
    return {**({"id": id} if isinstance(id, str) else {}), "type": "function", "function": function}


# -- answers -----------------------------------------------------------------------------------


def usage(choices: Sequence[Choice]) -> dict[str, int]:
    read = choices[0].turn.prompt_tokens
    written = sum(len(choice.turn.token_ids) for choice in choices)
    return {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
    }


def completion(request: ChatRequest, choices: Sequence[Choice], id: str, now: int) -> bytes:
    """The answer to a request that does not stream."""
    rows = [
        {
            "index": index,
            "message": choice.message,
            "logprobs": choice.logprobs if request.logprobs else None,
            "finish_reason": choice.finish_reason,
        }
        for index, choice in enumerate(choices)
    ]
    answer = {"id": id, "object": "chat.completion", "created": now, "model": request.model}
    return as_json({**answer, "choices": rows, "usage": usage(choices)})


def events(request: ChatRequest, choices: Sequence[Choice], id: str, now: int) -> bytes:
    """The answer to a request that streams: server-sent events, all of them at once."""
    head = {"id": id, "object": "chat.completion.chunk", "created": now, "model": request.model}
    chunks: list[dict[str, Any]] = []
    for index, choice in enumerate(choices):
        message = {k: v for k, v in choice.message.items() if k in ("role", "content")}
        if choice.calls:
            calls = enumerate(choice.tool_calls)
            message["tool_calls"] = [{"index": i, **call} for i, call in calls]
        logprobs = choice.logprobs if request.logprobs else None
        for delta, extra in (
            (message, {"logprobs": logprobs, "finish_reason": None}),
            ({}, {"logprobs": None, "finish_reason": choice.finish_reason}),
        ):
            chunks.append({**head, "choices": [{"index": index, "delta": delta, **extra}]})
    if request.stream_usage:
        chunks.append({**head, "choices": [], "usage": usage(choices)})
    lines = [b"data: " + as_json(chunk) for chunk in chunks]
    return b"\n\n".join([*lines, b"data: [DONE]", b""])
