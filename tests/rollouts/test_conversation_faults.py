"""Conversations whose engine or process dies in the middle: nothing is lost or doubled."""

from __future__ import annotations

import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support import fake_vllm, processes
from support.dying_server import LENGTH
from support.fake_vllm import engine_at
from support.multi_turn import Echo
from support.runs import board, records, run, start
from support.servers import free_port
from support.tokenizers import byte_level

from minidistill.engines.server import connection
from minidistill.envs.multi_turn import MultiTurnEnvironment
from minidistill.errors import EXIT_ENVIRONMENT, EXIT_OK, UserError
from minidistill.rollouts.conversations import Played, Player
from minidistill.tasks.prompts import PromptBuilder
from minidistill.types import Role, SamplingParams

CONVERSATIONS = 6


def accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def server(*answers: int) -> Iterator[str]:
    """A server that is killed after so many answers, and started again for the next number."""
    port, left, lock = free_port(), list(answers), threading.Lock()

    def begin() -> processes.Started:
        command = [sys.executable, "-m", "support.dying_server", str(port), str(left.pop(0))]
        return processes.start(command, MARK="")

    running = [begin()]

    def keep() -> None:
        while left:
            running[-1].wait()
            with lock:
                if left:
                    running.append(begin())

    keeper = threading.Thread(target=keep)
    keeper.start()
    try:
        processes.wait_for(lambda: accepts(port))
        yield f"http://127.0.0.1:{port}"
    finally:
        with lock:
            left.clear()
            running[-1].kill()
        keeper.join(30)
        running[-1].wait()


def play(url: str, folder: Path, restarts: int) -> tuple[list[Played], int]:
    """Six conversations of three turns, and how often the engine waited for the server."""
    environment = MultiTurnEnvironment(Echo({}, CONVERSATIONS, turns=3), "echo", 30, 60)
    builder = PromptBuilder(byte_level(), "Be brief. ", "user")
    engine = engine_at(url, folder, max_restarts=restarts)
    player = Player(
        builder,
        {"echo": environment},
        max_length=500,
        params=SamplingParams(max_tokens=8),
        seed=lambda row, turn: 10 * row + turn,
        role=Role.TEACHER,  # whose weights the server has
    )
    jobs = [(builder.build("echo", task), 0) for task in environment.train]
    try:
        engine.wait_until_ready()
        return player.play(engine, jobs, lambda count: None), engine.server.restarts
    finally:
        engine.close()
        environment.close()


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_vllm, "VOCABULARY", 1000)
    monkeypatch.setattr(fake_vllm, "LENGTH", LENGTH)
    monkeypatch.setattr(connection, "FIRST_WAIT", 0.02)
    monkeypatch.setattr(connection.Server, "patience", 20.0)


@pytest.mark.usefixtures("patient")
def test_an_engine_that_is_killed_in_mid_episode_is_waited_for(tmp_path: Path) -> None:
    """In the second turn of some conversations, and later in the third."""
    with server(0) as url:
        expected, none = play(url, tmp_path / "whole", 0)
    with server(CONVERSATIONS + 2, 8, 0) as url:
        played, restarts = play(url, tmp_path / "killed", 2)
    assert (none, restarts) == (0, 2)
    assert played == expected
    assert [p.turns for p in played] == [3] * CONVERSATIONS
    assert all(p.reward is not None and not p.error for p in played)


@pytest.mark.usefixtures("patient")
def test_an_engine_that_stays_away_ends_the_run(tmp_path: Path) -> None:
    with server(CONVERSATIONS + 2, 0) as url, pytest.raises(UserError) as caught:
        play(url, tmp_path, 0)
    assert "has gone away" in caught.value.what
    assert "--resume" in caught.value.fix
    assert caught.value.exit_code == EXIT_ENVIRONMENT


def test_a_run_that_is_killed_in_turn_2_is_continued_as_if_it_had_not_been(tmp_path: Path) -> None:
    """By SIGKILL, in the step after the first checkpoint."""
    faults = ", ".join(f'{i} = "kill"' for i in range(8))
    args = f"{{faults = {{{faults}}}, count = 8, turns = 3}}"
    flags = (
        "--orchestrator.env", f'[{{id = "support.multi_turn:load", name = "echo", args = {args}}}]',
        "--max_steps", "3", "--ckpt.interval", "1", "--seq_len", "320",
        "--no-orchestrator.teacher_model.eval_baseline", "--orchestrator.eval.num_examples", "4",
        "--orchestrator.eval.interval", "0",
    )  # fmt: skip
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run(whole, *flags) == EXIT_OK
    process = start(killed, *flags, KILL=str(killed / "checkpoints" / "step_000001"))
    assert process.wait(120) == -signal.SIGKILL
    assert [r["step"] for r in records(killed) if "teacher_kl" in r] == [1]
    assert run(killed, *flags, "--resume") == EXIT_OK
    assert records(killed) == records(whole)
    assert board(killed) == board(whole)
    for name in sorted(p.name for p in (whole / "rollouts").iterdir()):
        assert (killed / "rollouts" / name).read_bytes() == (whole / "rollouts" / name).read_bytes()
