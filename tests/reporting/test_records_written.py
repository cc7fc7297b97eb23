"""Writing a run's records: what is cut off and cleared away, and what is in a file's place."""

from __future__ import annotations

import logging
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.recorded_run import LAST, Run, lost

from minidistill.errors import EXIT_ENVIRONMENT, UserError
from minidistill.reporting.records import METRICS, REMOVED
from minidistill.reporting.run_directory import RunDirectory


def test_records_after_the_checkpoint_and_half_a_line_are_cut_off(run: Run) -> None:
    before = (run.path / METRICS).read_bytes()
    run.change(METRICS, lambda d: d + b'{"step": 7, "loss": 1}\n{"step": 8, "lo')
    directory = RunDirectory(run.path)
    assert [record["step"] for record in directory.records.all()] == list(range(8))
    assert directory.column("loss") == {s: s / 4 for s in range(1, 7)} | {7: 1}
    assert directory.column("odd") == {}  # not finite, so null
    assert b'"odd": null}\n' in before
    assert directory.has(7, "loss")
    assert not directory.has(0, "loss")
    assert run.disagreement(6) is None
    run.rewind(6)
    assert (run.path / METRICS).read_bytes() == before


def test_leftovers_of_writers_are_removed_and_other_files_left_alone(run: Run) -> None:
    folder = run.path / "rollouts"
    temporary = ("step_000003.jsonl.tmp", "step_000003.jsonl.0123abcd.tmp", "step_1000000.jsonl")
    others = ("step_abc.jsonl", "step_000009.txt", "notes.tmp", "step_.jsonl", "step_²3.jsonl")
    for name in (*temporary, *others):
        (folder / name).write_text("")
    run.rewind(6)
    left = {path.name for path in folder.iterdir()}
    assert not left & set(temporary)
    assert left >= set(others)


def test_a_full_disk_is_an_error_that_names_the_file(run: Run) -> None:
    directory = run.rewind(6)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((run.path / METRICS).stat().st_size + 5, hard))
    try:
        with pytest.raises(UserError, match=r"metrics\.jsonl: File too large") as caught:
            directory.log(7, {"loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.exit_code == EXIT_ENVIRONMENT
    assert caught.value.where == str(run.path / METRICS)
    assert run.disagreement(6) is None


def test_metrics_are_not_written_through_a_link(run: Run, tmp_path: Path) -> None:
    directory = run.rewind(6)
    shutil.move(run.path / METRICS, tmp_path / "elsewhere")
    (run.path / METRICS).symlink_to(tmp_path / "elsewhere")
    before = (tmp_path / "elsewhere").read_bytes()
    with pytest.raises(UserError, match=r"cannot write .*metrics\.jsonl"):
        directory.log(7, {"loss": 1.0})
    assert (tmp_path / "elsewhere").read_bytes() == before


def test_a_pipe_in_place_of_the_removed_names_is_not_waited_for(run: Run) -> None:
    run.change(LAST, lost)
    os.mkfifo(run.path / REMOVED)
    problem = run.disagreement(6)
    assert problem is not None
    assert f"{LAST} is missing" in problem


def test_a_file_that_cannot_be_looked_at_is_damage(run: Run) -> None:
    """As one in a folder that is closed to this user. Here the name is too long."""
    directory = run.rewind(6)
    directory.records.add({f"rollouts/{'x' * 300}": "0" * 64})
    run.saved["7"] = {"step": 6, "seconds": 1.0, **directory.records.flush()}
    assert run.disagreement(7) == f"rollouts/{'x' * 300} is damaged"


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
def test_something_else_in_place_of_the_metrics_amid_a_run(
    run: Run, make: Callable[[Path], None]
) -> None:
    """A pipe without a reader is not waited for."""
    directory = run.rewind(6)
    (run.path / METRICS).unlink()
    make(run.path / METRICS)
    with pytest.raises(UserError, match=r"cannot write .*metrics\.jsonl") as caught:
        directory.log(7, {"loss": 1.0})
    assert caught.value.exit_code == EXIT_ENVIRONMENT
    assert "remove what is in the place of" in caught.value.fix


def test_a_file_that_another_program_changes_is_said_and_counted_as_it_is(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    directory = run.rewind(6)
    run.change(METRICS, lambda d: d[d.index(b'{"step": 1') :])
    directory.log(7, {"loss": 1.0})
    with caplog.at_level(logging.WARNING):
        run.saved["7"] = {"step": 6, "seconds": 1.0, **directory.records.flush()}
    assert "another program has changed" in caplog.text
    assert run.disagreement(7) is None
    caplog.clear()
    directory.records.flush()
    assert not caplog.messages
