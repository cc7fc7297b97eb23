"""Display, log, report and monitors may break in a run: it goes on, and its exit code is true."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import pytest
from support.paths import ROOT, SOKOBAN
from support.runs import TINY, board, run

from minidistill import logs
from minidistill.config import Config
from minidistill.config.schema import WandbConfig
from minidistill.driver import loop, summary
from minidistill.driver.summary import write_run_report
from minidistill.errors import EXIT_ENVIRONMENT, EXIT_OK
from minidistill.reporting.html import live
from minidistill.reporting.monitors import (
    background,
    check_monitors,
    open_monitors,
    packages,
)
from minidistill.reporting.run_directory import RunDirectory
from minidistill.reporting.terminal import Display, Header, SafeDisplay
from minidistill.reporting.terminal.bars import ProgressBars
from minidistill.reporting.terminal.live import LiveDisplay
from minidistill.reporting.terminal.plain import PlainDisplay

BRIEF = (
    "--max_steps", "2", "--no-orchestrator.eval", "--no-orchestrator.teacher_model.eval_baseline",
)  # fmt: skip
ENV = "--orchestrator.env.0"


WANDB = Config.model_validate(
    {
        "orchestrator": {
            "teacher_model": {"context": "Play well."},
            "env": [{"id": "sokoban-env"}],
        },
        "wandb": {},
    }
)


def log(path: Path) -> str:
    return (path / "logs" / "run.log").read_text()


def assert_complete(path: Path) -> None:
    assert board(path)["steps"] == 2
    assert len((path / "metrics.jsonl").read_text().splitlines()) == 2
    assert (path / "adapter" / "adapter_model.safetensors").exists()


# -- the display -------------------------------------------------------------------------------


class Raising(PlainDisplay):
    """A display of which some methods raise."""

    def __init__(self, *methods: str) -> None:
        super().__init__(io.StringIO())
        for method in methods:
            setattr(self, method, self._raise)

    def _raise(self, *args: Any) -> Any:
        raise RuntimeError("no such color")


HEADER = Header("title", (("model", "x"),), max_steps=2, first_step=1)
CALLS: dict[str, Callable[[Display], object]] = {
    "open": lambda display: display.open(HEADER),
    "step": lambda display: display.step(1, {}, None),
    "evaluation": lambda display: display.evaluation(1, {}),
    "baseline": lambda display: display.baseline({}),
    "scoreboard": lambda display: display.scoreboard({}),
    "note": lambda display: display.note("a note"),
    "close": lambda display: display.close(),
}


@pytest.mark.parametrize("method", CALLS)
def test_a_display_of_which_a_method_fails(method: str, caplog: pytest.LogCaptureFixture) -> None:
    display = SafeDisplay(Raising(method))
    for call in (CALLS[method], *CALLS.values()):
        call(display)
    assert caplog.messages == ["the display failed (RuntimeError: no such color): nothing is shown"]


def test_a_phase_that_fails_does_not_hide_the_error_of_its_body() -> None:
    class Failing(PlainDisplay):
        @contextlib.contextmanager
        def phase(self, name: str, total: int, unit: str) -> Iterator[Any]:
            try:
                yield lambda count: 1 / 0
            finally:
                raise OSError("it fails at its end too")

    def train(display: Display, error: Exception | None) -> None:
        with display.phase("train", 2, "tokens") as advance:
            advance(1)
            if error is not None:
                raise error

    display = SafeDisplay(Failing(io.StringIO()))
    with pytest.raises(KeyError):
        train(display, KeyError())
    train(display, None)


def test_a_run_whose_display_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "open_display", lambda: Raising("phase", *CALLS))
    assert run(tmp_path / "run", *BRIEF) == EXIT_OK
    assert_complete(tmp_path / "run")
    assert log(tmp_path / "run").count("warning: the display failed (RuntimeError") == 1


def test_a_live_region_that_cannot_be_drawn_stands_still(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    def failing(*args: Any) -> Any:
        raise ZeroDivisionError

    caught: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", caught.append)
    caplog.set_level("DEBUG", "minidistill")
    display = LiveDisplay(Terminal())
    display.open(HEADER)
    monkeypatch.setattr(ProgressBars, "render", failing)  # in the thread that draws, too
    deadline = time.monotonic() + 10
    while "cannot be drawn" not in caplog.text:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    display.step(1, {"teacher_kl": 1.0}, None)
    display.close()
    assert caplog.text.count("cannot be drawn") == 1
    assert not caught


# -- streams -----------------------------------------------------------------------------------


@contextlib.contextmanager
def standard_streams(stream: TextIO) -> Iterator[None]:
    with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        yield


def test_a_full_device_for_the_output_of_an_environment_that_prints_and_a_hangup(
    tmp_path: Path,
) -> None:
    """What the environment prints is lost; nothing of it counts as its failure."""
    before = signal.getsignal(signal.SIGHUP)
    meddling = (f"{ENV}.id", "support.side_channels:meddling")
    with open("/dev/full", "w") as full, standard_streams(full):
        assert run(tmp_path / "run", *BRIEF, *meddling) == EXIT_OK
    assert_complete(tmp_path / "run")
    assert "cannot be written (No space left on device)" in log(tmp_path / "run")
    assert log(tmp_path / "run").count("the terminal is gone (SIGHUP)") == 1
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count('"env/errors": 0') == 2
    assert signal.getsignal(signal.SIGHUP) is before


def test_a_terminal_that_goes_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A live display on a real terminal, which is closed after its first kilobyte."""
    monkeypatch.setenv("TERM", "xterm")
    ours, theirs = os.openpty()
    lost = threading.Event()

    def read_a_little() -> None:
        read = 0
        while read < 1000:
            read += len(os.read(ours, 1000))
        os.close(ours)
        lost.set()

    threading.Thread(target=read_a_little, daemon=True).start()
    with os.fdopen(theirs, "w") as terminal, standard_streams(terminal):
        assert run(tmp_path / "run", *BRIEF) == EXIT_OK
    assert lost.is_set()
    assert_complete(tmp_path / "run")
    assert "cannot be written (Input/output error)" in log(tmp_path / "run")


