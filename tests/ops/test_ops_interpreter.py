"""Runs the tests of the kernels again in a subprocess, on interpreted Triton kernels."""

import os
import subprocess
import sys

import pytest
from support.ops_cases import INTERPRETED
from support.paths import ROOT, TESTS


@pytest.mark.skipif(INTERPRETED, reason="this is the subprocess with interpreted kernels")
def test_triton_kernels_under_the_interpreter():
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"MINIDISTILL_KERNELS": "interpret", "PYTHONWARNINGS": "ignore::RuntimeWarning"}
    files = [
        str(TESTS / "ops" / f"test_ops_{name}.py")
        for name in ("rows", "linear", "distill", "head", "triton", "gpu")
    ]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *files],
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
