"""The reward `judge`, asked over HTTP from a server on this machine, with faults."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support.judge_server import Handler, serving
from support.judges import KEY, TASK, ask, failure, hang, judge, say

from minidistill.envs.outcomes import Attempt, CannotScoreError, Outcome
from minidistill.envs.rewards import judge_http
from minidistill.errors import EXIT_ENVIRONMENT, UserError
from minidistill.types import Reward, Task


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(judge_http, "FIRST_WAIT", 0.05)


# -- scores ------------------------------------------------------------------------------------


def test_a_score_and_the_request_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with serving(say("It is good.\nScore: 7.5")) as server:
        reward = judge(server.url + "/", key_env="JUDGE_KEY", body={"max_tokens": 9})
        assert reward.score(TASK, "{prompt} \ud83d") == Reward(0.75, {"judge_score": 7.5})
    question = "Q: Say {answer}.\nA: {prompt} ?\nRight: yes\nScore from 0 to 10?"
    messages = [{"role": "user", "content": question}]
    assert server.requests == [{"max_tokens": 9, "model": "m", "messages": messages}]
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert server.paths == ["/v1/chat/completions"]
    assert KEY not in repr(reward)


def test_what_the_judge_is_shown_by_default() -> None:
    chat = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"})
    with serving(say("1")) as server:
        reward = judge(server.url, prompt="{prompt}|{completion}", scale=[0, 1])
        assert ask(reward, "x", task=Task("t", chat)) == [Reward(1.0, {"judge_score": 1.0})]
    assert server.requests[0]["temperature"] == 0
    assert server.requests[0]["messages"][0]["content"] == "system: Be brief.\n\nuser: Hi|x"
    assert "Authorization" not in server.headers[0]


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("7", 7), (" 7.\n", 7), ("**Score: 3.5**", 3.5), ("<think>2 or 9</think>\n\n4", 4),
        ("score = 0", 0), ('{"reason": "1", "score": 10}', 10), ("+2", 2),
    ],
)  # fmt: skip
def test_answers_with_a_score(answer: str, score: float) -> None:
    with serving(say(answer)) as server:
        assert ask(judge(server.url), "x") == [Reward(score / 10, {"judge_score": score})]


@pytest.mark.parametrize(
    "answer",
    ["", "good", "7/10", "nan", "Score: inf", "7 or 8", "7\n\nI think.", '{"score": true}',
     '{"score": NaN}', "[7]", '{"score": "7"}'],
)  # fmt: skip
def test_answers_without_a_score_are_failures(answer: str) -> None:
    with serving(say(answer)) as server:
        error = failure(judge(server.url))
    assert str(error).startswith("the judge's answer has no score")
    assert len(server.requests) == 1


@pytest.mark.parametrize("answer", ["-1", "11", "9" * 400, '{"score": 1e200}'])
def test_scores_outside_the_scale_are_failures(answer: str) -> None:
    with serving(say(answer)) as server:
        assert "is not from 0 to 10" in str(failure(judge(server.url)))


# -- the cache ---------------------------------------------------------------------------------


def test_equal_questions_are_asked_once(tmp_path: Path) -> None:
    with serving(lambda h, body: h.say(body["messages"][0]["content"][-1])) as server:
        args = {"url": server.url, "prompt": "{prompt}: {completion}"}
        expected = [Reward(x / 10, {"judge_score": x}) for x in (1, 2, 1, 1)]
        reward = judge(**args)
        assert ask(reward, "1", "2", "1", "1") == expected
        assert len(server.requests) == 2
        assert ask(reward, "1", "2", "1", "1") == expected
        assert ask(judge(**args), "2") == expected[1:2]  # from the file
        assert len(server.requests) == 2
        other_task = Task("t", ({"role": "user", "content": "other"},), "yes")
        ask(reward, "1", task=other_task)
        ask(judge(**{**args, "prompt": "{prompt}; {completion}"}), "1")
        ask(judge(**args, model="n"), "1")
        ask(judge(**args, cache=False), "1")
        assert len(server.requests) == 6
    files = list((tmp_path / "minidistill" / "judge").iterdir())
    assert len(files) == 3
    assert not any("other" in file.read_text() for file in files)


def test_a_damaged_cache_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    with serving(say("3")) as server:
        ask(judge(server.url), "a", "b")
        [file] = (tmp_path / "minidistill" / "judge").iterdir()
        lines = file.read_bytes().splitlines(keepends=True)
        file.write_bytes(b'["x", "y"]\n\xff\n7\n' + lines[0] + lines[1][:20])
        assert [type(o) for o in ask(judge(server.url), "a", "b")] == [Reward, Reward]
        assert len(server.requests) == 3
        file.chmod(0o400)
        file.parent.chmod(0o500)
        ask(judge(server.url), "c")
        file.parent.chmod(0o700)


def test_failures_are_not_cached() -> None:
    answers = iter(["no idea", "5"])
    with serving(lambda handler, body: handler.say(next(answers))) as server:
        reward = judge(server.url)
        failure(reward)
        assert ask(reward, "anything") == [Reward(0.5, {"judge_score": 5})]


# -- before the run ----------------------------------------------------------------------------


def refused(reward: Any) -> str:
    """Why the judge is refused before the run."""
    with pytest.raises(UserError) as caught:
        reward.check_ready()
    assert caught.value.exit_code == EXIT_ENVIRONMENT
    assert KEY not in str(caught.value)
    return f"{caught.value.what} {caught.value.fix}"


@pytest.mark.parametrize("status", [200, 404, 405, 501, 503])
def test_a_server_that_answers_is_reached(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that has no list of models. It is asked once, and not for a completion."""
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with serving(say("1"), models=status) as server:
        judge(server.url, key_env="JUDGE_KEY").check_ready()
    assert (server.paths, server.requests) == (["/v1/models"], [])
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize("status", [401, 403])
def test_a_key_that_is_refused(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with serving(say("1"), models=status) as server:
        with_key = refused(judge(server.url, key_env="JUDGE_KEY"))
        assert f"it refuses the key (HTTP {status})" in with_key
        assert "correct key_env" in with_key
        assert "set key_env" in refused(judge(server.url))


def test_a_server_that_is_not_reached() -> None:
    with serving(say("1")) as server:
        pass
    assert f"the judge at {server.url} cannot be asked: " in refused(judge(server.url))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        assert "no answer within 0.2 s" in refused(judge(url, timeout=0.2))


def test_a_server_that_never_finishes_its_header() -> None:
    """Byte after byte comes in time."""
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor() as pool:

        def drip_header() -> None:
            connection, _ = server.accept()
            with connection, contextlib.suppress(OSError):
                connection.sendall(b"HTTP/1.1 200 OK\r\n")
                while True:
                    connection.sendall(b"x")
                    time.sleep(0.05)

        pool.submit(drip_header)
        began = time.monotonic()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/v1"
        assert "no answer within 0.3 s" in refused(judge(url, timeout=0.3))
        assert time.monotonic() - began < 2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ALL_PROXY", "ftp://me:hidden@proxy"),
        ("ALL_PROXY", "http://me:hidden@[::1"),
        ("NO_PROXY", "[::1"),
        ("SSL_CERT_FILE", "/no/such/file"),
    ],
)
def test_an_environment_that_forbids_requests(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    why = refused(judge("http://a/v1"))
    assert "no HTTP request can be made: " in why
    assert name in why
    assert "hidden" not in why


# -- many at once ------------------------------------------------------------------------------


def test_questions_are_asked_concurrently_up_to_a_limit() -> None:
    def slow(handler: Handler, body: dict[str, Any]) -> None:
        time.sleep(0.1)
        handler.say("1")

    with serving(slow) as server:
        outcomes = ask(judge(server.url, concurrency=4), *map(str, range(12)))
    assert {type(outcome) for outcome in outcomes} == {Reward}
    assert server.busiest == 4


def test_a_failure_is_one_completions_own() -> None:
    def some(handler: Handler, body: dict[str, Any]) -> None:
        handler.say("1" if "good" in body["messages"][0]["content"] else "?")

    with serving(some) as server:
        outcomes = ask(judge(server.url), "good 1", "bad", "good 2", "bad")
    assert [isinstance(o, Reward) for o in outcomes] == [True, False, True, False]


def test_the_rest_is_cancelled_if_the_caller_stops() -> None:
    def stop(index: int, outcome: Outcome) -> None:
        raise UserError("too many")

    def one_of_many(handler: Handler, body: dict[str, Any]) -> None:
        if "0" in body["messages"][0]["content"].split("A: ")[1].split("\n")[0]:
            handler.say("?")
        else:
            hang(handler, body)

    attempts: Sequence[Attempt] = [Attempt(TASK, str(i)) for i in range(4)]
    with serving(one_of_many) as server:
        began = time.monotonic()
        with pytest.raises(UserError, match="too many"):
            judge(server.url).score_all(attempts, stop)
        assert time.monotonic() - began < 2


def test_closing_ends_what_is_asked() -> None:
    with serving(hang) as server:
        reward = judge(server.url)
        reward.close()
        began = time.monotonic()
        with pytest.raises(CannotScoreError):
            ask(reward, "x")
        assert time.monotonic() - began < 2


# -- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("url", "ftp://a/b"), ("url", "http://me:hidden@a/v1"), ("url", 3), ("url", "local:8000"),
        ("url", "http://a:99999"), ("url", "http://a..b"), ("url", "http://[::1"),
        ("model", ""), ("prompt", "Rate this."), ("scale", [1, 0]), ("scale", [1]),
        ("scale", "01"), ("scale", [0, float("inf")]), ("scale", [0, True]), ("body", {"n": 2}),
        ("body", 3),
        ("timeout", 0), ("budget", float("nan")), ("timeout", "60"), ("concurrency", 0),
        ("cache", "yes"),
    ],
)  # fmt: skip
def test_an_argument_that_cannot_be_used(name: str, value: object) -> None:
    with pytest.raises(UserError) as caught:
        judge(**{"url": "http://a/v1", name: value})
    assert caught.value.where == f"args.reward.{name}"
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize(("value", "what"), [(None, "is not set"), ("a b", "holds no API key")])
def test_a_key_that_is_missing_or_none(
    value: str | None, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("JUDGE_KEY", value)
    with pytest.raises(UserError, match=what) as caught:
        judge("http://a/v1", key_env="JUDGE_KEY")
    assert "JUDGE_KEY" in caught.value.what
    assert caught.value.exit_code == EXIT_ENVIRONMENT
    assert value is None or value not in str(caught.value)
