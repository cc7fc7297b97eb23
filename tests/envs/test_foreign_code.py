"""What an environment raises is its failure, whatever and wherever. Ctrl-C is the user's."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from support import raising
from support.raising import FAULTS, SAYS, TASKS
from support.runs import records

from minidistill import cli
from minidistill.config.orchestrator import EnvConfig
from minidistill.driver import loop
from minidistill.envs.isolated import close_environments
from minidistill.envs.outcomes import Attempt, ScoringError, score_attempts, score_one
from minidistill.envs.protocol import Environment, has_rewards, take_tasks
from minidistill.envs.registry import load_environments
from minidistill.errors import (
    EXIT_HEALTH,
    EXIT_INTERRUPTED,
    EXIT_OK,
    UserError,
)
from minidistill.system.foreign import (
    Interrupted,
    check_interrupted,
    ctrl_c,
    describe,
    foreign_code,
)
from minidistill.types import Task

TOML = """
max_steps = 2
seq_len = 128
ckpt.interval = 1
[trainer.loss]
adv_tau = 0.5
[orchestrator]
batch_size = 8
rollouts_per_example = 2
max_env_error_frac = 0.6
[orchestrator.sampling]
max_tokens = 8
[orchestrator.teacher_model]
context = "You are a world-class puzzle solver.\\n\\n"
[[orchestrator.env]]
id = "support.raising:load"
name = "raising"
"""


def load(place: str, fault: str) -> Environment:
    config = EnvConfig(id="support.raising:load", args={"place": place, "fault": fault})
    return load_environments([config], "orchestrator.env")[config.name]


def run(place: str, fault: str, *flags: str) -> int:
    Path("own.toml").write_text(f'{TOML}args = {{ place = "{place}", fault = "{fault}" }}\n')
    return cli.main(["run", "own.toml", "--output_dir", "out", *flags])


USES: dict[str, Any] = {
    "load": lambda env: None,
    "train": lambda env: env.train,
    "length": lambda env: len(env.train),
    "task": lambda env: list(env.train),
    "make_tasks": lambda env: take_tasks(env.train, [1, 0]),
    "has_rewards": has_rewards,
    "check_ready": lambda env: env.check_ready(),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("place", USES)
def test_a_failure_names_the_environment_and_what_it_raised(place: str, fault: str) -> None:
    with pytest.raises(UserError) as caught:
        USES[place](load(place, fault))
    assert "support.raising:load" in caught.value.what
    assert SAYS[fault] in caught.value.what
    assert caught.value.where == "orchestrator.env.0"


class Flag:
    def __bool__(self) -> bool:
        raise SystemExit(0)


class Names:
    """A split that raises as it is asked for a method that it may have."""

    def __len__(self) -> int:
        return len(TASKS)

    def __getattr__(self, name: str) -> Any:
        raise SystemExit(0)


@pytest.mark.parametrize(
    ("attribute", "value"),
    [("train", Names), ("has_rewards", Flag), ("scores_in_process", Flag)],
)
def test_an_attribute_that_exits_when_it_is_used(
    monkeypatch: pytest.MonkeyPatch, attribute: str, value: Any
) -> None:
    monkeypatch.setattr(raising.Env, attribute, value())

    def use() -> None:
        env = load("", "exit")
        assert len(env.train) == 0 or has_rewards(env)

    with pytest.raises(UserError, match=r"support\.raising:load.*it called sys\.exit\(0\)"):
        use()


MESSAGE = {"role": "user", "content": "Hello"}
NO_TASKS: dict[str, tuple[Any, str]] = {
    "a dict": ({"prompt": "Hello"}, "number 0 is no Task, but dict"),
    "nothing": (None, "number 0 is no Task, but NoneType"),
    "bytes as an id": (Task(b"x", (MESSAGE,)), "has an id that is no text, but bytes"),  # type: ignore[arg-type]
    "a text as messages": (Task("x", "Hello"), "the messages of x are no tuple, but str"),  # type: ignore[arg-type]
    "a context as a list": (
        Task("x", ({"role": "user", "content": "Hello"},), context=["y"]),  # type: ignore[arg-type]
        "the context of x is no text, but list",
    ),
    "no role": (Task("x", ({"content": "Hello"},)), "a message of x has no role"),
    "a text as a message": (Task("x", ("Hello",)), "a message of x has no role"),  # type: ignore[arg-type]
    "a number as content": (
        Task("x", ({"role": "user", "content": 5},)),
        "has a content that is no text",
    ),
    "a lone surrogate": (
        Task("x", ({"role": "user", "content": "a\udc80"},)),
        "cannot be written as JSON",
    ),
    "an object": (Task("x", ({**MESSAGE, "at": object()},)), "cannot be written as JSON"),
    "NaN": (Task("x", ({**MESSAGE, "at": float("nan")},)), "cannot be written as JSON"),
}


@pytest.mark.parametrize("kind", NO_TASKS)
def test_what_is_no_task_is_named_before_the_first_step(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the tasks are a list, are read one at a time, or are made together."""
    task, words = NO_TASKS[kind]
    monkeypatch.setattr(raising, "TASKS", [task])
    monkeypatch.setitem(raising.FAULTS, "none", lambda: None)
    for place, use in (("", USES["task"]), ("make_tasks", lambda env: take_tasks(env.train, [0]))):
        with pytest.raises(UserError, match=r"support\.raising:load") as caught:
            use(load(place, "none"))
        assert words in caught.value.what
    monkeypatch.setattr(raising.Env, "train", [task])
    with pytest.raises(UserError) as caught:
        load("", "exit").train  # noqa: B018
    assert words in caught.value.what


