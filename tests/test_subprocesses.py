"""Subprocesses end with the process that started them, whatever they are doing."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support import processes
from support.paths import ROOT, TESTS
from support.processes import wait_for

PARENT = """
import sys, time
from minidistill.system.subprocesses import Subprocess
child = Subprocess("support.stuck_import", [], [])
sys.stdin.read()
"""
SCRATCH = """
from minidistill.system.scratch import ScratchFolder
print(ScratchFolder().path)
"""


@pytest.mark.parametrize("end", ["killed", "exit"])
def test_a_process_that_still_imports_ends_with_its_caller(tmp_path: Path, end: str) -> None:
    mark, stuck = processes.new_mark(), tmp_path / "stuck"
    paths = os.pathsep.join([str(TESTS), str(ROOT), *filter(None, sys.path)])
    variables = {"PYTHONPATH": paths, processes.MARK: mark, "STUCK": str(stuck)}
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT], stdin=subprocess.PIPE, env={**os.environ, **variables}
    )
    try:
        wait_for(stuck.exists)
        assert len(processes.marked(mark)) == 2
        if end == "killed":
            parent.kill()
        parent.communicate()
        assert parent.returncode == (-signal.SIGKILL if end == "killed" else 0)
        assert not processes.left_behind(mark)
    finally:
        for id in processes.marked(mark):
            os.kill(id, signal.SIGKILL)


def test_its_package_is_that_of_its_caller(tmp_path: Path) -> None:
    """Not an installed one, which there is too."""
    library = tmp_path / "library" / "minidistill"
    library.mkdir(parents=True)
    for name in ("__init__.py", "errors.py"):
        shutil.copy(ROOT / "minidistill" / name, library)
    shutil.copytree(ROOT / "minidistill" / "system", library / "system")
    (tmp_path / "library" / "show.py").write_text("import minidistill; print(minidistill.__file__)")
    caller = """
from minidistill.system.subprocesses import Subprocess
child = Subprocess("show", [], [])
child.popen.wait()
print(child.last_words())
child.close()
"""
    result = subprocess.run(
        [sys.executable, "-c", caller],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(library.parent)},
        capture_output=True,
        text=True,
    )
    assert result.stdout == f"; last output: {library / '__init__.py'}\n"


def test_a_scratch_folder_that_nobody_closed_goes_with_its_process(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", SCRATCH],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert Path(result.stdout.strip()).parent == tmp_path
    assert not list(tmp_path.iterdir())
