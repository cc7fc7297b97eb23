"""`python -m bench.gpu_check`: every check rehearsed, and what becomes of checks that go wrong."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.forked import ForkedPopen
from support.paths import ROOT

from bench import gpu_check
from bench.checks.report import Findings, Setting
from minidistill.placement.vllm_version import installed

BY_NAME = {check.name: check for check in gpu_check.CHECKS}


BARE = [check.name for check in gpu_check.CHECKS if not check.needs]
ABSENT = ("pydantic", "tomli", "tomli_w", "vllm")  # on a bare machine


@dataclass(frozen=True)
class Rehearsal:
    """The exit codes and results of all checks."""

    bare: subprocess.CompletedProcess[str]
    code: int
    folder: Path


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> Rehearsal:
    """The kernels' checks on a machine that lacks packages, and the others in this process."""
    folder, blocked = (tmp_path_factory.mktemp(name) for name in ("rehearsal", "blocked"))
    for name in ABSENT:
        (blocked / f"{name}.py").write_text(f"raise ModuleNotFoundError('no {name}')\n")
    paths = map(str, (blocked, ROOT, ROOT / "kernels"))
    options = ["--rehearse", "--out", str(folder), "--only"]
    bare = subprocess.run(
        [sys.executable, "-m", "bench.gpu_check", *options, *BARE],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:  # what they start is forked
        for module in ("kernels", "runs"):
            patch.setattr(f"bench.checks.{module}.Popen", ForkedPopen)
        code = gpu_check.main([*options, *(name for name in BY_NAME if name not in BARE)])
    return Rehearsal(bare, code, folder)


def test_the_kernels_need_nothing_that_a_bare_machine_lacks(rehearsal: Rehearsal) -> None:
    assert BARE == ["ops", "products", "speed", "handles"]
    assert rehearsal.bare.returncode == 0, rehearsal.bare.stdout + rehearsal.bare.stderr


@pytest.mark.parametrize("check", gpu_check.CHECKS, ids=lambda check: check.name)
def test_a_check_runs_its_code_on_a_cpu(rehearsal: Rehearsal, check: gpu_check.Check) -> None:
    result = json.loads((rehearsal.folder / check.file).read_text())
    without_vllm = "vllm" in check.needs and installed() is None
    assert result["status"] == ("skipped" if without_vllm else "pass"), result
    assert result["rehearsal"]
    assert result["device"] == "CPU"
    assert without_vllm or any(limit["held"] for limit in result["limits"])


def test_a_rehearsal_passes_and_sums_up(rehearsal: Rehearsal) -> None:
    assert rehearsal.code == 0
    summary = json.loads((rehearsal.folder / "summary.json").read_text())
    assert [c["name"] for c in summary["checks"]] == [n for n in BY_NAME if n not in BARE]
    assert summary["versions"]["torch"]
    assert len(summary["source_sha256"]) == 64


def test_an_error_in_a_checks_process_is_its_result(tmp_path: Path) -> None:
    """Without a GPU the check fails in its process. The one that waits for it goes on."""
    result = gpu_check.perform(BY_NAME["products"], Setting(False, tmp_path), 60)
    assert result["status"] == "error"
    assert "CUDA" in result["message"] or "NVIDIA" in result["message"]


def test_a_check_that_hangs_is_ended(tmp_path: Path) -> None:
    check, setting = BY_NAME["products"], Setting(True, tmp_path)
    findings = Findings(tmp_path / check.file, gpu_check.about(check, setting), True)
    findings.figure("known so far", 3)
    gpu_check.in_a_process(check, setting, 0.1, findings)
    result = json.loads((tmp_path / check.file).read_text())
    assert (result["status"], result["message"]) == ("error", "ended after 0 s")
    assert result["figures"] == {"known so far": 3}


def test_no_check_starts_after_the_minutes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--rehearse", "--out", str(tmp_path), "--minutes", "0", "--only", "speed", "full"]
    assert gpu_check.main(argv) == 1
    assert "not run: speed, full" in capsys.readouterr().out
    assert json.loads((tmp_path / "03_speed.json").read_text())["status"] == "not run"


@pytest.mark.parametrize("interrupt", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_check_keeps_what_it_had(tmp_path: Path, interrupt: int) -> None:
    """Ctrl-C and SIGTERM: the check's file says so, and the summary has it."""
    code = """
import os, runpy, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits it ignored
from bench.checks import kernels
def products(setting, findings):
    findings.figure("known so far", 3)
    print("ready", flush=True)
    time.sleep(60)
kernels.products = products
sys.argv[1:] = ["--rehearse", "--out", sys.argv[1], "--only", "products", "speed"]
runpy.run_module("bench.gpu_check", run_name="__main__")
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(interrupt)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    result = json.loads((tmp_path / BY_NAME["products"].file).read_text())
    assert (result["status"], result["message"]) == ("error", "interrupted")
    assert result["figures"] == {"known so far": 3}
    assert json.loads((tmp_path / "summary.json").read_text())["checks"] == [result]
    assert not (tmp_path / BY_NAME["speed"].file).exists()


def test_a_folder_that_cannot_be_written_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "folder"):
        assert gpu_check.main(["--rehearse", "--out", str(out)]) == 2
        assert f"cannot write to {out}" in capsys.readouterr().err


def test_minutes_that_bound_nothing_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        gpu_check.main(["--rehearse", "--out", str(tmp_path), "--minutes", "nan"])
    assert caught.value.code == 2
    assert "--minutes" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


def test_a_machine_without_a_gpu_is_refused(tmp_path: Path) -> None:
    assert gpu_check.main(["--out", str(tmp_path)]) == 3


@pytest.fixture
def findings(tmp_path: Path) -> Findings:
    return Findings(tmp_path / "x.json", {"name": "x"}, False)


@pytest.mark.parametrize("value", [math.nan, 2.0])
def test_a_missed_limit_fails(findings: Findings, value: float) -> None:
    findings.at_most("error", value, 1.0)
    assert findings.finish() == "fail"


@pytest.mark.parametrize("value", [math.nan, 0.5])
def test_a_goal_that_is_not_reached_fails(findings: Findings, value: float) -> None:
    findings.at_least("share", value, 1.0)
    assert findings.finish() == "fail"


def test_a_check_without_limits_fails(findings: Findings) -> None:
    findings.figure("seconds", 1.0)
    assert findings.finish() == "fail"


def test_speed_is_not_judged_in_a_rehearsal(tmp_path: Path) -> None:
    findings = Findings(tmp_path / "x.json", {}, rehearse=True)
    findings.at_most("ms", 9.0, 1.0, gpu_only=True)
    findings.at_most("error", 0.5, 1.0)
    assert findings.finish() == "pass"
    assert [limit["held"] for limit in findings.limits] == [None, True]


def test_figures_are_on_disk_before_a_check_ends(findings: Findings) -> None:
    findings.figure("first", 1)
    saved: dict[str, Any] = json.loads(findings.path.read_text())
    assert (saved["status"], saved["figures"]) == ("running", {"first": 1})
