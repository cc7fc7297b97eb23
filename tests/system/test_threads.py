"""Threads are decided once, from the cores that a process may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from minidistill.system import threads

NAMES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "TOKENIZERS_PARALLELISM")


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Eight cores, no limit, nothing set."""
    monkeypatch.setattr(threads, "CGROUPS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("limit", "cores"),
    [
        ("max 100000", 8),
        ("250000 100000", 3),
        ("100000 100000", 1),
        ("10000 100000", 1),
        ("9900000 100000", 8),
        ("unreadable", 8),
    ],
)
def test_a_containers_share_bounds_the_cores(tmp_path: Path, limit: str, cores: int) -> None:
    (tmp_path / "cpu.max").write_text(limit)
    assert threads.usable_cores() == cores
    threads.settle_threads()
    # without a limit OpenMP counts the cores itself
    assert os.environ.get("OMP_NUM_THREADS") == (None if cores == 8 else str(cores))


def test_what_is_set_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("200000 100000")
    for name in NAMES:
        monkeypatch.setenv(name, "5")
    threads.settle_threads()
    assert {os.environ[name] for name in NAMES} == {"5"}
