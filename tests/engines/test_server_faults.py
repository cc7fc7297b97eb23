"""Servers that answer wrongly, late or not at all: one error that names them, or equal results."""

from __future__ import annotations

import gzip
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.fake_vllm import Answer, Handler, engine_at, one_model, sample, serving, well
from support.fuzzed_answers import takes

from minidistill.engines.server import connection
from minidistill.engines.server import http as server_http
from minidistill.errors import EXIT_ENVIRONMENT, EXIT_HEALTH, UserError
from minidistill.system import http, subprocesses
from minidistill.types import Completion, Request, Role, SamplingParams

KEY = "sk-secret-0123"
REQUESTS = [Request((2, 3, 4), 1), Request((5, 6), 2)]
PARAMS = SamplingParams(3, 1.0)
EXPECTED = Completion((7, 7, 7), (-0.5,) * 3, "length")


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "FIRST_WAIT", 0.02)
    monkeypatch.setattr(connection.Server, "patience", 0.3)


def saying(text: str, status: int = 200, **headers: str) -> Answer:
    return lambda handler, body: handler.send(text.encode(), status, **headers)


def changed(**changes: Any) -> Answer:
    return lambda handler, body: handler.say(sample(body, **changes))


def sampled(url: str, folder: Path, **options: Any) -> list[Completion]:
    engine = engine_at(url, folder, **options)
    engine.wait_until_ready()
    return engine.generate(REQUESTS, PARAMS, Role.TEACHER)


def failure(answer: Answer, folder: Path, **options: Any) -> UserError:
    """The error of sampling, which names the server and shows no key."""
    with serving(answer) as fake:
        with pytest.raises(UserError) as caught:
            sampled(fake.url, folder, **options)
        assert fake.url in caught.value.what
    assert KEY not in str(caught.value)
    return caught.value


def test_what_vllm_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", f" {KEY}\n")
    with serving() as fake:
        engine = engine_at(fake.url + "/v1/", tmp_path)
        engine.wait_until_ready()
        assert engine.generate(REQUESTS, PARAMS, Role.TEACHER) == [EXPECTED] * 2
        assert engine.score([(2, 3)], [(4, 5)], Role.TEACHER) == [[-0.25, -0.25]]
    assert {fields["Authorization"] for fields in fake.headers} == {f"Bearer {KEY}"}
    assert KEY not in repr(engine.server.client)


