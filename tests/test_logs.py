"""Log handlers: the levels that each one shows, and their removal."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from minidistill import logs
from minidistill.reporting.terminal.plain import PlainDisplay

logger = logging.getLogger("minidistill.some.module")
STAMP = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  "


def emit() -> None:
    logger.warning("%d of %d GPUs", 1, 2)
    logger.info("resuming")
    logger.debug("started")


def test_the_terminal_shows_notes_and_warnings() -> None:
    notes: list[tuple[str, bool]] = []
    with logs.to_terminal(lambda text, warning: notes.append((text, warning))):
        emit()
    assert notes == [("1 of 2 GPUs", True), ("resuming", False)]


def test_the_file_has_every_record(tmp_path: Path) -> None:
    path = tmp_path / "run.log"
    path.write_text("before\n")
    with logs.to_file(path):
        emit()
    first, *lines = path.read_text().splitlines()
    assert first == "before"
    patterns = ("warning: 1 of 2 GPUs", "resuming", "started")
    for line, pattern in zip(lines, patterns, strict=True):
        assert re.fullmatch(STAMP + pattern, line)


def test_records_from_before_the_directory_exists_are_written_later(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "run.log"
    notes: list[str] = []
    with logs.to_terminal(lambda text, warning: notes.append(text)), logs.to_file(path):
        logger.warning("early")
        assert notes == ["early"]
        path.parent.mkdir()
        logger.warning("late")
    texts = [line.split("  ")[1] for line in path.read_text().splitlines()]
    assert texts == ["warning: early", "warning: late"]


def test_a_failed_write_raises_no_error(tmp_path: Path) -> None:
    for path in (Path("/dev/full"), tmp_path, tmp_path / "absent" / "run.log"):
        with logs.to_file(path):
            emit()


def test_a_pipe_in_place_of_the_log_is_not_waited_for(tmp_path: Path) -> None:
    notes: list[str] = []
    os.mkfifo(tmp_path / "run.log")
    path = tmp_path / "run.log"
    with logs.to_terminal(lambda text, warning: notes.append(text)), logs.to_file(path):
        logger.warning("first")
        logger.warning("second")
    assert (notes[0], notes[2]) == ("first", "second")
    assert "run.log cannot be written" in notes[1]


def test_lone_surrogates_are_escaped(tmp_path: Path) -> None:
    with logs.to_file(tmp_path / "run.log"):
        logger.warning("a → \udc80")
    assert "a → \\udc80" in (tmp_path / "run.log").read_text(encoding="utf-8")


def test_tracebacks_go_only_to_the_file(tmp_path: Path) -> None:
    notes: list[str] = []
    path = tmp_path / "run.log"
    with logs.to_terminal(lambda text, warning: notes.append(text)), logs.to_file(path):
        try:
            raise RuntimeError("boom")
        except RuntimeError as error:
            logger.debug("the run failed", exc_info=error)
    assert notes == []
    first, *rest = path.read_text().splitlines()
    assert first.endswith("  the run failed")
    assert rest[0] == "  Traceback (most recent call last):"
    assert rest[-1] == "  RuntimeError: boom"


def test_a_list_collects_warnings_until_drained() -> None:
    with logs.to_list() as warnings:
        emit()
        assert warnings.drain() == ["1 of 2 GPUs"]
        assert warnings.drain() == []
        logger.warning("again")
        assert warnings.drain() == ["again"]


def test_handlers_are_removed_on_exit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    notes: list[str] = []
    try:
        with logs.to_terminal(lambda text, warning: notes.append(text)):
            with logs.to_file(tmp_path / "run.log"), logs.to_list():
                pass
            emit()
            assert caplog.messages == []  # not passed on to the root logger's handlers
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert len(notes) == 2
    emit()
    assert len(notes) == 2
    assert not (tmp_path / "run.log").exists()
    assert caplog.messages == ["1 of 2 GPUs"]


def test_an_error_of_the_display_is_raised() -> None:
    """For example when standard output is a closed pipe."""

    def broken(text: str, warning: bool) -> None:
        raise BrokenPipeError

    with logs.to_terminal(broken), pytest.raises(BrokenPipeError):
        logger.warning("unread")


def test_lines_of_several_threads_stay_whole(tmp_path: Path) -> None:
    with open(tmp_path / "out", "w") as stream:
        display = PlainDisplay(stream)

        def warn(letter: str) -> None:
            for _ in range(200):
                logger.warning(letter * 50)

        with logs.to_terminal(display.note):
            threads = [threading.Thread(target=warn, args=(letter,)) for letter in "abcd"]
            for thread in threads:
                thread.start()
            for _ in range(200):
                display.scoreboard({"verdict": "v", "student": 1.0})
            for thread in threads:
                thread.join()
    text = (tmp_path / "out").read_text()
    warnings = re.findall(r"^warning: (.)\1{49}$", text, re.M)
    assert {letter: warnings.count(letter) for letter in "abcd"} == dict.fromkeys("abcd", 200)
    # no warning between the lines of a table
    assert text.count("scoreboard\n  v\n  student after  1\n") == 200


def test_no_torch_is_needed() -> None:
    code = "import sys, minidistill.logs; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
