"""Monitors: wandb offline, and monitors that raise, hang or do not start."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from minidistill.config import Config
from minidistill.errors import EXIT_ENVIRONMENT, UserError
from minidistill.reporting.monitors import check_monitors, open_monitors
from minidistill.reporting.monitors.background import BackgroundMonitor
from minidistill.reporting.monitors.run_id import run_id


class Recorder:
    """A monitor that keeps its records. `act` is called with the step of each record."""

    def __init__(self, act: Callable[[int], object] = lambda step: None) -> None:
        self.act = act
        self.records: list[tuple[int, dict[str, float]]] = []
        self.tables: list[tuple[int, Sequence[Mapping[str, Any]]]] = []
        self.summary: Mapping[str, Any] | None = None

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.act(step)
        self.records.append((step, metrics))

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        self.tables.append((step, rows))

    def close(self, summary: Mapping[str, Any] | None) -> None:
        self.summary = summary


@pytest.fixture
def release() -> Iterator[threading.Event]:
    """An event that hanging threads wait for. It is set at the end of the test."""
    event = threading.Event()
    yield event
    event.set()


def config(**wandb: Any) -> Config:
    values: dict[str, Any] = {
        "orchestrator": {
            "teacher_model": {"context": "Play well."},
            "env": [{"id": "sokoban-env"}],
        }
    }
    if wandb:
        values["wandb"] = wandb
    return Config.model_validate(values)


def fail(step: int) -> None:
    raise OSError(f"\x1b[31mstep {step}")


def test_without_a_wandb_table_there_is_no_monitor(tmp_path: Path) -> None:
    before = threading.active_count()
    monitor = open_monitors(config(), tmp_path)
    monitor.log(1, {"teacher_kl": 1.0})
    monitor.close(None)
    assert threading.active_count() == before
    assert list(tmp_path.iterdir()) == []


def test_records_arrive_in_order_before_the_summary(caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder()
    monitor = BackgroundMonitor("test", lambda: recorder)
    metrics = {"teacher_kl": 1.0}
    monitor.log(1, metrics)
    metrics["teacher_kl"] = 9.0  # the run's own dictionary may change later
    monitor.log(2, {"reward/mean": 0.5})
    row = {"prompt": "p", "before": "b"}
    monitor.samples(2, [row])
    row["before"] = "c"
    monitor.close({"gap_closed": 0.9})
    monitor.close(None)
    assert recorder.records == [(1, {"teacher_kl": 1.0}), (2, {"reward/mean": 0.5})]
    assert recorder.tables == [(2, [{"prompt": "p", "before": "b"}])]
    assert recorder.summary == {"gap_closed": 0.9}
    assert caplog.messages == []


def test_a_monitor_that_raises_warns_once_and_continues(caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder(lambda step: fail(step) if step < 3 else None)
    monitor = BackgroundMonitor("test", lambda: recorder)
    for step in range(1, 5):
        monitor.log(step, {})
    monitor.close(None)
    assert [step for step, _ in recorder.records] == [3, 4]
    assert monitor.dropped == 2
    failed = [w for w in caplog.messages if "OSError" in w]
    assert len(failed) == 1
    assert "\x1b" not in failed[0]


def test_a_monitor_that_cannot_start_warns_and_is_disabled(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def connect() -> Recorder:
        raise PermissionError("no API key")

    monitor = BackgroundMonitor("test", connect)
    for step in range(5000):
        monitor.log(step, {})
    monitor.close(None)
    assert "no API key" in caplog.messages[0]
    assert not [w for w in caplog.messages[1:] if "no API key" in w]


def test_a_monitor_that_hangs_delays_neither_log_nor_close(
    release: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Recorder(lambda step: release.wait(30))
    monitor = BackgroundMonitor("t", lambda: recorder, capacity=4, close_seconds=0.2)
    began = time.monotonic()
    for step in range(50):
        monitor.log(step, {})
    monitor.close({"gap_closed": 1.0})
    assert time.monotonic() - began < 10, "it waited for the monitor"
    assert monitor.dropped >= 45
    assert len([w for w in caplog.messages if "does not keep up" in w]) == 1
    assert any(f"{monitor.dropped} records" in w for w in caplog.messages)
    assert any("was abandoned" in w for w in caplog.messages)


def test_a_monitor_that_hangs_on_start_delays_neither_log_nor_close(
    release: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    def connect() -> Recorder:
        release.wait(30)
        return Recorder()

    began = time.monotonic()
    monitor = BackgroundMonitor("test", connect, close_seconds=0.2)
    monitor.log(1, {})
    monitor.close(None)
    assert time.monotonic() - began < 10, "it waited for the monitor"
    assert any("was abandoned" in w for w in caplog.messages)


def test_an_abandoned_monitor_gives_no_more_warnings(
    release: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    def fail_late(step: int) -> None:
        release.wait(30)
        fail(step)

    recorder = Recorder(fail_late)
    monitor = BackgroundMonitor("late", lambda: recorder, close_seconds=0.1)
    monitor.log(1, {})
    monitor.close(None)
    [warning] = caplog.messages
    assert "was abandoned" in warning
    release.set()
    for thread in threading.enumerate():
        if thread.name == "monitor late":
            thread.join(30)
    assert monitor.dropped == 1
    assert caplog.messages == [warning]


@pytest.mark.parametrize("missing", ["absent", "only a folder of that name"])
def test_a_missing_package_is_an_environment_error(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "wandb"]:
        monkeypatch.delitem(sys.modules, name)
    if missing == "absent":
        monkeypatch.setitem(sys.modules, "wandb", None)
    else:
        (tmp_path / "wandb").mkdir()
        monkeypatch.setattr(sys, "path", [str(tmp_path)])
        sys.path_importer_cache.clear()
    with pytest.raises(UserError) as caught:
        check_monitors(config(offline=True))
    assert caught.value.exit_code == EXIT_ENVIRONMENT
    assert "pip install 'minidistill[wandb]'" in caught.value.fix


def wandb_id(path: Path) -> str:
    return run_id(path, "wandb_id", "W&B")


def test_the_run_id_is_kept_and_a_damaged_one_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = wandb_id(tmp_path)
    assert wandb_id(tmp_path) == first
    assert caplog.messages == []
    (tmp_path / "wandb_id").write_text("../../etc\x1b[0m")
    assert wandb_id(tmp_path) not in (first, "../../etc\x1b[0m")
    [warning] = caplog.messages
    assert "has no id of a W&B run any more: its curves start again" in warning


def test_the_run_id_is_not_written_through_a_link_nor_read_of_a_pipe(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / "wandb_id"
    path.symlink_to(tmp_path / "elsewhere")
    first = wandb_id(tmp_path / "run")
    assert not (tmp_path / "elsewhere").exists()
    assert path.read_text() == f"{first}\n"
    path.unlink()
    os.mkfifo(path)
    assert wandb_id(tmp_path / "run") != first
    assert path.is_file()