def test_too_few_tasks_made_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raising.MadeTogether, "make_tasks", lambda self, indices, advance: [])
    with pytest.raises(UserError, match="it made 0 of 2 tasks"):
        take_tasks(load("make_tasks", "none").train, [1, 0])


@pytest.mark.parametrize("fault", FAULTS)
def test_a_module_that_raises_as_it_is_imported(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = f"raising_{fault}"
    Path(f"{name}.py").write_text(f"from support.raising import FAULTS\nFAULTS['{fault}']()\n")
    with pytest.raises(UserError) as caught:
        load_environments([EnvConfig(id=f"{name}:load")], "orchestrator.env")
    assert f"cannot load the environment '{name}:load'" in caught.value.what
    assert SAYS[fault] in caught.value.what


@pytest.mark.parametrize("fault", FAULTS)
def test_a_score_that_raises_is_a_failure(fault: str) -> None:
    outcome = score_one(load("score", fault), TASKS[0], "")
    assert isinstance(outcome, ScoringError)
    assert SAYS[fault] in str(outcome)


def test_what_ends_badly_at_the_end_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    close_environments([load("close", fault) for fault in FAULTS])
    assert [SAYS[fault] in text for fault, text in zip(FAULTS, caplog.messages, strict=True)]
    assert len(caplog.messages) == len(FAULTS)


def test_reports_of_score_all_are_read_as_scores() -> None:
    class Env:
        train = eval = TASKS

        def score_all(self, attempts: Any, report: Any) -> None:
            for index, value in enumerate((1, float("nan"), {"reward": 2, "m": float("inf")})):
                report(index, value)

    outcomes: dict[int, Any] = {}
    score_attempts(Env(), [Attempt(TASKS[0], "")] * 3, outcomes.__setitem__)
    assert outcomes[0].value == 1.0
    assert "the reward is nan" in str(outcomes[1])
    assert "inf, which is not finite" in str(outcomes[2])


# -- Ctrl-C ------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["ctrl-c", "swallowed ctrl-c"])
@pytest.mark.parametrize("place", [*USES, "score", "close"])
def test_ctrl_c_is_the_users_in_any_place(place: str, fault: str) -> None:
    def score(env: Environment) -> None:
        score_one(env, TASKS[0], "")

    def close(env: Environment) -> None:
        close_environments([env])

    use = {**USES, "score": score, "close": close}[place]
    with ctrl_c(), pytest.raises(Interrupted):
        use(load(place, fault))


def test_ctrl_c_before_the_run_and_an_interrupt_that_nobody_pressed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("task", "swallowed ctrl-c") == EXIT_INTERRUPTED
    assert capsys.readouterr().err == "interrupted\n"
    assert run("task", "interrupt") not in (EXIT_OK, EXIT_INTERRUPTED)
    assert "failed in its task 0 of train: KeyboardInterrupt" in capsys.readouterr().err
    assert not Path("out").exists()


def test_ctrl_c_twice_in_scores_ends_the_run_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first press lets the step end; the next score presses again."""
    monkeypatch.chdir(tmp_path)
    assert run("score", "ctrl-c") == EXIT_INTERRUPTED
    assert not Path("out/metrics.jsonl").exists()
    assert Path("out/config.resolved.json").exists()  # it had begun


def test_scores_that_raise_anything_are_counted_and_the_run_ends_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("each", "exit") == EXIT_OK
    steps = [record for record in records(Path("out")) if "env/errors" in record]
    assert [record["env/errors"] for record in steps] == [4, 4]
    kept = [
        json.loads(line)
        for file in sorted(Path("out/rollouts").glob("*.jsonl"))
        for line in file.read_text().splitlines()
    ]
    assert [rollout["reward"] for rollout in kept] == [0.5] * 8


def test_a_score_all_that_raises_fails_for_what_it_has_not_reported() -> None:
    for fault in FAULTS:
        outcomes: dict[int, Any] = {}
        attempts = [Attempt(TASKS[0], "")] * 2
        score_attempts(load("score_all", fault), attempts, outcomes.__setitem__)
        assert [SAYS[fault] in str(outcomes[index]) for index in range(2)] == [True, True]


# -- the helper --------------------------------------------------------------------------------


def test_what_is_ours_passes_and_a_message_that_cannot_be_read_is_none() -> None:
    class Silent(Exception):
        def __str__(self) -> str:
            raise SystemExit

    with pytest.raises(UserError, match="ours"), foreign_code(lambda error: ValueError()):
        raise UserError("ours")
    assert describe(Silent()) == "Silent, whose message cannot be read"
    assert len(describe(ValueError("x" * 10**6))) == 1000


def test_too_many_failures_are_a_health_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("score", "panic") == EXIT_HEALTH
    assert "failed on 8 of 8 rollouts, first: task train/" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_a_package_swallows_is_the_users(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As one that imports another in a `try`, and later misses it."""

    def swallow(arguments: list[str]) -> int:
        with contextlib.suppress(BaseException):
            os.kill(os.getpid(), number)
        raise AttributeError("module 'numpy' has no attribute 'ndarray'")

    monkeypatch.setattr(cli, "_dispatch", swallow)
    assert cli.main(["run"]) == EXIT_INTERRUPTED
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("place", ["claim_path", "open_session"])
def test_a_run_does_not_begin_after_a_signal_that_was_swallowed(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    original = getattr(loop, place)

    def swallow(*arguments: Any) -> Any:
        with contextlib.suppress(BaseException):
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    monkeypatch.setattr(loop, place, swallow)
    assert run("none", "exit") == EXIT_INTERRUPTED
    assert not Path("out/metrics.jsonl").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_where_nothing_can_be_raised_is_kept_without_a_traceback(
    number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    class Collected:
        def __del__(self) -> None:
            signal.raise_signal(number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "unraisablehook", sys.__unraisablehook__)  # pytest's prints nothing
        with ctrl_c():
            Collected()  # collected at once
            assert capsys.readouterr().err == ""
            with pytest.raises(Interrupted):
                check_interrupted()
