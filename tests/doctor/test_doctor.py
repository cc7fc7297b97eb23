"""`minidistill doctor`: what it finds on this machine, and faults that are injected for real."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from minidistill import cli
from minidistill.doctor import catalog, command, disk, machine, packages
from minidistill.doctor.catalog import CHECKS, Check
from minidistill.doctor.isolated import make
from minidistill.doctor.probe import look
from minidistill.doctor.result import Result, passed
from minidistill.errors import EXIT_ENVIRONMENT, EXIT_OK, EXIT_USAGE

BY_NAME = {check.name: check for check in CHECKS}
# Modules that a check imports, and what becomes of that
FAULTS = {
    "segfault": "import ctypes; ctypes.string_at(0)",
    "hang": "import threading; threading.Event().wait()",
    "exit": "import sys; print('a library says why'); sys.exit(0)",
    "raises": "raise RuntimeError('undefined symbol: cuInit')",
    "missing": "import a_package_that_is_not_there",
    "late": "import os, atexit; atexit.register(os.abort)\ndef check():\n"
    "    from minidistill.doctor.result import passed\n    return passed('fine')",
    "fine": "def check():\n    from minidistill.doctor.result import passed\n"
    "    print('noise')\n    return passed('fine')",
}


@pytest.fixture
def faulty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, float], Result]:
    """Makes a check, in a real process, whose module has one of the faults."""
    monkeypatch.setattr("minidistill.system.subprocesses.Popen", subprocess.Popen)
    (tmp_path / "sitecustomize.py").write_text(
        "import minidistill.doctor.catalog as catalog\n"
        "from minidistill.doctor.catalog import Check\n"
        "names = " + repr(list(FAULTS)) + "\n"
        "catalog.CHECKS += tuple(Check(n, f'fault_{n}:check', fix='mend it') for n in names)\n"
    )
    for name, text in FAULTS.items():
        (tmp_path / f"fault_{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, sys.path)]))

    def check(name: str, seconds: float = 30.0) -> Result:
        return make(Check(name, f"fault_{name}:check", seconds, fix="mend it"))

    return check


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("segfault", "it crashed: signal SIGSEGV"),
        ("exit", "it called sys.exit(0)"),
        ("raises", "RuntimeError: undefined symbol: cuInit"),
        ("late", "it crashed: signal SIGABRT"),
    ],
)
def test_a_check_that_crashes_fails(name: str, text: str, faulty: Callable[..., Result]) -> None:
    result = faulty(name)
    assert (result.status, result.fix) == ("fail", "mend it")
    assert result.text.startswith(text)


def test_a_check_that_hangs_fails_and_leaves_no_process(faulty: Callable[..., Result]) -> None:
    began = time.monotonic()
    assert faulty("hang", 1.0) == Result("fail", "no answer within 1 s", "mend it")
    assert time.monotonic() - began >= 1


def test_a_package_that_is_missing_is_named(faulty: Callable[..., Result]) -> None:
    result = faulty("missing")
    assert result.status == "fail"
    assert result.fix == "pip install a_package_that_is_not_there"


def test_a_check_that_passes_says_what_it_found(faulty: Callable[..., Result]) -> None:
    assert faulty("fine") == passed("fine")


# -- the command -------------------------------------------------------------------------------


def fake_checks(monkeypatch: pytest.MonkeyPatch, *results: Result) -> list[str]:
    """Has the command make checks with these results. Returns the names of those that it makes."""
    made: list[str] = []
    by_name = {f"check {i}": result for i, result in enumerate(results)}

    def fake(check: Check) -> Result:
        made.append(check.name)
        return by_name[check.name]

    checks = tuple(Check(name, "none:none", runs=i == 2) for i, name in enumerate(by_name))
    monkeypatch.setattr(command, "make", fake)
    monkeypatch.setattr(command, "CHECKS", checks)
    return made


PASS, FAIL = passed("3.12"), Result("fail", "it is broken", "mend it")
SKIPPED = Result("skipped", "not installed", "install it")


def test_the_exit_code_says_if_a_check_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_checks(monkeypatch, PASS, SKIPPED)
    assert cli.main(["doctor"]) == EXIT_OK
    assert capsys.readouterr().out.splitlines() == [
        "pass     check 0        3.12",
        "skipped  check 1        not installed",
        "                        fix: install it",
        "1 pass, 1 skipped",
    ]
    fake_checks(monkeypatch, PASS, FAIL)
    assert cli.main(["doctor"]) == EXIT_ENVIRONMENT
    assert "fail     check 1        it is broken" in capsys.readouterr().out


def test_the_results_as_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_checks(monkeypatch, PASS, FAIL, SKIPPED)
    assert cli.main(["doctor", "--json"]) == EXIT_ENVIRONMENT
    data = json.loads(capsys.readouterr().out)
    assert data["passed"] is False
    assert all(row.pop("seconds") >= 0 for row in data["checks"])
    assert data["checks"] == [
        {"name": "check 0", "status": "pass", "text": "3.12", "fix": ""},
        {"name": "check 1", "status": "fail", "text": "it is broken", "fix": "mend it"},
        {"name": "check 2", "status": "skipped", "text": "not installed", "fix": "install it"},
    ]


def test_quick_trains_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    made = fake_checks(monkeypatch, PASS, PASS, FAIL)
    assert cli.main(["doctor", "--quick"]) == EXIT_OK
    assert made == ["check 0", "check 1"]
    assert {check.name for check in catalog.CHECKS if check.runs} == {"run, embedded", "run, vLLM"}
    assert cli.main(["doctor", "--fast"]) == EXIT_USAGE


# -- this machine ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["python", "packages", "locale", "memory", "disk", "shared memory", "driver", "torch"]
)
def test_this_machine_passes_what_needs_no_process(name: str) -> None:
    result = look(BY_NAME[name])
    assert result.status in ("pass", "skipped"), result


def test_what_takes_a_process_passes_here() -> None:
    """What compiles and what trains, each in the process that the command starts."""
    for name in ("triton", "run, embedded"):
        result = make(BY_NAME[name])
        assert result.status == "pass", (name, result)


# -- faults ------------------------------------------------------------------------------------


def test_packages_out_of_their_range(monkeypatch: pytest.MonkeyPatch) -> None:
    real = packages.installed
    fakes: dict[str, str | None] = {"peft": "0.99", "transformers": None}
    monkeypatch.setattr(packages, "installed", lambda name: fakes.get(name, real(name)))
    result = packages.packages()
    assert result.status == "fail"
    assert "peft 0.99 is not " in result.text
    assert "transformers is missing" in result.text
    assert "'peft<0.22,>=0.19'" in result.fix
    monkeypatch.setattr("platform.python_version", lambda: "3.10.9")
    assert packages.python().status == "fail"


def test_the_ranges_are_those_of_the_checkout_without_metadata(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    installed = packages.needs()

    def missing(name: str) -> Any:
        raise packages.metadata.PackageNotFoundError

    monkeypatch.setattr(packages.metadata, "metadata", missing)
    python, requirements = packages.needs()
    assert python == installed[0]
    assert {r.name for r in requirements} == {r.name for r in installed[1]}
    assert {"torch", "peft", "transformers"} <= {r.name for r in requirements}


def statvfs(free: int, total: int, inodes: int = 9) -> Callable[[Any], Any]:
    facts = SimpleNamespace(f_bavail=free, f_blocks=total, f_frsize=1, f_files=9, f_favail=inodes)
    return lambda path: facts


@pytest.mark.parametrize(
    ("free", "total", "fix"),
    [(60 << 20, 64 << 20, "give the machine"), (1 << 20, 8 << 30, "remove what is left there")],
)
def test_shared_memory_that_is_small_or_full(
    free: int, total: int, fix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "statvfs", statvfs(free, total))
    result = disk.shared_memory()
    assert result.status == "fail"
    assert result.fix.startswith(fix)
    assert "--shm-size" in result.fix
    monkeypatch.setattr(disk, "SHARED_MEMORY", Path("/nowhere"))
    assert disk.shared_memory().text == "there is no /nowhere"


def test_a_disk_that_is_full_or_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert disk.disk().status == "pass"
    with monkeypatch.context() as patch:
        patch.setattr(os, "statvfs", statvfs(1 << 20, 1 << 40))
        result = disk.disk()
        assert result.status == "fail"
        assert f"temporary files: {tmp_path} has 0.00 GiB free" in result.text
        assert "(TMPDIR)" in result.fix
        patch.setattr(os, "statvfs", statvfs(1 << 40, 1 << 40, inodes=0))
        assert "has no free inodes" in disk.disk().text
    (tmp_path / "file").touch()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "file"))  # as root, no folder is read-only
    result = disk.disk()
    assert result.status == "fail"
    assert "cannot be written: Not a directory" in result.text


def test_too_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory.max").write_text(str(1 << 30))
    (tmp_path / "memory.current").write_text(str(200 << 20))
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    result = machine.memory()
    assert result.status == "fail"
    assert result.text.startswith("0.8 GiB available")
    (tmp_path / "memory.max").write_text("max")
    assert machine.memory().status == "pass"


def test_a_locale_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LC_ALL", "tlh_QO.UTF-8")
    result = machine.locale()
    assert (result.status, result.fix) == ("fail", "export LC_ALL=C.UTF-8")
    assert "tlh_QO" in result.text


def test_the_hub_is_never_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "HUB_SECONDS", 0.1)
    monkeypatch.setattr(machine, "_ask_hub", lambda endpoint, answers: time.sleep(2))
    result = machine.hub()
    assert (result.status, "no answer within 0.1 s" in result.text) == ("skipped", True)
    for answer, status in (("", "pass"), ("Connection refused", "skipped")):
        monkeypatch.setattr(machine, "_ask_hub", lambda _, answers, a=answer: answers.append(a))
        assert machine.hub().status == status
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(machine, "_ask_hub", lambda endpoint, answers: 1 / 0)
    assert machine.hub().text.startswith("HF_HUB_OFFLINE is set")


def test_all_checks_name_functions_that_are_there() -> None:
    assert len(BY_NAME) == len(CHECKS)
    for check in CHECKS:
        module, _, function = check.function.partition(":")
        assert callable(getattr(import_module(module), function))
