"""Runs the tests of the kernels again, on interpreted Triton kernels, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.ops_cases import INTERPRETED

FOLDER = Path(__file__).parent


@pytest.mark.skipif(INTERPRETED, reason="already inside the interpreter's process")
def test_triton_kernels_under_the_interpreter():
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"MINIDISTILL_KERNELS": "interpret", "PYTHONWARNINGS": "ignore::RuntimeWarning"}
    files = [
        str(FOLDER / f"test_ops_{name}.py")
        for name in ("rows", "linear", "distill", "head", "triton")
    ]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *files],
        env=env,
        cwd=FOLDER.parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