@pytest.mark.parametrize("key", ["a b", "a\nb", "schlüssel", "a\x00b", "a\x7f"])
def test_a_key_that_cannot_be_sent(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "\0" in key:  # which an environment cannot hold
        monkeypatch.setattr(http.os, "environ", {"VLLM_API_KEY": key})
    else:
        monkeypatch.setenv("VLLM_API_KEY", key)
    with pytest.raises(UserError, match="VLLM_API_KEY holds no API key") as caught:
        engine_at("http://localhost:1", tmp_path)
    assert key not in str(caught.value)
    assert caught.value.exit_code == EXIT_ENVIRONMENT


# -- answers -----------------------------------------------------------------------------------

NAN = json.dumps(sample({"max_tokens": 3})).replace("-0.5", "NaN", 1)
WRONG: dict[str, tuple[Answer, str]] = {
    "no JSON": (saying("hello"), "it is no JSON: hello"),
    "HTML": (saying("<html>\n<b>502</b>", Content_Type="text/html"), "it is no JSON: <html> <b>"),
    "nothing": (saying(""), "it is no JSON: nothing"),
    "cut off": (lambda h, b: h.send(json.dumps(sample(b))[:-9].encode()), "it is no JSON"),
    "no text": (lambda h, b: h.send(bytes(range(128, 256))), "it is no JSON"),
    "nested too deeply": (saying("[" * 100_000), "it is no JSON"),
    "escape sequences": (saying("\x1b[2J\x07 error: forged"), "it is no JSON: [2J error: forged"),
    "a list": (saying("[]"), "it is a list, not an object"),
    "an error": (saying('{"error": {"message": "no GPU"}}'), "it is an error: no GPU (HTTP 200)"),
    "no choices": (saying("{}"), "it has no choices"),
    "two choices": (saying('{"choices": [{}, {}]}'), "it has 2 choices, and one was asked for"),
    "a choice that is none": (saying('{"choices": [3]}'), "it has 1 choices"),
    "no tokens": (changed(token_ids=None), "the choice has no token_ids"),
    "empty": (changed(token_ids=[]), "it has 0 tokens, and 1 to 3 were asked for"),
    "too many tokens": (changed(token_ids=[7] * 4), "it has 4 tokens, and 1 to 3"),
    "too few tokens": (changed(token_ids=[7]), "it was cut off after 1 of 3 tokens"),
    "an id too high": (changed(token_ids=[7, 100, 7]), "a token id is 100, not from 0 to 99"),
    "an id below 0": (changed(token_ids=[7, -1, 7]), "a token id is -1"),
    "an id that is true": (changed(token_ids=[7, True, 7]), "a token id is True"),
    "an id that is text": (changed(token_ids=["7"] * 3), "a token id is '7'"),
    "an id that is a float": (changed(token_ids=[7.0] * 3), "a token id is 7.0"),
    "no log-probs": (changed(logprobs=None), "the choice has no logprobs"),
    "log-probs of a wrong type": (changed(logprobs=[]), "the choice has a wrong logprobs: a list"),
    "too few log-probs": (
        changed(logprobs={"token_logprobs": [-1.0]}), "it has 3 tokens and 1 log-probs",
    ),
    "a log-prob that is null": (
        changed(logprobs={"token_logprobs": [-1, None, -1]}), "a log-prob is None",
    ),
    "a log-prob above 0": (
        changed(logprobs={"token_logprobs": [-1, 0.5, -1]}), "a log-prob is 0.5, above 0",
    ),
    "no reason": (changed(finish_reason=None), "finish_reason is None, not stop or length"),
    "an unknown reason": (changed(finish_reason="tool_calls"), "finish_reason is 'tool_calls'"),
    "no end": (changed(finish_reason="stop"), "stops without an end-of-sequence token"),
    "an end too early": (changed(token_ids=[7, 1, 7]), "goes on after its end-of-sequence token"),
    "another model's": (
        lambda h, b: h.say(sample(b) | {"model": "n"}), "it is of the model 'n', and m was asked",
    ),
    "compressed": (
        lambda h, b: h.send(gzip.compress(bytes(1 << 20)), Content_Encoding="gzip"),
        "it is compressed (gzip), unasked",
    ),
    "a redirect": (saying("", 307, Location="/else"), "it redirects (HTTP 307)"),
    "refused": (saying('{"error": {"message": "too long"}}', 400), "request: too long (HTTP 400)"),
    "refused by FastAPI": (saying('{"detail": "Not Found"}', 404), "request: Not Found (HTTP 404)"),
    "the key among control characters": (
        saying("sk-\x00secret\u202e-0123", 401), "refuses access: *** (HTTP 401)",
    ),
    "the key where the message is cut": (
        saying(" " * 2390 + KEY, 401), "refuses access: *** (HTTP 401)",
    ),
    "a URL that never ends": (
        saying(json.dumps({"error": "http://" + "?" * 900_000}), 400), "request: http://????",
    ),
    "no access": (saying(f'{{"error": "bad key {KEY}"}}', 401), "access: bad key *** (HTTP 401)"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_answer_stops_the_run_at_once(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    answer, message = WRONG[name]
    with serving(answer) as fake:
        with pytest.raises(UserError) as caught:
            sampled(fake.url, tmp_path, max_restarts=5)
        assert len(fake.bodies) <= len(REQUESTS), "none was repeated"
    error = caught.value
    assert error.exit_code == EXIT_ENVIRONMENT
    assert message in error.what
    assert fake.url in error.what
    assert len(error.what) < 600
    assert error.what.isprintable()
    assert KEY not in str(error)


@pytest.mark.parametrize(
    "number", ["NaN", "-Infinity", "1e999", "-1" + "0" * 400, "-9999.0", "-1e308"]
)
def test_log_probs_that_are_not_finite_are_a_broken_model(number: str, tmp_path: Path) -> None:
    error = failure(saying(NAN.replace("NaN", number)), tmp_path)
    assert error.exit_code == EXIT_HEALTH
    assert "a log-prob is " in error.what


def endless(handler: Handler, body: dict[str, Any]) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", str(1 << 40))
    handler.end_headers()
    while not handler.fake.hang_up.is_set():
        handler.wfile.write(b" " * (1 << 18))


def test_a_huge_answer_is_not_read(tmp_path: Path) -> None:
    assert "its answer is larger than 1 MiB" in failure(endless, tmp_path).what


SCORES: dict[str, tuple[Callable[[list[Any]], Any], int, str]] = {
    "none": (lambda rows: None, EXIT_ENVIRONMENT, "the choice has no prompt_logprobs"),
    "too few": (lambda rows: rows[1:], EXIT_ENVIRONMENT, "of 3 tokens, and 4 were sent"),
    "too many": (lambda rows: [*rows, rows[1]], EXIT_ENVIRONMENT, "of 5 tokens, and 4 were sent"),
    "a row of null": (lambda rows: [*rows[:3], None], EXIT_ENVIRONMENT, "of the token 5"),
    "another token": (
        lambda rows: [*rows[:3], {"9": {"logprob": -1}}], EXIT_ENVIRONMENT, "of the token 5",
    ),
    "a row of numbers": (lambda rows: [*rows[:3], {"5": -1}], EXIT_ENVIRONMENT, "of the token 5"),
    "null": (
        lambda rows: [*rows[:3], {"5": {"logprob": None}}], EXIT_ENVIRONMENT, "a log-prob is None",
    ),
    "infinite": (
        lambda rows: [*rows[:3], {"5": {"logprob": float("-inf")}}], EXIT_HEALTH, "is -inf",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SCORES)
def test_wrong_scores(name: str, tmp_path: Path) -> None:
    change, code, message = SCORES[name]

    def answer(handler: Handler, body: dict[str, Any]) -> None:
        rows = sample(body)["choices"][0]["prompt_logprobs"]
        handler.say(sample(body, prompt_logprobs=change(rows)))

    with serving(answer) as fake, pytest.raises(UserError) as caught:
        engine_at(fake.url, tmp_path).score([(2, 3)], [(4, 5)], Role.TEACHER)
    assert message in caught.value.what
    assert caught.value.exit_code == code


CARDS: dict[str, tuple[str, str]] = {
    "no data": ("{}", "it has no data"),
    "data of a wrong type": ('{"data": {}}', "it has a wrong data: an object"),
    "no card": ('{"data": []}', "serves no model"),
    "adapters alone": ('{"data": [{"id": "a", "parent": "m"}]}', "serves no model"),
    "a card that is none": ('{"data": [7]}', "data[0] is 7"),
    "no name": ('{"data": [{"max_model_len": 64}]}', "data[0] has no id"),
    "a name of a lone surrogate": ('{"data": [{"id": "\\ud800"}]}', "data[0].id is no name: ''"),
    "a name of control characters": ('{"data": [{"id": "\\u001b[2J"}]}', "no name: '[2J'"),
    "a long name": (json.dumps({"data": [{"id": "x" * 1001}]}), "data[0].id is no name: 'xxx"),
    "no letters": ('{"data": [{"id": ""}]}', "data[0].id is no name: ''"),
    "a length of text": (
        '{"data": [{"id": "m", "max_model_len": "64"}]}', "data[0].max_model_len is '64'",
    ),
    "too short": ('{"data": [{"id": "m", "max_model_len": 63}]}', "allows 63 tokens"),
    "HTML": ("<html>", "it is no JSON: <html>"),
}  # fmt: skip


@pytest.mark.parametrize("name", CARDS)
def test_wrong_model_cards(name: str, tmp_path: Path) -> None:
    text, message = CARDS[name]
    with serving(models=saying(text)) as fake, pytest.raises(UserError) as caught:
        engine_at(fake.url, tmp_path).wait_until_ready()
    assert message in caught.value.what
    assert fake.url in caught.value.what
    assert caught.value.exit_code == EXIT_ENVIRONMENT


# -- again -------------------------------------------------------------------------------------


def after(faults: list[Answer], then: Answer = well) -> Answer:
    left = list(faults)
    return lambda handler, body: (left.pop() if left else then)(handler, body)


BUSY = {
    **{str(status): saying("busy", status) for status in (429, 500, 502, 503, 504)},
    "retry after": saying("busy", 429, Retry_After="0"),
    "an aborted request": changed(finish_reason="abort"),
}


@pytest.mark.parametrize("name", BUSY)
def test_a_busy_server_is_asked_again(name: str, tmp_path: Path) -> None:
    with serving(after([BUSY[name]] * 3)) as fake:
        assert sampled(fake.url, tmp_path) == [EXPECTED] * 2
        assert len(fake.bodies) == 5


@pytest.mark.parametrize("name", BUSY)
def test_a_server_that_stays_busy_ends_the_run(name: str, tmp_path: Path) -> None:
    error = failure(BUSY[name], tmp_path, max_restarts=5)
    assert error.exit_code == EXIT_ENVIRONMENT
    # waits of 0.02, 0.04, 0.08 s; the next would pass the 0.3 s
    assert "answered nothing for 0.3 s (" in error.what
    assert "tries of a request): " in error.what
    assert ("it aborted a request" if "abort" in name else "busy (HTTP ") in error.what


def test_a_server_that_asks_for_more_time_than_it_gets(tmp_path: Path) -> None:
    began = time.monotonic()
    error = failure(saying("later", 503, Retry_After="3600"), tmp_path)
    assert "(1 tries of a request): later (HTTP 503)" in error.what
    assert time.monotonic() - began < 2


def test_a_server_that_loads_its_model_is_waited_for(tmp_path: Path) -> None:
    with serving(models=after([saying("loading", 503)] * 2, one_model)) as fake:
        assert sampled(fake.url, tmp_path) == [EXPECTED] * 2


def test_a_connection_that_breaks(tmp_path: Path) -> None:
    def cut(handler: Handler, body: dict[str, Any]) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        handler.wfile.write(b"{")
        handler.close_connection = True

    with serving(after([cut])) as fake:
        assert sampled(fake.url, tmp_path, max_restarts=1) == [EXPECTED] * 2
    error = failure(cut, tmp_path)
    assert "has gone away: peer closed connection" in error.what


# -- silence -----------------------------------------------------------------------------------


def hang(handler: Handler, body: dict[str, Any]) -> None:
    handler.fake.hang_up.wait(30)


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Any:
    """The log. What is said while waiting is said after 0.1 s."""
    monkeypatch.setattr(subprocesses, "NOTE_SECONDS", 0.1)
    monkeypatch.setattr(server_http, "SAID_SECONDS", 0.1)
    caplog.set_level(logging.INFO)
    return caplog


def test_a_server_that_accepts_and_never_answers(tmp_path: Path, notes: Any) -> None:
    error = failure(hang, tmp_path, silence=0.4)
    assert "was silent for 0.4 s (2 requests to answer), and was given up" in error.what
    assert (error.where, error.exit_code) == ("silence.step", EXIT_ENVIRONMENT)
    assert f"the server at {error.what.split()[3]} has been silent for 0.1 s" in notes.text
    assert "(2 requests to answer); it is given up at " in notes.text


def test_an_answer_that_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "BODY_SECONDS", 0.2)

    def stop(handler: Handler, body: dict[str, Any]) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        handler.wfile.write(b"{")
        hang(handler, body)

    assert "its answer stopped after 1 bytes" in failure(stop, tmp_path).what


def test_a_server_that_hangs_at_the_start(
    tmp_path: Path, notes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_http, "ANSWER_SECONDS", 0.3)
    with serving(models=hang) as fake, pytest.raises(UserError) as caught:
        engine_at(fake.url, tmp_path).wait_until_ready()
    assert "cannot be reached: no answer within 0.3 s" in caught.value.what
    assert f"waiting for {fake.url}/v1/models, for up to 0.3 s" in notes.messages


def test_a_slow_server_that_makes_progress_is_not_silent(tmp_path: Path) -> None:
    def slowly(handler: Handler, body: dict[str, Any]) -> None:
        data = json.dumps(sample(body)).encode()
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        for start in range(0, len(data), 20):
            handler.wfile.write(data[start : start + 20])
            time.sleep(0.06)

    began = time.monotonic()
    with serving(slowly) as fake:
        assert sampled(fake.url, tmp_path, silence=0.25) == [EXPECTED] * 2
    assert time.monotonic() - began > 0.25


def test_certificates_are_verified(tmp_path: Path) -> None:
    with serving(secure=True) as fake, pytest.raises(UserError) as caught:
        engine_at(fake.url, tmp_path).wait_until_ready()
    assert "CERTIFICATE_VERIFY_FAILED" in caught.value.what
    assert not fake.headers, "it has got no request, and no key"


@pytest.mark.parametrize("name", ["SSL_CERT_FILE", "SSLKEYLOGFILE"])
def test_an_environment_that_forbids_requests(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, str(tmp_path / "missing" / "file"))
    with pytest.raises(UserError, match="no HTTP request can be made") as caught:
        engine_at("http://localhost:1", tmp_path).wait_until_ready()
    assert caught.value.exit_code == EXIT_ENVIRONMENT
    assert name in caught.value.fix


def test_a_log_of_requests_shows_no_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    caplog.set_level(logging.DEBUG, "minidistill")
    with serving(after([saying(f"busy {KEY}", 503)])) as fake:
        sampled(fake.url, tmp_path)
    assert any("is busy (busy *** (HTTP 503))" in message for message in caplog.messages)
    assert KEY not in caplog.text


def test_answers_with_a_random_fault_are_taken_as_they_must_be_or_refused() -> None:
    taken = sum(takes(number) for number in range(3000))
    assert 300 < taken < 2000, "some faults do not matter, and most do"