# -- log and report ----------------------------------------------------------------------------


def test_a_log_that_is_no_file(tmp_path: Path) -> None:
    noted: list[str] = []
    with logs.to_terminal(lambda text, warning: noted.append(text)), logs.to_file(tmp_path):
        for number in range(3):
            logs.logger.info(f"note {number}")
    assert [text for text in noted if text.startswith("note")] == ["note 0", "note 1", "note 2"]
    assert len([text for text in noted if "Is a directory" in text]) == 1


def test_a_report_that_cannot_be_written_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(path: Path, **how: Any) -> Path:
        raise ValueError("the template is broken")

    path = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(summary, "write_report", failing)
        patch.setattr(live, "write_report", failing)
        assert run(path, *BRIEF) == EXIT_OK
    assert_complete(path)
    assert "no report: ValueError: the template is broken; `minidistill report" in log(path)
    assert log(path).count("no live report: ValueError: the template is broken") == 1
    (path / "report.html").mkdir()  # a real failure to write
    assert write_run_report(RunDirectory(path)) is None
    assert "no report: cannot write" in caplog.messages[-1]
    (path / "report.html").rmdir()
    before = (path / "metrics.jsonl").read_bytes(), board(path)
    assert run(path, *BRIEF, "--resume") == EXIT_OK
    assert ((path / "metrics.jsonl").read_bytes(), board(path)) == before
    assert (path / "report.html").read_text().startswith("<!doctype html>")


# -- monitors ----------------------------------------------------------------------------------


