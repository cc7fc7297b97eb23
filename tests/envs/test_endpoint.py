"""The endpoint with the `openai` package as its client, and bytes that no client would send."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from minidistill.envs.endpoint import Endpoint
from minidistill.envs.endpoint.http import BODY_BYTES, HEAD_BYTES
from minidistill.envs.endpoint.tool_calls import ToolCall, parse
from minidistill.envs.outcomes import RefusedError
from minidistill.types import Turn

openai = pytest.importorskip("openai")
ASK = {"model": "gpt-4o", "messages": [{"role": "user", "content": "Hi."}]}
TOOL = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {}}}},
}
CALL = 'Let me see.\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


class Script:
    """A policy that says what it is told to, and keeps what it was asked."""

    def __init__(self, *texts: str | Exception | Turn) -> None:
        self.texts, self.asked, self.forgotten = [*texts], [], []  # type: ignore[var-annotated]
        self.turns: list[Turn] = []
        self.open = asyncio.Event()
        self.open.set()
        self.waiting = asyncio.Event()

    async def __call__(self, messages: Any, **more: Any) -> Turn:
        self.asked.append((messages, more))
        self.waiting.set()
        await self.open.wait()
        said = self.texts.pop(0) if self.texts else "Hello."
        if isinstance(said, Exception):
            raise said
        number = len(self.turns)
        turn = said if isinstance(said, Turn) else Turn(said, False, (number, 7), (-0.5, -0.25), 9)
        self.turns.append(turn)
        return turn

    def forget(self, turn: Turn) -> None:
        self.forgotten.append(turn)


def with_client(script: Script, act: Callable[[Any, Endpoint], Awaitable[Any]], **args: Any) -> Any:
    async def play() -> Any:
        async with Endpoint(script, **args) as endpoint:
            client = openai.AsyncOpenAI(
                base_url=endpoint.url, api_key=endpoint.key, max_retries=0, timeout=20
            )
            async with client:
                return await act(client, endpoint)

    return asyncio.run(play())


def test_an_answer() -> None:
    async def act(client: Any, endpoint: Endpoint) -> None:
        messages = [
            {"role": "developer", "content": "Be brief."},
            {
                "role": "user",
                "content": [{"type": "text", "text": "Hi, "}, {"type": "text", "text": "you."}],
            },
        ]
        answer = await client.chat.completions.create(
            model="gpt-4o", messages=messages, max_completion_tokens=5, stop="\n", logprobs=True
        )
        [choice] = answer.choices
        assert (choice.message.content, choice.finish_reason) == ("Hello.", "stop")
        tokens = [(token.token, token.logprob) for token in choice.logprobs.content]
        assert tokens == [("token_id:0", -0.5), ("token_id:7", -0.25)]
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (9, 2)
        assert answer.model == "gpt-4o"
        assert endpoint.messages[-1] == {"role": "assistant", "content": "Hello."}

    script = Script()
    with_client(script, act)
    [(messages, more)] = script.asked
    assert messages == [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi, you."}
    ]  # fmt: skip
    assert (more["max_tokens"], more["stop"], more["tools"]) == (5, ("\n",), [])


def test_several_choices_and_one_that_is_cut_off() -> None:
    async def act(client: Any, endpoint: Endpoint) -> Any:
        answer = await client.chat.completions.create(**ASK, n=2)
        return [(c.index, c.message.content, c.finish_reason) for c in answer.choices]

    script = Script("One.", Turn("Tw", True, (3,), (-1.0,)))
    assert with_client(script, act) == [(0, "One.", "stop"), (1, "Tw", "length")]


def test_a_stream() -> None:
    async def act(client: Any, endpoint: Endpoint) -> None:
        stream = await client.chat.completions.create(
            **ASK, stream=True, stream_options={"include_usage": True}, tools=[TOOL]
        )
        chunks = [chunk async for chunk in stream]
        [call] = chunks[0].choices[0].delta.tool_calls
        assert chunks[0].choices[0].delta.content == "Let me see."
        assert (call.index, call.function.name, call.function.arguments) == (0, "add", '{"a": 1}')
        assert chunks[1].choices[0].finish_reason == "tool_calls"
        assert chunks[2].usage.total_tokens == 11
        assert len(chunks) == 3

    with_client(Script(CALL), act)


def test_tool_calls_come_back_as_they_were_sampled() -> None:
    """However the client writes them. A call that the policy has not made stays what it is."""

    async def act(client: Any, endpoint: Endpoint) -> None:
        messages: list[Any] = [{"role": "user", "content": "Add."}]
        answer = await client.chat.completions.create(model="m", messages=messages, tools=[TOOL])
        message = answer.choices[0].message
        [call] = message.tool_calls
        assert len(call.id) == 9
        reply = {"role": "tool", "tool_call_id": call.id, "content": "2"}
        messages += [message.model_dump(), reply]
        messages[1]["tool_calls"][0]["function"]["arguments"] = '{"a":1}'
        await client.chat.completions.create(model="m", messages=messages, tools=[TOOL])
        messages[1]["tool_calls"][0]["function"]["arguments"] = '{"a":2}'
        await client.chat.completions.create(model="m", messages=messages, tools=[TOOL])

    script = Script(CALL)
    with_client(script, act)
    own, changed = script.asked[1][0], script.asked[2][0]
    assert own[1] == {"role": "assistant", "content": CALL}
    assert changed[1]["content"] == "Let me see."
    assert changed[1]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 2}}
    assert own[2] == {"role": "tool", "content": "2", "tool_call_id": "call00000"}


@pytest.mark.parametrize(
    "text",
    [
        "No call.",
        "<tool_call>{broken</tool_call>",
        '<tool_call>{"name": "other", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "add", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "add", "arguments": {}}</tool_call> and more',
        '<tool_call>{"name": "add", "arguments": {}}',
    ],
)
def test_what_is_no_tool_call_stays_content(text: str) -> None:
    assert parse(text, ["add"]) == (text, [])


def test_two_tool_calls() -> None:
    one = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
    assert parse(f"{one}\n{one}", ["add"]) == ("", [ToolCall("add", {"a": 1})] * 2)


def test_keys_and_routes() -> None:
    async def act(client: Any, endpoint: Endpoint) -> None:
        other = client.with_options(api_key=endpoint.key[:-1] + "é")
        for wrong in (client.with_options(api_key="wrong"),):
            with pytest.raises(openai.AuthenticationError, match="key"):
                await wrong.chat.completions.create(**ASK)
            with pytest.raises(openai.AuthenticationError):
                await wrong.models.list()
        with pytest.raises((openai.AuthenticationError, UnicodeEncodeError)):
            await other.models.list()
        with pytest.raises(openai.NotFoundError, match="/v1/embeddings"):
            await client.embeddings.create(model="m", input="x")
        assert [model.id async for model in client.models.list()] == ["student"]
        assert (await client.models.retrieve("any")).id == "any"

    script = Script()
    with_client(script, act)
    assert not script.asked


def test_it_listens_on_this_machine_only() -> None:
    async def act(client: Any, endpoint: Endpoint) -> None:
        assert endpoint._server is not None
        assert [s.getsockname()[0] for s in endpoint._server.sockets] == ["127.0.0.1"]

    with_client(Script(), act)


def test_each_endpoint_has_its_own_key() -> None:
    async def act(client: Any, endpoint: Endpoint) -> None:
        async with Endpoint(Script()) as other:
            assert other.key != endpoint.key
            with pytest.raises(openai.AuthenticationError):
                await client.with_options(base_url=other.url).models.list()

    with_client(Script(), act)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "function", "content": "x"}]}, "function"),
        ({"messages": [{"role": "user", "content": None}]}, "content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "image_url"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": 1}}]}]}, "call"),
        ({"n": 0}, "n is no whole"),
        ({"n": True}, "n is no whole"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"stop": [1]}, "stop"),
        ({"tools": [{"type": "retrieval"}]}, "function with a name"),
        ({"tool_choice": "any"}, "tool_choice"),
        ({"logprobs": True, "top_logprobs": 3}, "top_logprobs"),
        ({"functions": []}, "functions"),
        ({"modalities": ["audio"]}, "text"),
        ({"stream": "yes"}, "stream"),
        ({"metadata": json.loads("[" * 100 + "]" * 100)}, "nested"),
    ],
    ids=str,
)
def test_requests_that_cannot_be_answered(change: dict[str, Any], said: str) -> None:
    async def act(client: Any, endpoint: Endpoint) -> str:
        with pytest.raises(openai.BadRequestError) as refused:
            await client.post("/chat/completions", body={**ASK, **change}, cast_to=object)
        return str(refused.value.body["message"])  # type: ignore[index]

    script = Script()
    assert said in with_client(script, act)
    assert not script.asked


@pytest.mark.parametrize(
    ("said", "kind", "code"),
    [
        (RefusedError("the template takes no tools"), openai.BadRequestError, None),
        (Turn("", truncated=True), openai.BadRequestError, "context_length_exceeded"),
        (ValueError("a defect"), openai.InternalServerError, None),
    ],
    ids=["template", "room", "defect"],
)
def test_questions_that_the_policy_does_not_answer(said: Any, kind: Any, code: Any) -> None:
    async def act(client: Any, endpoint: Endpoint) -> None:
        with pytest.raises(kind) as refused:
            await client.chat.completions.create(**ASK)
        assert refused.value.code == code
        assert (await client.chat.completions.create(**ASK)).choices[0].message.content == "Hello."

    with_client(Script(said), act)


def test_more_requests_than_allowed() -> None:
    exceeded: list[bool] = []

    async def act(client: Any, endpoint: Endpoint) -> None:
        with pytest.raises(openai.RateLimitError, match="more than 2"):
            await client.chat.completions.create(**ASK, n=3)

    script = Script()
    with_client(script, act, max_requests=2, exceeded=lambda: exceeded.append(True))
    assert exceeded == [True]
    assert script.forgotten == script.turns
    assert len(script.turns) == 2


def test_what_is_not_applied_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    async def act(client: Any, endpoint: Endpoint) -> None:
        for _ in range(2):
            await client.chat.completions.create(
                **ASK, frequency_penalty=0.5, top_p=1, tools=[TOOL], tool_choice="required"
            )

    caplog.set_level("WARNING")
    with_client(Script(), act)
    [said] = [m for m in caplog.messages if "frequency_penalty" in m]
    assert "tool_choice" in said
    assert "top_p" not in said


def test_a_client_that_gives_up() -> None:
    """Its answer is forgotten, and the next request is answered."""

    async def act(client: Any, endpoint: Endpoint) -> None:
        script.open.clear()
        with pytest.raises(openai.APITimeoutError):
            await client.with_options(timeout=0.2).chat.completions.create(**ASK)
        again = asyncio.create_task(client.chat.completions.create(**ASK))
        await asyncio.sleep(0.05)
        script.open.set()
        assert (await again).choices[0].message.content == "Hello."

    script = Script()
    with_client(script, act)
    assert len(script.turns) == 2
    assert script.forgotten == script.turns[:1]


def test_an_answer_that_comes_after_the_end() -> None:
    async def play() -> None:
        script.open.clear()
        async with Endpoint(script) as endpoint:
            client = openai.AsyncOpenAI(base_url=endpoint.url, api_key=endpoint.key, max_retries=0)
            asking = asyncio.create_task(client.chat.completions.create(**ASK))
            await script.waiting.wait()
        with pytest.raises(openai.APIConnectionError):
            await asking
        await client.close()

    script = Script()
    script.open = asyncio.Event()
    asyncio.run(play())
    assert not script.turns


def test_requests_at_once_are_answered_one_after_the_other() -> None:
    async def act(client: Any, endpoint: Endpoint) -> list[str]:
        asking = [client.chat.completions.create(**ASK) for _ in range(20)]
        return sorted(
            [(await each).choices[0].message.content for each in asyncio.as_completed(asking)]
        )

    script = Script(*map(str, range(20)))
    assert with_client(script, act) == sorted(map(str, range(20)))
    assert not script.forgotten


def raw(data: bytes, *, key: bool = True) -> bytes:
    """What the endpoint answers to bytes, after which the client sends no more."""

    async def play() -> bytes:
        async with Endpoint(Script()) as endpoint:
            reader, writer = await asyncio.open_connection("127.0.0.1", int(endpoint.url[17:-3]))
            head = f"Authorization: Bearer {endpoint.key}\r\n" if key else ""
            writer.write(data.replace(b"KEY\r\n", head.encode()))
            async with asyncio.timeout(20):
                answer = await reader.read()
            writer.close()
            return answer

    return asyncio.run(play())


def request(body: bytes, *lines: str) -> bytes:
    head = ["POST /v1/chat/completions HTTP/1.1", "Host: x", "KEY", "Connection: close", *lines]
    return "\r\n".join([*head, "", ""]).encode() + body


LENGTH = "Content-Length: {}".format


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GARBAGE\r\n\r\n", 400),
        (b"GET / HTTP/2.0\r\n\r\n", 400),
        (b"\x16\x03\x01\r\n\r\n", 400),
        (b"GET /v1/models HTTP/1.1\r\nno colon\r\n\r\n", 400),
        (b"GET /v1/models HTTP/1.1\r\nA: " + b"x" * HEAD_BYTES * 2 + b"\r\n\r\n", 431),
        (request(b"", LENGTH("ten")), 400),
        (request(b"", LENGTH(BODY_BYTES + 1)), 413),
        (request(b"", "Transfer-Encoding: chunked"), 411),
        (request(b"{}", LENGTH(2), LENGTH(2)), 400),
        (request(b"\xff\xfe", LENGTH(2)), 400),
        (request(b"[" * 100_000, LENGTH(100_000)), 400),
        (request(b'{"n": NaN}', LENGTH(10)), 400),
        (request(b'{"n": 1' + b"0" * 9999 + b"}", LENGTH(10007)), 400),
        (request(b"[]", LENGTH(2)), 400),
        (b"GET /v1/chat/completions HTTP/1.1\r\nKEY\r\nConnection: close\r\n\r\n", 405),
        (b"PUT /v1/models HTTP/1.1\r\nKEY\r\nConnection: close\r\n\r\n", 405),
        (b"GET /v1/models?x=1 HTTP/1.1\r\nKEY\r\nConnection: close\r\n\r\n", 200),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bytes_that_no_client_would_send(data: bytes, status: int) -> None:
    answer = raw(data)
    assert answer.startswith(f"HTTP/1.1 {status} ".encode())
    if status != 200:
        error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
        assert {"message", "type", "param", "code"} == error.keys()


def test_a_body_is_not_read_without_the_key() -> None:
    assert raw(request(b"", LENGTH(10)), key=False).startswith(b"HTTP/1.1 401 ")
    assert raw(request(b"", LENGTH(10)).replace(b"KEY\r\n", b"KEY\r\n" * 2)).startswith(
        b"HTTP/1.1 400 "
    )
