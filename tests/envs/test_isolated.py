"""Scoring in a process of its own: what hangs, exits or crashes there fails for one completion."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.paths import ROOT

from minidistill.config.orchestrator import EnvConfig
from minidistill.envs.isolated import IsolatedEnvironment, close_environments
from minidistill.envs.outcomes import CannotScoreError, ScoringError
from minidistill.envs.registry import load_environments
from minidistill.envs.sokoban import SokobanEnv
from minidistill.errors import EXIT_ENVIRONMENT, UserError

FAULTY = "support.faulty_rewards"


def load(function: str = "Env", **settings: Any) -> Any:
    config = EnvConfig(id=f"{FAULTY}:{function}", **settings)
    return load_environments([config], "orchestrator.env")[config.name]


def gone(pid: int) -> bool:
    """Whether the process has ended, within 5 seconds."""
    for _ in range(500):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":  # ended, and not yet waited for
            return True
        time.sleep(0.01)
    return False


@pytest.fixture
def env() -> Iterator[IsolatedEnvironment]:
    environment = load(score_timeout=0.5)
    assert isinstance(environment, IsolatedEnvironment)
    yield environment
    environment.close()


def pid(env: IsolatedEnvironment) -> int:
    return int(env.score(env.train[0], "fine").metrics["pid"])


def test_one_process_is_kept_and_reused(env: IsolatedEnvironment) -> None:
    first = pid(env)
    assert first != os.getpid()
    assert pid(env) == first
    for fault, message in {
        "exit": "it called sys.exit(3)",
        "base": "BaseException: not an Exception",
        "interrupt": "KeyboardInterrupt: ",
    }.items():
        with pytest.raises(ScoringError) as caught:
            env.score(env.train[0], fault)
        assert (str(caught.value), caught.value.slow) == (message, False)
        assert pid(env) == first
    env.close()
    assert gone(first)


@pytest.mark.parametrize(
    ("fault", "message", "slow"),
    [
        ("exit now", "it ended its process: exit code 5; last output: last words", False),
        ("crash", "it ended its process: signal SIGSEGV", False),
        ("sleep", "it took longer than score_timeout = 0.5 s, and was stopped", True),
        ("hang", "it took longer than score_timeout = 0.5 s, and was stopped", True),
    ],
)
def test_a_process_that_ends_or_hangs_is_replaced(
    env: IsolatedEnvironment, fault: str, message: str, slow: bool
) -> None:
    first = pid(env)
    with pytest.raises(ScoringError) as caught:
        env.score(env.train[0], fault)
    assert (str(caught.value), caught.value.slow) == (message, slow)
    assert pid(env) != first
    assert gone(first)


def test_it_imports_what_the_driver_does(
    env: IsolatedEnvironment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a directory with a module that hides one of the standard library's."""
    (tmp_path / "socket.py").write_text("raise ImportError")
    (tmp_path / "minidistill").mkdir()
    (tmp_path / "minidistill" / "__init__.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "nowhere")
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    assert env.score(env.train[0], "fine").metrics["safe path"] == 0


def test_a_score_in_progress_ends_with_the_run() -> None:
    env = load(score_timeout=60)
    scored = pid(env)
    raised: list[BaseException] = []

    def score() -> None:
        try:
            env.score(env.train[0], "hang")
        except ScoringError as error:
            raised.append(error)

    thread = threading.Thread(target=score)
    thread.start()
    time.sleep(0.2)
    close_environments([env])
    thread.join(5)
    assert len(raised) == 1
    assert gone(scored)
    with pytest.raises(CannotScoreError, match="the run has ended"):
        env.score(env.train[0], "fine")


@pytest.mark.parametrize("fault", ["fine", "hang", "child"])
def test_nothing_is_left_if_the_driver_is_killed(fault: str, tmp_path: Path) -> None:
    code = (
        "import sys, threading; from test_isolated import load; env = load(score_timeout=600)\n"
        "print(int(env.score(env.train[0], '').metrics['pid']), flush=True)\n"
        f"env.score(env.train[0], {fault!r}); threading.Event().wait()"
    )
    paths = [ROOT, ROOT / "kernels", ROOT / "tests", ROOT / "tests" / "envs"]
    driver = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))},
    )
    assert driver.stdout is not None
    scored = int(driver.stdout.readline())
    time.sleep(0.3)
    members = subprocess.run(["pgrep", "-g", str(scored)], capture_output=True, text=True)
    group = [int(member) for member in members.stdout.split()]
    assert len(group) == (2 if fault == "child" else 1)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    driver.stdout.close()
    assert all(gone(member) for member in group)


def test_an_environment_that_does_not_load_there_ends_the_run() -> None:
    env = load("only_in_the_driver")
    env.start()
    with pytest.raises(UserError) as caught:
        env.check()
    assert "FileNotFoundError: a file that has gone" in caught.value.what
    assert "score_timeout" in caught.value.fix
    assert caught.value.exit_code == EXIT_ENVIRONMENT
    env.close()


def test_a_task_that_cannot_be_sent_is_refused_before_the_run() -> None:
    env = load("unpicklable")
    env.start()
    with pytest.raises(UserError, match="cannot be sent") as caught:
        env.check()
    assert "score_timeout" in caught.value.fix
    env.close()


def test_what_is_scored_in_the_process_of_the_run() -> None:
    assert not isinstance(load(score_timeout="off"), IsolatedEnvironment)
    args = {"num_train_examples": 1, "num_eval_examples": 1}
    configs = [EnvConfig(id="sokoban-env", args=args)]
    [sokoban] = load_environments(configs, "orchestrator.env").values()
    assert isinstance(sokoban, SokobanEnv)