@pytest.fixture
def wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts a package wandb in place that misbehaves as the variable FAKE_WANDB says."""
    folder = tmp_path / "packages" / "wandb"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("from support.fake_wandb import *\nmisbehave('import')\n")
    for name in [name for name in sys.modules if name.split(".")[0] == "wandb"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(folder.parent))
    monkeypatch.setattr(background, "CLOSE_SECONDS", 0.3)
    monkeypatch.setenv("FAKE_WANDB", "")
    yield monkeypatch
    from support import fake_wandb

    fake_wandb.RELEASE.set()
    sys.modules.pop("wandb", None)
    for thread in threading.enumerate():
        if thread.name.startswith(background.THREAD):
            thread.join(10)
    fake_wandb.RELEASE.clear()


@pytest.mark.parametrize("place", ["init", "log", "finish"])
@pytest.mark.parametrize("fault", ["hang", "raise", "exit", "interrupt"])
def test_a_monitor_that_misbehaves(
    place: str, fault: str, tmp_path: Path, wandb: Any, caplog: pytest.LogCaptureFixture
) -> None:
    wandb.setenv("FAKE_WANDB", f"{place}:{fault}")
    check_monitors(WANDB)
    began = time.monotonic()
    monitor = open_monitors(WANDB, tmp_path)
    monitor.log(1, {"teacher_kl": 1.0})
    monitor.close({"gap_closed": 1.0})
    assert time.monotonic() - began < 5
    [warning] = [text for text in caplog.messages if "records were dropped" not in text]
    assert warning.endswith("; the run and metrics.jsonl are unaffected")


def test_a_run_whose_monitor_hangs_and_whose_log_is_on_a_full_device(
    tmp_path: Path, wandb: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    wandb.setenv("FAKE_WANDB", "finish:hang")
    wandb.setattr(RunDirectory, "log_path", Path("/dev/full"))
    assert run(tmp_path / "run", *BRIEF, "--wandb") == EXIT_OK
    assert_complete(tmp_path / "run")
    output = capsys.readouterr().out
    warning = "warning: /dev/full cannot be written ([Errno 28] No space left on device)"
    assert output.count(warning) == 1
    assert "warning: W&B was still busy" in output


def test_a_process_without_streams_ends_whatever_a_monitor_still_does(
    tmp_path: Path, wandb: Any
) -> None:
    """The run's files do not get the numbers of standard streams. The monitor hangs at the end,
    and so would its package's exit hook."""
    path = tmp_path / "run"
    command = [sys.executable, "-m", "minidistill", "run", SOKOBAN, *TINY, *BRIEF, "--wandb"]
    paths = [str(tmp_path / "packages"), "tests", *os.environ.get("PYTHONPATH", "").split(":")]
    environment = {"PYTHONPATH": os.pathsep.join(paths), "FAKE_WANDB": "finish:hang:exit hook"}
    shell = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"]
    process = subprocess.run(
        [*shell, *command, "--output_dir", str(path)],
        cwd=ROOT, env={**os.environ, **environment}, timeout=60,
    )  # fmt: skip
    assert process.returncode == EXIT_OK
    assert_complete(path)
    assert "was abandoned" in log(path)
    for line in (path / "metrics.jsonl").read_text().splitlines():
        json.loads(line)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("key:none", "wandb has no API key"),
        ("key:raise", "wandb cannot be used: RuntimeError: broken"),
        ("key:exit", "wandb cannot be used: it called sys.exit(3)"),
        ("import:raise", "wandb cannot be used: RuntimeError: broken"),
    ],
)
def test_a_monitor_that_cannot_work_is_refused_before_anything_is_written(
    fault: str, says: str, tmp_path: Path, wandb: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    wandb.setenv("FAKE_WANDB", fault)
    assert run(tmp_path / "run", *BRIEF, "--wandb") == EXIT_ENVIRONMENT
    assert says in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_log_on_disk_needs_no_key(wandb: Any) -> None:
    wandb.setenv("FAKE_WANDB", "key:none")
    wandb.setenv("WANDB_MODE", "offline")
    check_monitors(WANDB)
    wandb.delenv("WANDB_MODE")
    check_monitors(WANDB.model_copy(update={"wandb": WandbConfig(offline=True)}))


def test_a_check_of_the_key_that_hangs_is_a_warning(
    wandb: Any, caplog: pytest.LogCaptureFixture
) -> None:
    wandb.setenv("FAKE_WANDB", "key:hang")
    wandb.setattr(packages, "CHECK_SECONDS", 0.1)
    check_monitors(WANDB)
    assert "wandb did not say within 0.1 s" in caplog.text
