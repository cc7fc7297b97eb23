"""Every environment that was made is closed, once, whatever ends the run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from minidistill import cli
from minidistill.driver import loop
from minidistill.errors import EXIT_FAILED, EXIT_OK, EXIT_USAGE
from minidistill.types import Task

TOML = """\
max_steps = 1
seq_len = 256
[trainer.loss]
adv_tau = 0.0
[orchestrator]
batch_size = 4
rollouts_per_example = 2
[orchestrator.sampling]
max_tokens = 4
[orchestrator.buffer]
skip_verification = true
[orchestrator.teacher_model]
context = "Answer in a word.\\n\\n"
"""
closed: list[str] = []


class Env:
    """Two tasks in each split. It is never scored."""

    has_rewards = False

    def __init__(self, name: str, words: int = 1, fault: str = "") -> None:
        self.name, self.fault = name, fault
        message = ({"role": "user", "content": "word " * words},)
        self.train = [Task(f"train/{i}", message) for i in range(2)]
        self.eval = [Task("eval/0", message)]

    def score(self, task: Task, completion: str) -> float:
        raise AssertionError("nothing is scored")

    def close(self) -> None:
        closed.append(self.name)
        if self.fault == "raise":
            raise ZeroDivisionError("it broke")
        if self.fault == "exit":
            sys.exit(9)


class Scored(Env):
    """One whose completions could be scored, in a process of its own."""

    has_rewards = True


def failing() -> Any:
    raise ZeroDivisionError("not made")


def no_environment() -> Any:
    class Other:
        def close(self) -> None:
            closed.append("other")

    return Other()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """A run with environments of this file: a function and its args for each."""
    monkeypatch.chdir(tmp_path)
    closed.clear()

    def run(*environments: tuple[str, str], more: str = "") -> int:
        tables = [
            f'[[orchestrator.env]]\nid = "test_closing:{function}"\nname = "e{i}"\nargs = {args}\n'
            for i, (function, args) in enumerate(environments)
        ]
        Path("run.toml").write_text(TOML + "".join(tables) + more)
        return cli.main(["run", "run.toml", "--output_dir", "out"])

    yield run
    closed.clear()


def test_at_the_end_of_a_run(run: Callable[..., int]) -> None:
    """Scored or not, trained on or held out."""
    more = '[[orchestrator.eval.env]]\nid = "test_closing:Env"\nargs = { name = "c" }\n'
    assert run(("Env", '{ name = "a" }'), ("Scored", '{ name = "b" }'), more=more) == EXIT_OK
    assert sorted(closed) == ["a", "b", "c"]


@pytest.mark.parametrize(
    "second",
    [("failing", "{}"), ("no_environment", "{}"), ("Env", '{ name = "b", words = 300 }')],
    ids=lambda value: value[0],
)
def test_if_the_run_is_refused_before_it_begins(
    run: Callable[..., int], second: tuple[str, str]
) -> None:
    assert run(("Env", '{ name = "a" }'), second) == EXIT_USAGE
    made = {"failing": [], "no_environment": ["other"], "Env": ["b"]}[second[0]]
    assert sorted(closed) == ["a", *made]
    assert not Path("out").exists()


def test_if_the_run_breaks(run: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*args: Any) -> Any:
        raise RuntimeError("it broke")

    monkeypatch.setattr(loop, "train_step", breaks)
    assert run(("Env", '{ name = "a" }')) == EXIT_FAILED
    assert closed == ["a"]


@pytest.mark.parametrize("fault", ["raise", "exit"])
def test_an_error_there_is_a_warning(
    run: Callable[..., int], fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first = ("Env", f'{{ name = "a", fault = "{fault}" }}')
    assert run(first, ("Env", '{ name = "b" }')) == EXIT_OK
    assert closed == ["a", "b"]
    assert "an environment could not be closed: " in capsys.readouterr().out
