"""The report during a run: when it is written, what it costs, and how it ends."""

from __future__ import annotations

import os
import signal
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from support.reported_runs import Page, finished_run
from support.runs import run

from minidistill.driver import loop, session
from minidistill.errors import EXIT_INTERRUPTED, EXIT_OK, EXIT_USAGE, UserError
from minidistill.reporting.html import LiveReport, has_report, live, write_report
from minidistill.reporting.run_lock import is_locked, locked
from minidistill.types import Metrics

BRIEF = (
    "--no-orchestrator.eval", "--no-orchestrator.teacher_model.eval_baseline",
    "--max_steps", "1", "--orchestrator.batch_size", "4",
)  # fmt: skip


def state(run_dir: Path) -> str:
    html = (run_dir / "report.html").read_text(encoding="utf-8")
    return html.partition('data-state="')[2].partition('"')[0]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    run_dir = finished_run(tmp_path / "run")
    (run_dir / "scoreboard.json").unlink()
    return run_dir


class Clock:
    """A clock, and writings of a report that take a time by it."""

    def __init__(self, patch: pytest.MonkeyPatch, cost: float) -> None:
        self.now, self.cost, self.written = 1000.0, cost, []  # type: ignore[var-annotated]
        patch.setattr(live, "write_report", self.write)

    def __call__(self) -> float:
        return self.now

    def write(self, run_dir: Path, *, unfinished: str, pause: float) -> None:
        self.written.append((self.now, unfinished, pause))
        self.now += self.cost


@pytest.mark.parametrize(("cost", "pause"), [(0.02, 10.0), (0.5, 50.0)])
def test_writing_takes_a_hundredth_of_the_time_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cost: float, pause: float
) -> None:
    clock = Clock(monkeypatch, cost)
    report = LiveReport(tmp_path, clock)
    for _ in range(4000):
        report.refresh()
        clock.now += 0.1
    times = [time for time, _, _ in clock.written]
    assert times[0] == 1000.0
    assert min(b - a for a, b in pairwise(times)) >= pause + cost - 1e-6
    assert len(times) >= 400 / (pause + cost + 0.2)
    assert {(kind, wait) for _, kind, wait in clock.written[1:]} == {("running", pause)}


def test_a_report_that_fails_is_given_up_with_one_warning(
    run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (run_dir / "report.html").mkdir()
    report = LiveReport(run_dir)
    for _ in range(3):
        report.refresh()
    report.close()
    assert [text for text in caplog.messages if "no live report: cannot write" in text] == [
        caplog.messages[-1]
    ]
    assert len(caplog.messages) == 1


def test_the_states_of_a_run(run_dir: Path) -> None:
    page = Page(write_report(run_dir).read_text())
    assert state(run_dir) == "stopped"
    assert "This run stopped before its end." in page.text
    with locked(run_dir):
        assert is_locked(run_dir)
        write_report(run_dir)
        assert state(run_dir) == "running"
        assert not has_report(run_dir)
        (run_dir / "scoreboard.json").write_text('{"verdict": "x", "missing": ["drift_kl"]}')
        write_report(run_dir)
        assert state(run_dir) == "running"
        (run_dir / "scoreboard.json").write_text('{"verdict": "x"}')
        write_report(run_dir)
        assert state(run_dir) == "finished"
    assert not is_locked(run_dir)
    assert has_report(run_dir)


def test_closing_keeps_the_report_of_a_finished_run(run_dir: Path) -> None:
    report = LiveReport(run_dir)
    report.close()
    assert not (run_dir / "report.html").exists()  # there was none to end
    report.refresh()
    assert state(run_dir) == "running"
    report.close()
    assert state(run_dir) == "stopped"
    (run_dir / "scoreboard.json").write_text('{"verdict": "x"}')
    report.close()  # as of a run whose last report could not be written
    assert state(run_dir) == "finished"
    before = (run_dir / "report.html").read_bytes()
    report.close()
    assert (run_dir / "report.html").read_bytes() == before


def test_a_stopped_run_shows_the_end_of_its_log_and_how_to_go_on(run_dir: Path) -> None:
    (run_dir / "logs").mkdir()
    lines = [f"line {i} " + "x" * 100 for i in range(200)] + ["<b>Error: it broke</b>"]
    (run_dir / "logs" / "run.log").write_text("\n".join(lines) + "\n")
    (run_dir / "env.json").write_text(
        '{"argv": ["run", "my file.toml", "--resume", "--seed", "1"]}'
    )
    page = Page(write_report(run_dir).read_text())
    assert "<b>Error: it broke</b>" in page.text
    assert "line 189 " in page.text
    assert "line 188 " not in page.text
    assert "minidistill run 'my file.toml' --seed 1 --resume" in page.text


def test_a_run_writes_its_report_from_its_start_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "PAUSE", 0.0)
    monkeypatch.setattr(live, "SHARE", 1e9)
    seen: list[str] = []
    path, log = tmp_path / "run", session.Session.log

    def look(self: Any, step: int, metrics: Metrics) -> None:
        log(self, step, metrics)
        text = (path / "report.html").read_text(encoding="utf-8")
        seen.append(f"{state(path)} {'step 1 of 1' in text}")

    monkeypatch.setattr(session.Session, "log", look)
    assert run(path, *BRIEF) == EXIT_OK
    assert seen[:1] + seen[-1:] == ["running True", "running True"]
    assert state(path) == "finished"


def test_a_run_that_fails_or_is_interrupted_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any) -> None:
        raise UserError("the disk is on fire", "here", "put it out")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "finish", fails)
        assert run(tmp_path / "failed", *BRIEF) == EXIT_USAGE
    assert state(tmp_path / "failed") == "stopped"
    assert "the disk is on fire" in (tmp_path / "failed" / "report.html").read_text()

    def interrupts(*args: Any) -> None:
        step(*args)
        os.kill(os.getpid(), signal.SIGINT)

    step = loop.train_step
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", interrupts)
        path = tmp_path / "interrupted"
        assert run(path, *BRIEF, "--max_steps", "2") == EXIT_INTERRUPTED
    assert state(path) == "stopped"
    # it is finished later, and its report too
    assert run(path, *BRIEF, "--max_steps", "2", "--resume") == EXIT_OK
    assert state(path) == "finished"
    # one that was killed while it wrote its last report
    page = path / "report.html"
    page.write_text(page.read_text().replace('data-state="finished"', 'data-state="running"'))
    assert run(path, *BRIEF, "--max_steps", "2", "--resume") == EXIT_OK
    assert state(path) == "finished"
