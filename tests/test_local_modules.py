"""Modules in the current directory are found for the configuration and for code from there."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from minidistill.envs.registry import import_function
from minidistill.system import local_modules, subprocesses
from minidistill.system.subprocesses import Subprocess

TOOL = """\
from importlib import import_module
from importlib.util import find_spec
FOUND = find_spec("planted") is not None
for load in (lambda: __import__("planted"), lambda: import_module("planted")):
    try:
        load()
        FOUND = True
    except ImportError:
        pass
"""
MINE = """\
import my_tool, my_words.more
def load():
    import my_late
    return my_tool.FOUND, my_words.more.WORD, my_late.WORD
"""


@pytest.fixture
def folder(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """The current directory; a library elsewhere tries to import what is planted in it."""
    library = tmp_path / ".venv" / "lib"
    library.mkdir(parents=True)
    (library / "my_tool.py").write_text(TOOL)
    (tmp_path / "my_module.py").write_text(MINE)
    (tmp_path / "planted.py").touch()
    (tmp_path / "my_late.py").write_text("WORD = 'late'")
    (tmp_path / "my_words").mkdir()
    (tmp_path / "my_words" / "__init__.py").touch()
    (tmp_path / "my_words" / "more.py").write_text("from my_late import WORD")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(library))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    yield tmp_path
    for name in ("my_module", "my_tool", "my_words", "my_words.more", "my_late"):
        sys.modules.pop(name, None)


def test_a_library_finds_nothing_there(folder: Path) -> None:
    """Also one that lies in the directory itself, like what is in its `.venv`."""
    assert import_function("my_module:load", "")() == (False, "late", "late")
    with pytest.raises(ImportError):
        __import__("planted")
    assert str(folder) not in sys.path


def test_a_subprocess_finds_what_was_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By anybody: it reads pickles of what the modules define."""
    monkeypatch.setattr(subprocesses, "Popen", subprocess.Popen)
    import_function("my_module:load", "")()
    (folder / ".venv" / "lib" / "child.py").write_text(
        "import my_late, sys\nassert not any('MINIDISTILL' in name for name in __import__('os')."
        "environ)\ntry:\n    import planted\nexcept ImportError:\n    sys.exit(14)\n"
    )
    child = Subprocess("child", [], [])
    try:
        assert child.popen.wait(20) == 14, child.last_words()
    finally:
        child.close()


def test_what_is_installed_is_not_looked_for(folder: Path) -> None:
    before = list(sys.meta_path)
    local_modules.find_in_current_directory("json")
    local_modules.find_in_current_directory("my_tool")
    assert sys.meta_path == before
    assert local_modules.variables() == {} or str(folder) not in str(local_modules.variables())
