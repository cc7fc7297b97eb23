"""Adding an engine takes its module and a line in the registry."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import ROOT, SOKOBAN, TESTS
from support.runs import TINY, records, run

from minidistill.config import load_config
from minidistill.errors import EXIT_OK, UserError

BRIEF = (
    "--max_steps",
    "3",
    "--no-orchestrator.eval",
    "--no-orchestrator.teacher_model.eval_baseline",
)
LINE = '        EngineKind("embedded", None),\n'
ADDED = '        EngineKind("added", "minidistill.engines.added"),\n'


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package with one module and one line more."""
    package = tmp_path / "source" / "minidistill"
    shutil.copytree(ROOT / "minidistill", package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(TESTS / "support" / "added_engine.py", package / "engines" / "added.py")
    registry = package / "config" / "engine_kinds.py"
    text = registry.read_text()
    assert text.count(LINE) == 1
    registry.write_text(text.replace(LINE, LINE + ADDED))
    return package


def test_a_run_samples_with_an_added_engine(package: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "minidistill", "run", SOKOBAN, *TINY, *BRIEF]
    path = os.pathsep.join([str(package.parent), *filter(None, sys.path)])
    done = subprocess.run(
        [*command, "--inference.engine", "added", "--output_dir", str(tmp_path / "added")],
        cwd=package.parent,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == EXIT_OK, done.stdout + done.stderr
    assert "added on the moon" in done.stdout
    assert run(tmp_path / "embedded", *BRIEF) == EXIT_OK
    added, embedded = records(tmp_path / "added"), records(tmp_path / "embedded")
    assert [record["step"] for record in added] == [1, 2, 3]
    assert added == embedded


def test_an_engine_that_is_not_registered_is_refused() -> None:
    with pytest.raises(UserError, match="added"):
        load_config([SOKOBAN, "--inference.engine", "added"])
