"""Exports that are killed, or find no room on the disk."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.disk_faults import killed, small_disk
from support.exports import export, make_run

from minidistill.export.aside import made_aside


@pytest.fixture
def run(configure: Any, tmp_path: Path) -> Path:
    return make_run(configure, tmp_path / "mine")


def make(target: Path) -> None:
    with made_aside(target) as folder:
        (folder / "weights").write_text("all of them")


def test_what_a_killed_export_leaves_is_removed_by_the_next(tmp_path: Path) -> None:
    """Killed at any call that changes files: there is nothing, or all of it."""
    folder = tmp_path / "exports"
    folder.mkdir()
    mine = folder / "notes.0123abcd.tmp"
    mine.mkdir()
    (mine / "mine.txt").write_text("mine")
    number, left = 1, 0
    while killed(number, lambda: make(folder / "expert")):
        whole = (folder / "expert").exists()
        left += any(path.name.startswith("expert.") for path in folder.iterdir())
        assert not whole or (folder / "expert" / "weights").is_file()
        make(folder / "other")
        assert {p.name for p in folder.iterdir()} - {"expert"} == {"other", mine.name}
        for path in (folder / "expert", folder / "other"):
            shutil.rmtree(path, ignore_errors=True)
        number += 1
    assert number > 3
    assert left
    assert {path.name for path in folder.iterdir()} == {mine.name, "expert"}
    assert [path.name for path in (folder / "expert").iterdir()] == ["weights"]


def test_a_killed_export_of_a_run(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "exports"

    def export_until_it_is_checked() -> None:
        from minidistill.export import check

        check.in_transformers = lambda *args, **more: os.kill(os.getpid(), 9)  # type: ignore[assignment]
        export(run, folder / "expert")

    child = os.fork()
    if child == 0:
        try:
            export_until_it_is_checked()
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -9
    (left,) = folder.iterdir()
    assert left.name.endswith(".tmp")
    assert (left / "adapter_model.safetensors").is_file()
    assert export(run, folder / "expert") == 0
    assert [path.name for path in folder.iterdir()] == ["expert"]
    assert not [p.name for p in (folder / "expert").iterdir() if p.name.startswith(".")]


def test_a_disk_that_is_full(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with small_disk(tmp_path / "disk") as resize:
        for size, flags in ((200_000, []), (1_500_000, ["--merge"]), (40_000, [])):
            resize(size)
            target = tmp_path / "disk" / "expert"
            assert export(run, target, *flags) == 3
            error = capsys.readouterr().err
            assert "No space left on device" in error
            assert "export again" in error
            assert "--resume" not in error
            assert not list((tmp_path / "disk").iterdir()), "nothing is left"
        resize(16_000_000)
        assert export(run, target, "--merge") == 0
