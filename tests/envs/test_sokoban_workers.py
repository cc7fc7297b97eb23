"""Levels that are made in several processes."""

import logging
import os
import signal
import subprocess
from collections.abc import Iterator

import pytest

from minidistill.envs.sokoban import workers
from minidistill.envs.sokoban.difficulty import Difficulty
from minidistill.envs.sokoban.level_set import LevelSet
from minidistill.envs.sokoban.levels import Level, LevelMaker, Recipe
from minidistill.envs.sokoban.workers import WorkerProcess, make_levels
from minidistill.errors import EXIT_USAGE, UserError

RECIPE = Recipe.of(Difficulty(4, 7, 4, 7, 1, 3), 0, "train", 64)
NUMBERS = range(3, 51)


@pytest.fixture(scope="module")
def expected() -> dict[int, Level]:
    maker = LevelMaker(RECIPE)
    return {number: maker.make(number) for number in NUMBERS}


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[WorkerProcess]]:
    """The processes that are started: at once, for two cores."""
    processes: list[WorkerProcess] = []

    class Process(WorkerProcess):
        def __init__(self, recipe: Recipe) -> None:
            super().__init__(recipe)
            processes.append(self)

    # these processes are light: they start as users' do
    monkeypatch.setattr("minidistill.system.subprocesses.Popen", subprocess.Popen)
    monkeypatch.setattr(workers, "PATIENCE", -1.0)
    monkeypatch.setattr(workers, "WorkerProcess", Process)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1})
    yield processes
    assert all(process.popen.returncode is not None for process in processes)


def test_processes_make_the_same_levels(
    started: list[WorkerProcess],
    expected: dict[int, Level],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(LevelMaker, "make", None)  # not in this process
    with caplog.at_level(logging.DEBUG):
        made = dict(make_levels(LevelMaker(RECIPE), NUMBERS))
    assert made == expected
    assert len(started) == 2
    assert caplog.messages == ["sokoban-env: making 48 levels in 2 processes"]


def test_levels_of_processes_come_with_progress(
    started: list[WorkerProcess], expected: dict[int, Level], monkeypatch: pytest.MonkeyPatch
) -> None:
    advanced: list[int] = []
    levels = LevelSet(Difficulty(4, 7, 4, 7, 1, 3), 0, "train", 64)
    assert levels.take(NUMBERS, advanced.append) == list(expected.values())
    assert advanced == [0] + [1] * len(NUMBERS)
    assert started


def test_a_handful_of_levels_starts_no_process(
    started: list[WorkerProcess], expected: dict[int, Level], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert dict(make_levels(LevelMaker(RECIPE), NUMBERS[:15])).items() <= expected.items()
    monkeypatch.setattr(workers, "PATIENCE", 60.0)
    assert dict(make_levels(LevelMaker(RECIPE), NUMBERS)) == expected
    monkeypatch.setattr(workers, "PATIENCE", -1.0)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0})
    assert dict(make_levels(LevelMaker(RECIPE), NUMBERS)) == expected
    assert not started


@pytest.mark.parametrize("killed", [1, 2])
def test_a_process_that_dies_is_noticed(
    started: list[WorkerProcess],
    expected: dict[int, Level],
    killed: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    made = {}
    for number, level in make_levels(LevelMaker(RECIPE), NUMBERS):
        if len(made) == 3:
            for process in started[:killed]:
                os.kill(process.popen.pid, signal.SIGKILL)
        made[number] = level
    assert made == expected
    warnings = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert warnings == ["sokoban-env: a process that makes levels died: signal SIGKILL"] * killed


def test_a_process_that_cannot_start_is_noticed(
    started: list[WorkerProcess],
    expected: dict[int, Level],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(workers, "MODULE", "minidistill.no_such_module")
    assert dict(make_levels(LevelMaker(RECIPE), NUMBERS)) == expected
    assert len(caplog.messages) == 2
    assert all("exit code 1" in m and "no_such_module" in m for m in caplog.messages)


def test_a_level_that_does_not_exist_is_an_error_in_processes_too(
    started: list[WorkerProcess],
) -> None:
    recipe = Recipe.of(Difficulty(4, 4, 4, 4), 0, "train", 64)
    with pytest.raises(UserError, match="no new level") as caught:
        dict(make_levels(LevelMaker(recipe), range(64)))
    assert caught.value.exit_code == EXIT_USAGE
    assert len(started) == 2


def test_processes_end_with_their_caller(started: list[WorkerProcess]) -> None:
    levels = make_levels(LevelMaker(RECIPE), NUMBERS)
    next(levels)
    levels.close()  # as an exception in the caller does
    assert len(started) == 2


def test_the_levels_of_a_stopped_process_are_made_by_others(
    started: list[WorkerProcess],
    expected: dict[int, Level],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(workers, "SILENT_SECONDS", 0.3)
    monkeypatch.setattr(workers, "TICK", 0.1)

    class Process(workers.WorkerProcess):
        def __init__(self, recipe: Recipe) -> None:
            super().__init__(recipe)
            if self is started[0]:
                os.kill(self.popen.pid, signal.SIGSTOP)

    monkeypatch.setattr(workers, "WorkerProcess", Process)
    made = dict(make_levels(LevelMaker(RECIPE), NUMBERS))
    assert made == expected
    assert "no process made a level for 0." in caplog.text
    assert "signal SIGKILL" in caplog.text
