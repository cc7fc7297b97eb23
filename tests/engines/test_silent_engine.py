"""vLLM's process, stopped for real at each phase: the run ends, and says where its output is."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.paths import TESTS

from minidistill.config.schema import SilenceConfig
from minidistill.engines.vllm import client
from minidistill.engines.vllm.client import EngineProcess, RestartingProcess
from minidistill.errors import EXIT_ENVIRONMENT, UserError
from minidistill.system import subprocesses

LIMITS = SilenceConfig(load=0.4, step=0.4)


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., RestartingProcess]]:
    """Starts a process that stops at a point."""
    monkeypatch.setattr(client, "MODULE", "support.stopped_engine")
    monkeypatch.syspath_prepend(str(TESTS))
    started: list[RestartingProcess] = []

    def start(stop: str, limits: SilenceConfig = LIMITS) -> RestartingProcess:
        def process() -> EngineProcess:
            return EngineProcess({}, {"STOP": stop}, limits)

        started.append(RestartingProcess(process, lambda: None, max_restarts=5))
        return started[-1]

    yield start
    for restarting in started:
        restarting.close()


def assert_given_up(error: UserError, restarting: RestartingProcess, phase: str, key: str) -> None:
    assert error.exit_code == EXIT_ENVIRONMENT
    assert error.where == key
    assert f"was silent for 0.4 s ({phase}), and was given up, stopped by a signal" in error.what
    assert "last output: stopping at" in error.what
    assert "logs/run.log" in error.fix
    assert restarting.restarts == 0, "it is not restarted"
    assert restarting.process.popen.wait(5) == -signal.SIGKILL


def test_a_start_that_stops(start: Any, caplog: pytest.LogCaptureFixture) -> None:
    restarting = start("start")
    caplog.set_level(logging.DEBUG, "minidistill")
    with pytest.raises(UserError) as caught:
        restarting.call(lambda: None)
    assert_given_up(caught.value, restarting, "starting", "silence.load")
    assert "  | stopping at start" in caplog.text


def test_a_call_that_stops(
    start: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(subprocesses, "NOTE_SECONDS", 0.1)
    caplog.set_level(logging.INFO, "minidistill")
    restarting = start("generate", SilenceConfig(load=30, step=0.4))
    with pytest.raises(UserError) as caught:
        restarting.call(lambda: restarting.process.call("generate"))
    assert_given_up(caught.value, restarting, "running `generate`", "silence.step")
    note = next(m for m in caplog.messages if "running `generate`" in m)
    assert "has been silent for 0.1 s" in note
    assert "it is given up at " in note


def test_a_command_that_stops_while_another_thread_samples(start: Any) -> None:
    """Both end, and neither restarts it."""
    restarting = start("load_adapter", SilenceConfig(load=30, step=0.4))
    restarting.call(lambda: None)
    errors: list[UserError] = []

    def run(ask: Callable[[], Any]) -> None:
        with pytest.raises(UserError) as caught:
            restarting.call(ask)
        errors.append(caught.value)

    commands = [
        lambda: restarting.process.command("load_adapter"),
        lambda: restarting.process.call("generate"),
    ]
    threads = [threading.Thread(target=run, args=(command,)) for command in commands]
    for thread in threads:
        thread.start()
        time.sleep(0.1)
    for thread in threads:
        thread.join(10)
    assert len(errors) == 2
    assert {error.where for error in errors} == {"silence.step"}
    assert_given_up(errors[0], restarting, "running `load_adapter`", "silence.step")


def test_a_message_that_a_stopped_process_does_not_read(start: Any) -> None:
    restarting = start("never", SilenceConfig(load=30, step=0.4))
    restarting.call(lambda: None)
    os.kill(restarting.process.popen.pid, signal.SIGSTOP)
    with pytest.raises(UserError, match=r"was silent for 0\.4 s"):
        restarting.call(lambda: restarting.process.call("generate", prompts=bytes(1 << 24)))


def test_a_slow_call_that_shows_signs_is_not_silent(start: Any) -> None:
    restarting = start("never", SilenceConfig(load=30, step=0.4))
    restarting.call(lambda: None)
    began = time.monotonic()
    assert restarting.call(lambda: restarting.process.call("slow")) == "slow"
    assert time.monotonic() - began > 0.7


def test_a_driver_that_was_suspended_does_not_count_that_time() -> None:
    silence = subprocesses.Silence("it", 100.0, "silence.step")
    assert not silence.lasts(99.0, "waiting")
    assert silence.lasts(1.0, "waiting")
    silence.broken()
    assert not silence.lasts(99.0, "waiting")


def test_only_the_end_of_a_long_output_is_kept(tmp_path: Path, start: Any) -> None:
    restarting = start("never", SilenceConfig(load=30, step=0.4))
    restarting.call(lambda: None)
    process = restarting.process
    os.write(process._output.fileno(), b"x" * (1 << 20) + b"\n\x1b[2Jbye\n")
    assert process.last_words() == "; last output: [2Jbye"
