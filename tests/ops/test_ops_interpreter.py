"""The same tests once more with the Triton kernels, interpreted, in a process of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.ops_cases import INTERPRETED

HERE = Path(__file__).parent


@pytest.mark.skipif(INTERPRETED, reason="already inside the interpreter's process")
def test_triton_kernels_under_the_interpreter():
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"MINIDISTILL_KERNELS": "interpret", "PYTHONWARNINGS": "ignore::RuntimeWarning"}
    files = [
        str(HERE / f"test_ops_{name}.py")
        for name in ("rows", "linear", "distill", "head", "triton")
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *files],
        env=env, cwd=HERE.parents[1], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
