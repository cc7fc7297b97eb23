"""Disk space of the folders that a run writes to, and shared memory."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from minidistill.doctor.result import Result, failed, passed
from minidistill.system.scratch import SHARED_MEMORY

GIB, MIB = 1 << 30, 1 << 20
LEAST_DISK = GIB
"""Free bytes of each folder. Checkpoints and downloads of large models take more."""
LEAST_SHARED = 256 * MIB
"""Free bytes of shared memory: vLLM's queues take 160 MiB and more, Docker's default is 64 MiB."""


def disk() -> Result:
    """The folders can be written, and have room."""
    shown, problems, fixes = [], [], []
    for name, (folder, setting) in _folders().items():
        place = next(path for path in (folder, *folder.parents) if path.exists())
        problem = _not_writable(place)
        facts = os.statvfs(place)
        free = facts.f_bavail * facts.f_frsize
        if problem is None and facts.f_files and not facts.f_favail:
            problem = f"{place} has no free inodes"
        if problem is None and not free >= LEAST_DISK:
            problem = f"{place} has {free / GIB:.2f} GiB free"
        if problem is not None:
            problems.append(f"{name}: {problem}")
            fixes.append(f"make room there, or choose another folder ({setting})")
        shown.append(f"{name} {free / GIB:.1f} GiB free in {folder}")
    if problems:
        return failed("; ".join(problems), "; ".join(dict.fromkeys(fixes)))
    return passed("; ".join(shown))


def _folders() -> dict[str, tuple[Path, str]]:
    """The folders by what they hold, and what sets each."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute()
    hub = os.environ.get("HF_HUB_CACHE")
    hub = hub or os.path.join(os.environ.get("HF_HOME") or home / "huggingface", "hub")
    kernels = os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache"
    return {
        "runs": (Path("runs").absolute(), "--output_dir"),
        "cache": (home / "minidistill", "XDG_CACHE_HOME"),
        "models": (Path(hub).expanduser().absolute(), "HF_HOME"),
        "kernels": (Path(kernels).expanduser().absolute(), "TRITON_CACHE_DIR"),
        "temporary files": (Path(os.environ.get("TMPDIR") or "/tmp").absolute(), "TMPDIR"),
    }


def _not_writable(folder: Path) -> str | None:
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
            file.flush()
    except OSError as error:
        return f"{folder} cannot be written: {error.strerror}"
    return None


def shared_memory() -> Result:
    """Processes on this machine can share memory, as those of vLLM and of several ranks do."""
    fix = "give the machine shared memory: a container with --shm-size=8g or --ipc=host"
    if not SHARED_MEMORY.is_dir():
        return failed(f"there is no {SHARED_MEMORY}", fix)
    facts = os.statvfs(SHARED_MEMORY)
    free, total = facts.f_bavail * facts.f_frsize, facts.f_blocks * facts.f_frsize
    text = f"{free / MIB:,.0f} of {total / MIB:,.0f} MiB free in {SHARED_MEMORY}"
    if not free >= LEAST_SHARED:
        full = total >= LEAST_SHARED
        return failed(text, f"remove what is left there, or {fix}" if full else fix)
    if problem := _not_writable(SHARED_MEMORY):
        return failed(problem, fix)
    return passed(text)
