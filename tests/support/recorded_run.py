"""A run's records of six steps, as `RunDirectory` writes them, and the facts of its checkpoints."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minidistill.reporting.records import Records, rollout_names
from minidistill.reporting.run_directory import RunDirectory

STEPS = 6
FIRST, LAST = "rollouts/step_000001.safetensors", "rollouts/step_000006.jsonl"


def train(directory: RunDirectory, first: int) -> dict[int, dict[str, Any]]:
    """Record the steps from `first` on. Returns a checkpoint's facts for each second step."""
    saved = {}
    for step in range(first, STEPS + 1):
        sums = {}
        for name in rollout_names(step):
            content = f"{name}\n".encode() * step
            (directory.path / name).write_bytes(content)
            sums[name] = hashlib.sha256(content).hexdigest()
        directory.records.add(sums)
        directory.log(step, {"loss": step / 4, "odd": float("nan")})
        if step % 2 == 0:
            saved[step] = {"step": step, "seconds": 1.5, **directory.records.flush()}
    return saved


class Run:
    """A run of six steps, with the facts of its checkpoints, as they are in `state.json`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        for name in ("checkpoints", "rollouts", "logs"):
            (path / name).mkdir(parents=True)
        directory = RunDirectory(path)
        directory.add("env.json", {"tasks": "some"})
        directory.add("baseline.json", {"rewards": {}})
        directory.log(0, {"eval": 1.0})
        self.saved = json.loads(json.dumps(train(directory, 1)))

    def disagreement(self, at: int, **changes: Any) -> str | None:
        """As a resume compares: with nothing in memory."""
        return Records(self.path).disagreement(self.saved[str(at)] | changes)

    def rewind(self, step: int) -> RunDirectory:
        directory = RunDirectory(self.path)
        directory.records.rewind(self.saved[str(step)])
        return directory

    def contents(self) -> dict[str, bytes]:
        paths = (p for p in self.path.rglob("*") if p.is_file())
        return {str(p.relative_to(self.path)): p.read_bytes() for p in paths}

    def change(self, name: str, change: Callable[[bytes], bytes | None]) -> None:
        path = self.path / name
        content = change(path.read_bytes())
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content)


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def lost(data: bytes) -> None:
    return None
