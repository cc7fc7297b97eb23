"""A sample of the soak: hostile inputs, kills that are resumed, starts that are stopped."""

from __future__ import annotations

import os
import re
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
from support.paths import ROOT
from support.processes import wait_for

from minidistill.errors import UserError
from tools.forked import CONTEXT
from tools.soak import __main__ as soak
from tools.soak import inputs, kills, shared, starts
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
        process = CONTEXT.Process(
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
        # the kernel shows the environment of a new program a moment after it starts
        wait_for(lambda: commands.processes() == [(process.pid, "sleep 60")])
        assert MARK in commands.environment
    finally:
        process.kill()
        process.wait()
    assert commands.processes() == []


# -- what is its runs' and what is others' -------------------------------------------------------

PRIVATE = """
from tools.soak import shared
if not shared.make_private():
    print("not allowed")
else:
    segments = shared.Segments(list)
    (shared.FOLDER / NAME).touch()
    print(shared.describe(), segments.left(), sorted(p.name for p in shared.FOLDER.iterdir()))
"""


def test_a_soak_has_shared_memory_of_its_own_where_that_is_allowed() -> None:
    name = f"sem.mp-{os.getpid()}"
    result = subprocess.run(
        [sys.executable, "-c", PRIVATE.replace("NAME", repr(name))],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert result.stderr == ""
    expected = f"the soak has a /dev/shm of its own ['{name}'] ['{name}']\n"
    assert result.stdout in (expected, "not allowed\n")
    assert not (shared.FOLDER / name).exists()


def test_elsewhere_segments_are_told_by_who_holds_them(tmp_path: Path) -> None:
    """Also one that its process has removed the name of, or has closed since."""
    commands = Commands(tmp_path)
    theirs, ours, closed = (
        shared.FOLDER / f"psm_{os.getpid()}_{n}" for n in ("theirs", "ours", "closed")
    )
    program = (
        "import mmap, sys, time\n"
        "with open(sys.argv[1], 'w+') as f: f.truncate(4096); m = mmap.mmap(f.fileno(), 4096)\n"
        "g = open(sys.argv[2], 'w'); print('made', flush=True); time.sleep(60)"
    )
    segments = shared.Segments(commands.processes)
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(ours), str(closed)],
        env=commands.environment, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        theirs.touch()
        assert process.stdout is not None
        assert process.stdout.readline() == "made\n"
        segments.look()
        process.kill()
        process.communicate()
        assert segments.left() == sorted([ours.name, closed.name])
        ours.unlink()
        assert segments.left() == [closed.name]
    finally:
        process.kill()
        for path in (theirs, ours, closed):
            path.unlink(missing_ok=True)


def test_runs_take_ctrl_c_also_in_a_shells_background(tmp_path: Path) -> None:
    (tmp_path / "show.py").write_text("import signal; print(signal.getsignal(signal.SIGINT))")
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Commands(tmp_path) as commands:
            assert commands.start("show", output=tmp_path / "out").wait(20) == 0
    finally:
        signal.signal(signal.SIGINT, before)
    assert (tmp_path / "out").read_text() == f"{signal.default_int_handler}\n"


def test_a_soak_that_is_stopped_says_what_it_has_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[subprocess.Popen[bytes]] = []

    def stopped(log: Log, seed: int, count: int, end: float | None) -> int:
        with Commands(log.work / "starts") as commands:
            started.append(subprocess.Popen(["sleep", "60"], env=commands.environment))
            wait_for(lambda: bool(commands.processes()))
            log.count("starts", "plain")
            os.kill(os.getpid(), signal.SIGTERM)
        return 0

    monkeypatch.setattr(shared, "make_private", lambda: False)
    monkeypatch.setattr(starts, "soak", stopped)
    for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "")  # and as they were at the end
    before = signal.getsignal(signal.SIGTERM)
    try:
        code = soak.main(
            ["--only", "starts", "--folder", str(tmp_path / "soak"), "--log", str(tmp_path / "log")]
        )
    finally:
        signal.signal(signal.SIGTERM, before)
    assert code == 130
    assert started[0].wait(20) == -signal.SIGKILL
    text = (tmp_path / "log").read_text()
    assert text == (tmp_path / "soak" / "soak.log").read_text()
    lines = [line.partition("  ")[2].strip() for line in text.splitlines()]
    assert lines[0] == "seed 0, parts starts"
    assert lines[1].startswith("commit ")
    assert lines[2].startswith("Python ")
    assert lines[4].startswith("shared memory: a segment is a run's if ")
    assert [lines[5], lines[7]] == ["stopped by a signal", "1 × plain"]
    assert re.fullmatch(r"starts: 1 of 200 in \d+ s, 0 findings", lines[6])
    assert re.fullmatch(r"0 findings in \d+ s", lines[8])
    assert str(tmp_path) not in text
