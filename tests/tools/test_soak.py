"""A sample of the soak: hostile inputs, kills that are resumed, starts that are stopped."""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import forked

from minidistill.errors import UserError
from tools.soak import inputs, kills, starts
from tools.soak.commands import MARK, Commands
from tools.soak.dying import Killer
from tools.soak.log import Log, one_line
from tools.soak.targets import Target, targets

SEED = 14
EACH = 35  # inputs for each target
TWICE = 21  # a seed for which one run is killed twice
SHORT = (
    "--max_steps", "2", "--ckpt.interval", "1", "--ckpt.keep", "2", "--orchestrator.batch_size",
    "4", "--no-orchestrator.eval", "--no-orchestrator.teacher_model.eval_baseline",
    "--orchestrator.env.0.args.num_train_examples", "8",
    "--orchestrator.env.0.args.num_eval_examples", "8",
)  # fmt: skip


class ForkedCommands(Commands):
    """Forks its processes from one that has imported torch."""

    def start(self, module: str, *arguments: str, output: Path, **environment: str) -> Any:
        forked.start_server()
        variables = {**self.environment, **environment}
        process = forked.CONTEXT.Process(
            target=_be, args=(module, arguments, variables, str(output), str(self.folder))
        )
        output.unlink(missing_ok=True)
        process.start()
        while not output.exists():  # until it is what it is to be, and takes signals as that does
            time.sleep(0.005)
        return _Started(process)


class _Started:
    """The part of `subprocess.Popen` that the soak uses."""

    def __init__(self, process: Any) -> None:
        self._process = process

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("a forked process", timeout or 0)
        code: int = self._process.exitcode
        return code

    def kill(self) -> None:
        self._process.kill()

    def send_signal(self, number: int) -> None:
        os.kill(self._process.pid, number)


def _be(
    module: str, arguments: tuple[str, ...], variables: dict[str, str], output: str, folder: str
) -> None:
    """Be `python -m module`."""
    os.setsid()
    os.environ.clear()
    os.environ.update(variables)
    tempfile.tempdir = None  # which what was preloaded may have looked up
    os.chdir(folder)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.path[:0] = variables["PYTHONPATH"].split(os.pathsep)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


@pytest.fixture
def log(tmp_path: Path) -> Log:
    return Log(tmp_path)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of a second, forked."""
    for module in (kills, starts):
        monkeypatch.setattr(module, "Commands", ForkedCommands)
        monkeypatch.setattr(module, "SMALL", SHORT)


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    return {target.name: target for target in targets(tmp_path_factory.mktemp("inputs"))}


@pytest.mark.parametrize(
    "name",
    [
        "configuration", "overrides", "prompts", "chat template", "model", "records", "checkpoint",
        "adapter", "server",
    ],
)  # fmt: skip
def test_hostile_inputs_end_in_success_or_an_error(name: str, named: dict[str, Target]) -> None:
    target = named[name]
    target.prepare()
    failures = [inputs.attempt(target, number, SEED) for number in range(EACH)]
    assert [f for f in failures if f is not None] == []


def test_killed_runs_are_resumed_to_the_same_end(log: Log, short: None) -> None:
    assert kills.soak(log, TWICE, 2, None) == 2
    assert log.findings == []


def test_stopped_runs_leave_nothing(log: Log, short: None) -> None:
    commands = ForkedCommands(log.work / "starts")
    for index, (kind, number, seconds) in enumerate(
        [
            ("plain", signal.SIGTERM, 0.7),
            ("two ranks", signal.SIGINT, 1.5),
            ("scored elsewhere", signal.SIGKILL, 1.0),
        ]
    ):
        starts.start_and_stop(log, commands, index, kind, number, seconds)
    assert log.findings == []


# -- the soak itself finds what there is ---------------------------------------------------------


def fails(kind: str) -> Target:
    def run(value: object) -> None:
        if kind == "raises":
            raise KeyError("absent")
        if kind == "hangs":
            while True:
                pass
        if kind == "long":
            raise UserError("x" * 300)
        if kind == "fine":
            raise UserError("refused")

    return Target(kind, lambda random: random.random(), run)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("raises", "KeyError at tools/test_soak.py:run"),
        ("hangs", "too slow at tools/test_soak.py:run"),
        ("long", "an error of 300 characters"),
    ],
)
def test_what_an_input_does_is_a_finding(
    kind: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "SECONDS", 0.1)
    monkeypatch.setattr(inputs, "MESSAGE", 200)
    failure = inputs.attempt(fails(kind), 3, SEED)
    assert failure is not None
    assert (failure.target, failure.number, failure.kind) == (kind, 3, expected)
    assert inputs.attempt(fails("fine"), 3, SEED) is None


def test_an_interpreter_that_ends_is_a_finding(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(value: int) -> None:
        if value == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    numbers: Iterator[int] = iter(range(100))
    target = Target("crashing", lambda random: next(numbers), crash)
    monkeypatch.setattr(inputs, "targets", lambda folder: [target])
    assert inputs.soak(log, SEED, 5, None) == 5
    assert len(log.findings) == 1
    assert "ends the interpreter (-9)" in log.findings[0]


def test_inputs_depend_on_the_seed_and_the_number_alone(named: dict[str, Target]) -> None:
    for target in (named["configuration"], named["overrides"], named["server"]):
        assert inputs.make(target, 5, 1) == inputs.make(target, 5, 1)
        assert inputs.make(target, 5, 1) != inputs.make(target, 5, 2)


def test_the_killer_counts_what_happens_in_its_folder(tmp_path: Path) -> None:
    killer = Killer(str(tmp_path / "run"), 0)
    killer("open", (str(tmp_path / "run" / "a"), "w", 0))
    killer("os.mkdir", (str(tmp_path / "run"), 0o777, -1))
    killer("open", (str(tmp_path / "runs"), "w", 0))
    killer("open", (3, "w", 0))
    killer("socket.connect", (str(tmp_path / "run"),))
    assert killer.count == 2


def test_a_finding_is_one_line(log: Log) -> None:
    log.finding("inputs", "a\nb\x1b[2J")
    assert (log.folder / "soak.log").read_text().count("\n") == 1
    assert one_line("x" * 1000).endswith("…")
    assert log.findings == ["inputs: a\nb\x1b[2J"]


def test_a_process_that_stays_is_found(tmp_path: Path) -> None:
    commands = Commands(tmp_path)
    process = subprocess.Popen(["sleep", "60"], env=commands.environment)
    try:
        assert commands.processes() == [(process.pid, "sleep 60")]
        assert MARK in commands.environment
    finally:
        process.kill()
        process.wait()
    assert commands.processes() == []
