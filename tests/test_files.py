"""Writes that are complete or did not happen, whatever the disk does."""

from __future__ import annotations

import errno
import os
import secrets
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.disk_faults import failing, file_limit, refusal, small_disk
from support.paths import ROOT

from minidistill import cli
from minidistill.errors import EXIT_ENVIRONMENT, UserError
from minidistill.models.registry import resolve
from minidistill.system.files import remove_leftovers, write_atomic, writing

WRITER = """
import sys
from pathlib import Path
from minidistill.system.files import write_atomic
while True:
    for letter in "ab":
        write_atomic(Path(sys.argv[1]), letter * 4_000_000)
"""


def test_a_killed_writer_leaves_a_complete_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for wait in (0.003, 0.011, 0.029):
        path.unlink(missing_ok=True)
        with subprocess.Popen([sys.executable, "-c", WRITER, str(path)]) as writer:
            deadline = time.monotonic() + 30
            while not path.exists() and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(wait)
            os.kill(writer.pid, signal.SIGKILL)
        assert path.read_bytes() in (b"a" * 4_000_000, b"b" * 4_000_000)
    write_atomic(path, "a temporary file that was left behind does no harm")
    mine = ("notes.tmp", "file.tmp", "file.1234567.tmp", "file.123456789.tmp", "file.0000000g.tmp")
    for name in mine:
        (tmp_path / name).write_text("somebody else's")
    (tmp_path / "file.deadbeef.tmp").write_text("half")
    remove_leftovers(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["file", *mine])
    remove_leftovers(tmp_path / "not there")


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO])
def test_a_write_that_fails_at_any_call_leaves_the_old_file(tmp_path: Path, error: int) -> None:
    """Or the new one, if only its name could not be flushed."""
    path = tmp_path / "file"
    words = {errno.ENOSPC: "free some space on the disk of", errno.EDQUOT: "quota is used up",
             errno.EFBIG: "ulimit -f", errno.EIO: "repair the disk"}  # fmt: skip
    for number in range(1, 99):
        path.write_text("old")
        with failing(number, error) as calls:
            refused = refusal(lambda: write_atomic(path, "new"))
        if refused is None:
            break
        assert refused.exit_code == EXIT_ENVIRONMENT
        assert refused.what == f"cannot write {path}: {os.strerror(error)}"
        assert words[error] in refused.fix
        assert "--resume" in refused.fix
        assert path.read_text() == ("new" if "replace" in calls[: number - 1] else "old")
        assert list(tmp_path.iterdir()) == [path]
    assert number == 6, "open, fsync, replace, and open, fsync of the folder"


def test_no_link_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither at the file's name, nor where the temporary file would be."""
    precious, path = tmp_path / "precious", tmp_path / "file"
    precious.write_text("mine")
    path.symlink_to(precious)
    (tmp_path / "file.tmp").symlink_to(precious)
    write_atomic(path, "new")
    assert path.read_text() == "new"
    assert not path.is_symlink()
    monkeypatch.setattr(secrets, "token_hex", lambda size: "0" * 2 * size)
    for target in (precious, tmp_path / "nowhere"):
        planted = tmp_path / "file.00000000.tmp"
        planted.symlink_to(target)
        with pytest.raises(UserError, match="File exists"):
            write_atomic(path, "newer")
        assert path.read_text() == "new"
        planted.unlink()
    assert precious.read_text() == "mine"
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_the_umask_is_honoured(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_atomic(tmp_path / "file", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~umask


def _save_tokenizer(path: Path) -> None:
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(resolve("tiny-sokoban")).save_pretrained(path)


LIBRARIES: dict[str, Callable[[Path], object]] = {
    "safetensors": lambda path: save_file({"x": torch.zeros(50_000)}, path),
    "torch": lambda path: torch.save(torch.zeros(50_000), path),
    "python": lambda path: path.write_bytes(bytes(200_000)),
    "tokenizers": _save_tokenizer,
}


@pytest.mark.parametrize("library", LIBRARIES)
def test_errors_of_libraries_for_a_disk_that_is_full(tmp_path: Path, library: str) -> None:
    """Of which some quote the system's words, and some do not even do that."""
    with (
        pytest.raises(UserError, match="cannot write") as caught,
        file_limit(4000),
        writing(tmp_path / "x", 200_000),
    ):
        LIBRARIES[library](tmp_path / "x")
    assert caught.value.exit_code == EXIT_ENVIRONMENT
    if library == "torch":  # whose writer keeps the file open, and says no more
        return
    with small_disk(tmp_path / "disk") as resize:
        resize(8192)
        with (
            pytest.raises(UserError, match="cannot write") as caught,
            writing(tmp_path / "disk/x", 200_000),
        ):
            LIBRARIES[library](tmp_path / "disk/x")
        assert caught.value.exit_code == EXIT_ENVIRONMENT
        free = f"free at least 200 kB on the disk of {tmp_path}/disk, which has"
        assert free in caught.value.fix


def test_what_to_do_about_what_is_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="Is a directory") as caught:
        write_atomic(tmp_path / "folder", "x")
    assert f"remove what is in the place of {tmp_path}/folder" in caught.value.fix
    for number, advice in (
        (errno.EACCES, f"give this user the right to write in {tmp_path};"),
        (errno.EMFILE, "raise the limit on open files (`ulimit -n`);"),
    ):
        with pytest.raises(UserError, match="cannot write") as caught, writing(tmp_path / "x"):
            raise OSError(number, os.strerror(number))
        assert advice in caught.value.fix


def test_other_errors_pass(tmp_path: Path) -> None:
    refused = UserError("the message says No space left on device, and is a UserError already")
    for error in (ValueError("no"), RuntimeError("CUDA error"), refused, KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught, writing(tmp_path / "x"):
            raise error
        assert caught.value is error


def test_a_disk_without_room_for_more_files(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk"):
        options: Any = ["mount", "-o", "remount,nr_inodes=2", str(tmp_path / "disk")]
        subprocess.run(options, check=True, cwd=ROOT)
        write_atomic(tmp_path / "a", "outside")
        (tmp_path / "disk/a").touch()
        with pytest.raises(UserError, match="No space left") as caught:
            write_atomic(tmp_path / "disk/b", "x")
        assert "no room for more files" in caught.value.fix


@pytest.mark.parametrize("path", ["/tmp/somewhere", None])
def test_a_disk_that_is_full_anywhere_is_exit_code_3(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], path: str | None
) -> None:
    """Also where nobody expected a write."""

    def full(arguments: list[str]) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    monkeypatch.setattr(cli, "_dispatch", full)
    assert cli.main(["run"]) == EXIT_ENVIRONMENT
    error = capsys.readouterr().err
    assert f"cannot write {path or 'a file'}: No space left on device" in error
    assert "free some space on the disk" in error
