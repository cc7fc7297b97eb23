"""The reward `judge` with a server that fails: busy, slow, broken, malicious or absent."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from support.judge_server import Answer, Handler, serving
from support.judges import KEY, ask, failure, hang, judge, say

from minidistill.envs.rewards import judge_http
from minidistill.types import Reward


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(judge_http, "FIRST_WAIT", 0.05)


def flaky(*statuses: int) -> Answer:
    left = list(statuses)

    def answer(handler: Handler, body: dict[str, Any]) -> None:
        if left:
            data = b'{"error": {"message": "busy: key %s"}}' % KEY.encode()
            handler.send(data, left.pop(0), Retry_After="0")
        else:
            handler.say("6")

    return answer


def test_an_overloaded_server_is_asked_again() -> None:
    with serving(flaky(500, 429, 503)) as server:
        assert ask(judge(server.url), "x") == [Reward(0.6, {"judge_score": 6})]
        assert len(server.requests) == 4


def test_repetitions_end_with_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with serving(flaky(*[500] * 99)) as server:
        error = failure(judge(server.url, budget=0.5, key_env="JUDGE_KEY"))
    # waits of 0.05, 0.1 and 0.2 seconds; the next would pass the budget
    asked = len(server.requests)
    assert 2 <= asked <= 4
    assert str(error).endswith(f"failed ({asked} times in 0.5 s): busy: key *** (HTTP 500)")
    assert error.slow


def test_a_server_that_asks_for_more_than_the_budget_is_not_waited_for() -> None:
    with serving(lambda h, body: h.send(b"later", 429, Retry_After="3600")) as server:
        began = time.monotonic()
        error = failure(judge(server.url, budget=5))
    assert time.monotonic() - began < 2
    assert "later (HTTP 429)" in str(error)


def test_a_refused_key_is_not_tried_again_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    data = f'{{"error": {{"message": "Incorrect API key provided: {KEY}"}}}}'.encode()
    with serving(lambda handler, body: handler.send(data, 401)) as server:
        error = failure(judge(server.url, key_env="JUDGE_KEY"))
    assert len(server.requests) == 1
    assert str(error).endswith("Incorrect API key provided: *** (HTTP 401)")
    assert not error.slow


def drip(handler: Handler, body: dict[str, Any]) -> None:
    """A byte now and then: no single read takes long."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    while not handler.judge.hang_up.wait(0.02):
        handler.wfile.write(b" ")


@pytest.mark.parametrize("answer", [hang, drip])
def test_a_server_that_hangs_is_given_up(answer: Answer) -> None:
    with serving(answer) as server:
        began = time.monotonic()
        error = failure(judge(server.url, timeout=0.2, budget=0.5))
        assert time.monotonic() - began < 3
    assert "no answer within" in str(error)
    assert error.slow
    assert len(server.requests) >= 2


def endless(handler: Handler, body: dict[str, Any]) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", str(1 << 40))
    handler.end_headers()
    while not handler.judge.hang_up.is_set():
        handler.wfile.write(b" " * (1 << 20))


FAULTS: dict[str, tuple[Answer, str]] = {
    "a huge answer": (endless, "its answer is larger than 4 MiB"),
    "not JSON": (lambda h, b: h.send(b"<html>hello"), "no chat completion: <html>hello"),
    "garbage": (lambda h, b: h.send(bytes(range(128, 256))), "no chat completion: "),
    "no choices": (lambda h, b: h.send(b'{"choices": []}'), "no chat completion: "),
    "no content": (say(None), "no chat completion: "),
    "nested too deeply": (lambda h, b: h.send(b"[" * 100_000), "no chat completion: "),
    "a redirect": (
        lambda h, b: h.send(b"", 307, Location=f"{h.judge.url}/else"), "it redirects (HTTP 307)",
    ),
    "a missing page": (lambda h, b: h.send(b"no page", 404), "no page (HTTP 404)"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_answer_is_a_failure_at_once(name: str) -> None:
    answer, message = FAULTS[name]
    with serving(answer) as server:
        error = failure(judge(server.url))
    assert str(error).startswith(f"the judge at {server.url} failed: ")
    assert message in str(error)
    assert not error.slow
    assert len(server.requests) == 1  # a redirect's target gets no request, and no key


def test_a_connection_that_breaks_is_repeated() -> None:
    def cut(handler: Handler, body: dict[str, Any]) -> None:
        if len(handler.judge.requests) == 1:
            handler.connection.close()
            handler.close_connection = True
        else:
            handler.say("1")

    with serving(cut) as server:
        assert ask(judge(server.url), "x") == [Reward(0.1, {"judge_score": 1})]


def test_no_server() -> None:
    with serving(say("1")) as server:
        pass
    error = failure(judge(server.url, budget=0.2))
    assert error.slow
    assert f"the judge at {server.url} failed" in str(error)


def test_a_key_in_what_the_judge_says_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with serving(say(f"Your key is {KEY}")) as server:
        error = failure(judge(server.url, key_env="JUDGE_KEY"))
    assert str(error) == "the judge's answer has no score: 'Your key is ***'"
