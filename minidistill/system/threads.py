"""The cores and threads of a run's processes, decided once for all of them."""

from __future__ import annotations

import os
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


def settle_threads() -> None:
    """Set what OpenMP and the tokenizers read when they are loaded, unless it is set already.

    Subprocesses inherit it. A container's share of the machine is no concern of OpenMP, which
    starts a thread for each of the machine's cores: they would stop each other.
    """
    # idle threads that spin make a busy machine many times slower (docs/decisions/0005)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    # a prompt is short, and a process that forks must have no such threads
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if usable_cores() < _allowed():
        os.environ.setdefault("OMP_NUM_THREADS", str(usable_cores()))


def before_torch() -> None:
    """What everything that loads torch does first. It loads torch."""
    settle_threads()
    # interpreted kernels have to be asked for before transformers imports triton
    import minidistill_kernels  # noqa: F401


def usable_cores() -> int:
    """The cores that this process may use: those it may run on, within its container's share."""
    return max(1, min(_allowed(), _share()))


def _allowed() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS


def _share() -> int:
    """The cores' worth of time that the container has, rounded up; many without a limit."""
    try:
        quota, period = (CGROUPS / "cpu.max").read_text().split()
        return -(-int(quota) // int(period))
    except (OSError, ValueError):  # no limit ("max"), or not Linux's cgroups of version 2
        return 1 << 16
