"""A run's directory: what is written where, and how it survives a crash."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import re
import sys
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from minidistill.config import LoadedConfig
from minidistill.errors import UserError
from minidistill.files import write_atomic, writing
from minidistill.types import Metrics

PACKAGES = ("minidistill", "torch", "triton", "transformers", "peft", "vllm", "numpy")


def choose_path(loaded: LoadedConfig, resume: bool) -> Path:
    """Where the run lives: `output_dir`, or `runs/<name of the first file>` with a number.

    Without `output_dir`, `resume` takes the newest such directory. Raises UserError for a
    directory that holds a run already (unless resuming), holds none (resuming), or can't be
    written to.
    """
    given = loaded.config.output_dir
    name = loaded.files[0].stem if loaded.files else "run"
    if given is not None:
        path = Path(given).expanduser()
    else:
        beside = Path("runs").iterdir() if Path("runs").is_dir() else ()
        taken = [p for p in beside if _number(p.name, name) is not None]
        taken.sort(key=lambda p: _number(p.name, name) or 0)
        last = _number(taken[-1].name, name) if taken else 0
        path = taken[-1] if resume and taken else Path("runs") / _numbered(name, (last or 0) + 1)
    where = loaded.provenance.get("output_dir", "output_dir")
    holds_run = os.path.exists(path / "config.resolved.json")
    if resume and not holds_run:
        fix = "check --output_dir, or leave --resume out"
        raise UserError(f"there is no run to resume in {path}", where, fix)
    fix = "choose another --output_dir"
    if holds_run and not resume:
        raise UserError(f"{path} holds a run already", where, f"{fix}, or go on with --resume")
    parent = next(p for p in (path, *path.absolute().parents) if os.path.exists(p))
    if not (parent.is_dir() and os.access(parent, os.R_OK | os.W_OK | os.X_OK)):
        what = f"{path} cannot be written: {parent} is not a writable directory"
        raise UserError(what, where, fix)
    if not resume and parent == path and any(path.iterdir()):
        raise UserError(f"{path} exists and is not empty", where, fix)
    return path


def _number(directory: str, name: str) -> int | None:
    if directory == name:
        return 1
    found = re.fullmatch(re.escape(name) + "-([0-9]+)", directory)
    return int(found[1]) if found else None


def _numbered(name: str, number: int) -> str:
    return name if number == 1 else f"{name}-{number}"


class RunDir:
    """Writes a run's files. `metrics.jsonl` grows by one line a record."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    def create(self, loaded: LoadedConfig, facts: Mapping[str, Any]) -> None:
        """Make the directory and write what the run is made of."""
        try:
            for name in ("checkpoints", "rollouts", "logs"):
                (self.path / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            what = f"{self.path} cannot be written: {error.strerror}"
            where = loaded.provenance.get("output_dir", "output_dir")
            raise UserError(what, where, "choose another --output_dir") from error
        write_atomic(self.path / "config.toml", loaded.text)
        write_atomic(self.path / "env.json", _json({**machine(), **facts}))
        # last: the file that makes a directory a run
        write_atomic(self.path / "config.resolved.json", _json(loaded.resolved()))

    def check_same(self, loaded: LoadedConfig) -> None:
        """Raise UserError where a resumed run would go on under another configuration."""
        before = _flat(self.read("config.resolved.json"))
        now = _flat(loaded.resolved())
        # the metrics do not depend on these
        free = {"output_dir", "trainer_gpu_ids", "trainer.world_size", "trainer.shard"}
        free |= {key for key in {*before, *now} if key.startswith("wandb")}
        changed = sorted(k for k in {*before, *now} - free if before.get(k) != now.get(k))
        if changed:
            shown = ", ".join(
                f"{k} (was {before.get(k)!r}, now {now.get(k)!r})" for k in changed[:4]
            )
            raise UserError(
                f"the run in {self.path} was started with other settings: {shown}",
                where=loaded.provenance.get(changed[0], changed[0]),
                fix="resume with the same settings, or start a new run with another --output_dir",
            )

    def check_tasks(self, fingerprint: str) -> None:
        """Raise UserError where a resumed run would go on with other tasks or prompts."""
        before = (self.read("env.json") or {}).get("tasks", fingerprint)
        if before != fingerprint:
            raise UserError(
                f"the run in {self.path} was started with other tasks or prompts",
                where="orchestrator.env, orchestrator.teacher_model.context, model.name",
                fix="put back the files that they come from (tasks, context, chat template), "
                "or start a new run with another --output_dir",
            )

    def log(self, step: int, metrics: Metrics) -> None:
        """Append a record. Figures that are no numbers become null."""
        clean = {k: finite(v) for k, v in metrics.items()}
        with writing(self.metrics_path), open(self.metrics_path, "a") as file:
            file.write(json.dumps({"step": step, **clean}) + "\n")

    def note(self, text: str) -> None:
        """Add a line to logs/run.log. What can't be noted is not worth a run."""
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        with contextlib.suppress(OSError), open(self.path / "logs" / "run.log", "a") as file:
            file.write(f"{stamp}  {text}\n")

    def lines(self) -> int:
        """Whole records so far."""
        with contextlib.suppress(FileNotFoundError):
            return self.metrics_path.read_bytes().count(b"\n")
        return 0

    def column(self, name: str) -> list[float]:
        """A metric's values over the records that have it."""
        records = map(json.loads, self.metrics_path.read_bytes().splitlines()[: self.lines()])
        return [r[name] for r in records if r.get(name) is not None]

    def truncate(self, lines: int) -> None:
        """Keep the first `lines` records: what came after the resumed checkpoint is done again."""
        kept = b""
        with contextlib.suppress(FileNotFoundError):
            # a writer that was killed may have left half a line
            whole = self.metrics_path.read_bytes().splitlines(keepends=True)[: self.lines()]
            kept = b"".join(whole[:lines])
        write_atomic(self.metrics_path, kept)

    def read(self, name: str) -> Any:
        """A JSON file of the run, or None where it is not there yet."""
        path = self.path / name
        return json.loads(path.read_bytes()) if path.exists() else None

    def write(self, name: str, value: Any) -> None:
        write_atomic(self.path / name, _json(value))

    def clear_rollouts_after(self, step: int) -> None:
        """Remove later steps' rollouts, and what a killed writer left aside."""
        for file in (self.path / "rollouts").glob("step_*"):
            number = file.name.removeprefix("step_").partition(".")[0]
            if file.suffix == ".tmp" or int(number) > step:
                file.unlink()


def machine() -> dict[str, Any]:
    """Versions and hardware, for the record."""
    import torch

    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        "gpus": gpus,
        "cpu_threads": torch.get_num_threads(),
        "argv": sys.argv[1:],
    }


def finite(value: float) -> float | None:
    """The value, None where it is no number: JSON knows neither NaN nor infinity."""
    return value if math.isfinite(value) else None


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{prefix}.{key}" if prefix else key)
    return flat
