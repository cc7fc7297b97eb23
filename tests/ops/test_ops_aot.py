"""The kernels compile without spilling, and the stored report is of these kernels."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.ops_cases import INTERPRETED

from minidistill_kernels import aot

ROOT = Path(__file__).parents[2]
STORED = ROOT / "bench" / "results" / "kernels_aot.json"
# What the trainer runs in bf16, recompiled here for every target.
LIVE = (
    "stats_kernel[s_ptr:fp32,x_ptr:bf16",
    "dlogits_kernel[s_ptr:fp32,x_ptr:bf16",
    "score_kernel[h_ptr:bf16",
)

pytestmark = pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")


def test_the_stored_report_is_complete_and_within_limits():
    report = json.loads(STORED.read_text())
    command = "python -m minidistill_kernels.aot bench/results/kernels_aot.json"
    assert report["source_sha256"] == aot.digest(), f"kernels changed: run {command}"
    expected = {(sm, c.name) for sm in aot.ARCHITECTURES for c in aot.configurations()}
    assert {(row["sm"], row["name"]) for row in report["kernels"]} == expected
    assert aot.failures(report["kernels"]) == []


def test_limits_bite():
    row = {"sm": 90, "name": "x", "spill_bytes": 4, "shared_bytes": 0}
    assert aot.failures([row])
    assert aot.failures([row | {"sm": 100}]) == []
    assert aot.failures([row | {"spill_bytes": 0, "shared_bytes": 1 << 20}])


def test_the_main_kernels_compile_as_stored(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT / "kernels")}
    out = tmp_path / "report.json"
    matches = [word for match in LIVE for word in ("--match", match)]
    result = subprocess.run(
        [sys.executable, "-m", "minidistill_kernels.aot", str(out), *matches],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    live, stored = json.loads(out.read_text()), json.loads(STORED.read_text())
    assert len(live["kernels"]) == 21
    # the compiler allocates registers, so only the same version gives the same numbers
    if live["triton"] == stored["triton"]:
        assert all(row in stored["kernels"] for row in live["kernels"])
