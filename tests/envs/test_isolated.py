"""Scoring in a process of its own: what hangs, exits or crashes there fails for one completion."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.paths import ROOT

from minidistill.config.orchestrator import EnvConfig
from minidistill.envs.isolated import IsolatedEnvironment, ScoringProcess, close_environments
from minidistill.envs.outcomes import (
    Attempt,
    CannotScoreError,
    Outcome,
    ScoringError,
    score_attempts,
)
from minidistill.envs.registry import load_environments
from minidistill.envs.sokoban import SokobanEnv
from minidistill.errors import EXIT_ENVIRONMENT, UserError
from minidistill.system import subprocesses
from minidistill.tasks.rewards import score
from minidistill.types import Completion, Prompt, Reward, Rollout

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
    ("fault", "message"),
    [
        ("exit now", "it ended its process: exit code 5; last output: last words"),
        ("crash", "it ended its process: signal SIGSEGV"),
        ("sleep", "it took longer than score_timeout = 0.5 s, and was stopped"),
        ("hang", "it took longer than score_timeout = 0.5 s, and was stopped"),
    ],
)
def test_a_process_that_ends_or_hangs_is_replaced(
    env: IsolatedEnvironment, fault: str, message: str
) -> None:
    first = pid(env)
    with pytest.raises(ScoringError) as caught:
        env.score(env.train[0], fault)
    assert (str(caught.value), caught.value.slow) == (message, True)
    assert pid(env) != first
    assert gone(first)


def test_a_process_that_is_stopped_is_replaced(env: IsolatedEnvironment) -> None:
    first = pid(env)
    os.kill(first, signal.SIGSTOP)
    with pytest.raises(ScoringError, match="and was stopped") as caught:
        env.score(env.train[0], "fine")
    assert caught.value.slow
    assert pid(env) != first
    assert gone(first)


@pytest.mark.parametrize("fault", ["exit now", "sleep"])
def test_scoring_stops_as_soon_as_too_many_took_long(env: IsolatedEnvironment, fault: str) -> None:
    prompt = Prompt("e", env.train[0], "", "", (), ())
    completion = Completion((1,), (0.0,), "eos")
    texts = ["fine", fault, *["fine"] * 30]
    rollouts = [Rollout(prompt, i, completion, text) for i, text in enumerate(texts)]
    scored: list[int] = []

    def check(errors: Sequence[str]) -> None:
        if errors:
            raise UserError(errors[0])

    with pytest.raises(UserError, match=r"train/0 of e: it (ended its process|took longer)"):
        score({"e": env}, rollouts, scored.append, check)
    assert len(scored) == 2


# -- many at once ------------------------------------------------------------------------------


@pytest.fixture
def together() -> Iterator[IsolatedEnvironment]:
    environment = load("Together", score_timeout=0.5)
    assert isinstance(environment, IsolatedEnvironment)
    yield environment
    environment.close()


def score_together(env: Any, *completions: str) -> list[Outcome]:
    """The outcomes by number. Each is reported once."""
    outcomes: dict[int, Outcome] = {}

    def report(index: int, outcome: Outcome) -> None:
        assert index not in outcomes
        outcomes[index] = outcome

    attempts = [Attempt(env.train[0], text, len(text)) for text in completions]
    score_attempts(env, attempts, report)
    return [outcomes[index] for index in range(len(completions))]


def test_completions_are_scored_together_in_the_process(together: IsolatedEnvironment) -> None:
    """In one call, which knows the tokens, and reports from the last to the first."""
    outcomes = score_together(together, "a", "bb", "ccc")
    assert [outcome.value for outcome in outcomes if isinstance(outcome, Reward)] == [1, 2, 3]
    [first, *others] = [o.metrics for o in outcomes if isinstance(o, Reward)]
    assert first["pid"] != os.getpid()
    assert first["attempts"] == 3
    assert others == [first, first]


@pytest.mark.parametrize(
    ("fault", "message", "slow"),
    [
        ("raise", "ZeroDivisionError: together", False),
        ("forget", "score_all reported no score for it", False),
        ("exit", "it called sys.exit(3)", False),
        ("exit now", "it ended its process: exit code 5; last output: last words", True),
        ("sleep", "it took longer than score_timeout = 0.5 s, and was stopped", True),
    ],
)
def test_what_is_not_reported_has_failed(
    together: IsolatedEnvironment, fault: str, message: str, slow: bool
) -> None:
    first, second, third = score_together(together, "a", fault, "ccc")  # in the order 3, 2, 1
    assert isinstance(third, Reward)
    for failed in (first, second):
        assert isinstance(failed, ScoringError)
        assert (str(failed), failed.slow) == (message, slow)
    assert isinstance(score_together(together, "a")[0], Reward), "it goes on"


def test_a_value_that_is_no_reward_fails_alone(together: IsolatedEnvironment) -> None:
    for env in (together, together.environment):
        one, two, three = score_together(env, "number", "text", "nan")
        assert one == Reward(0.5)
        assert str(two).startswith("it returned 'high': return a number")
        assert str(three) == "the reward is nan, which is not finite"


@pytest.mark.parametrize("fault", ["twice", "unknown"])
def test_a_report_of_no_attempt_ends_the_run(fault: str) -> None:
    with pytest.raises(CannotScoreError, match="which does not exist or was reported before"):
        score_together(load("Together", score_timeout="off"), "a", fault)


def test_an_exception_in_the_process_of_the_run_is_counted() -> None:
    """As in a process of its own. What the caller raises to stop is not taken for one."""
    env = load("Together", score_timeout="off")
    first, second, third = score_together(env, "a", "raise", "ccc")
    assert str(first) == str(second) == "ZeroDivisionError: together"
    assert isinstance(third, Reward)

    def stop(index: int, outcome: Outcome) -> None:
        raise UserError("enough")

    for environment in (env, load("Together", score_timeout=1.0)):
        with pytest.raises(UserError, match="enough"):
            score_attempts(environment, [Attempt(env.train[0], "a")] * 2, stop)
        close_environments([environment])


# -- its process -------------------------------------------------------------------------------


def descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def test_a_process_that_cannot_be_started_leaves_no_descriptor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = descriptors()
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    for _ in range(3):
        with pytest.raises(FileNotFoundError):
            ScoringProcess("a", {})
    assert descriptors() == before


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


def test_what_it_prints_does_not_fill_the_disk(
    env: IsolatedEnvironment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocesses, "LONGEST_OUTPUT", 250_000)
    scored = pid(env)
    for _ in range(8):
        env.score(env.train[0], "print")
        assert os.stat(f"/proc/{scored}/fd/1").st_size < 400_000
    with pytest.raises(ScoringError, match="exit code 5; last output: last words"):
        env.score(env.train[0], "exit now")


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


@pytest.mark.parametrize("function", ["unpicklable", "exits_when_pickled"])
def test_a_task_that_cannot_be_sent_is_refused_before_the_run(function: str) -> None:
    env = load(function)
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
