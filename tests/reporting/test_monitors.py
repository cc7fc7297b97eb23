"""Monitors: wandb offline, and monitors that raise, hang or do not start."""

from __future__ import annotations

import json
import os
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from minidistill.config import Config
from minidistill.errors import EXIT_ENVIRONMENT, UserError
from minidistill.reporting.monitors import check_monitors, open_monitors
from minidistill.reporting.monitors.background import BackgroundMonitor
from minidistill.reporting.monitors.weights_and_biases import run_id


class Recorder:
    """A monitor that keeps its records. `act` is called with the step of each record."""

    def __init__(self, act: Callable[[int], object] = lambda step: None) -> None:
        self.act = act
        self.records: list[tuple[int, dict[str, float]]] = []
        self.summary: Mapping[str, Any] | None = None

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.act(step)
        self.records.append((step, metrics))

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
    monitor.close({"gap_closed": 0.9})
    monitor.close(None)
    assert recorder.records == [(1, {"teacher_kl": 1.0}), (2, {"reward/mean": 0.5})]
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


def test_the_run_id_is_kept_and_a_damaged_one_replaced(tmp_path: Path) -> None:
    first = run_id(tmp_path)
    assert run_id(tmp_path) == first
    (tmp_path / "wandb_id").write_text("../../etc\x1b[0m")
    assert run_id(tmp_path) not in (first, "../../etc\x1b[0m")


def test_the_run_id_is_not_written_through_a_link_nor_read_of_a_pipe(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / "wandb_id"
    path.symlink_to(tmp_path / "elsewhere")
    first = run_id(tmp_path / "run")
    assert not (tmp_path / "elsewhere").exists()
    assert path.read_text() == f"{first}\n"
    path.unlink()
    os.mkfifo(path)
    assert run_id(tmp_path / "run") != first
    assert path.is_file()


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of an offline file: a header of 7 bytes, then LevelDB's log format."""
    from wandb.proto import wandb_internal_pb2

    new_record: Any = wandb_internal_pb2.Record  # type: ignore[attr-defined]
    data, position, payload = path.read_bytes(), 7, b""
    block = 32768
    while position + 7 <= len(data):
        remaining = block - position % block
        if remaining < 7:
            position += remaining
            continue
        _, size, kind = struct.unpack_from("<IHB", data, position)
        payload += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # a full record, or the last part of one
            record = new_record()
            record.ParseFromString(payload)
            yield record
            payload = b""


def items(entries: Any) -> dict[str, Any]:
    return {e.key or "/".join(e.nested_key): json.loads(e.value_json) for e in entries}


def test_wandb_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("wandb", reason="needs wandb, which is not installed")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    run_dir = tmp_path / "a run"
    run_dir.mkdir()
    for first in (1, 3):  # the second time is a resumed run
        monitor = open_monitors(config(offline=True, tags=["a"]), run_dir)
        for step in (first, first + 1):
            monitor.log(step, {"teacher_kl": 1.0 / step, "combined_advantage": -0.5})
            monitor.log(step, {"eval/sokoban-env/student/avg": 0.1 * step})
        monitor.close({"gap_closed": 0.9, "verdict": "closed", "drift_kl": None})
        time.sleep(1.0)  # wandb names offline files by the second
    assert caplog.messages == []
    files = sorted((run_dir / "wandb").glob("offline-run-*/run-*.wandb"))
    saved_id = (run_dir / "wandb_id").read_text().strip()
    assert files
    assert all(file.name == f"run-{saved_id}.wandb" for file in files)
    records = [record for file in files for record in wandb_records(file)]
    history = [items(r.history.item) for r in records if r.WhichOneof("record_type") == "history"]
    by_step: dict[int, dict[str, Any]] = {}
    for row in history:
        by_step.setdefault(row["_step"], {}).update(row)
    assert sorted(by_step) == [1, 2, 3, 4]
    assert by_step[2]["teacher_kl"] == 0.5
    assert by_step[2]["combined_advantage"] == -0.5
    assert by_step[4]["eval/sokoban-env/student/avg"] == pytest.approx(0.4)
    [run, *_] = [r.run for r in records if r.WhichOneof("record_type") == "run"]
    assert (run.run_id, run.display_name, list(run.tags)) == (saved_id, "a run", ["a"])
    logged = {u.key: json.loads(u.value_json) for u in run.config.update}
    assert logged["orchestrator"]["teacher_model"]["context"] == "Play well."
    summary: dict[str, Any] = {}
    for record in records:
        if record.WhichOneof("record_type") == "summary":
            summary |= items(record.summary.update)
    assert summary["scoreboard/gap_closed"] == 0.9
    assert "scoreboard/drift_kl" not in summary
