"""GPU tests run on every machine: see support/gpus.py."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from support.paths import TESTS

FILES = sorted(path for path in TESTS.rglob("test_*.py") if "mark.gpu" in path.read_text())
# TWO_GPUS of support/gpus.py, which also skips on one GPU, rehearses without any
SKIPS = re.compile(r"skipif\((?:[^()]|\([^()]*\))*cuda", re.S)


def test_there_are_gpu_tests() -> None:
    assert {"test_ops_gpu.py", "test_vllm_gpu.py", "test_ranks_gpu.py"} <= {p.name for p in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_gpu_test_is_skipped_without_a_gpu(path: Path) -> None:
    assert not SKIPS.search(path.read_text()), "use support.gpus: DEVICE, size, TWO_GPUS"


def test_other_tests_see_no_gpu() -> None:
    assert not torch.cuda.is_available()
    assert torch.cuda.device_count() == 0
