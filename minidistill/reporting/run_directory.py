"""A run's directory: which files it holds, and how they survive a crash."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import platform
import shutil
import sys
from collections.abc import Mapping
from datetime import datetime
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError, field_validator

from minidistill.config import LoadedConfig
from minidistill.errors import EXIT_ENVIRONMENT, UserError
from minidistill.reporting.records import METRICS, SUMS, Records, first_problem
from minidistill.system.files import read_json, remove, write_atomic
from minidistill.system.run_folders import SETTINGS
from minidistill.types import Metrics

RECORDED_PACKAGES = ("minidistill", "torch", "triton", "transformers", "peft", "vllm", "numpy")
RESOLVED = "config.resolved.json"
"""The last file that a start writes. It makes a directory a run."""
SCOREBOARD = "scoreboard.json"
"""What a run has reached; the last file of all."""
FOLDERS = ("checkpoints", "rollouts", "logs")
FIRST_FILES = (SETTINGS, "env.json", SUMS)
"""What a start writes before `RESOLVED`, after the folders."""
WRITTEN = (
    *FOLDERS,
    "logs/run.log",
    METRICS,
    SUMS,
    "adapter",
    "model",
    "sync",
    "wandb",
    "tensorboard",
)
"""What a run writes in place. Other files are replaced, so that a link there is not followed."""
MONITORS_AND_GUARDS = "wandb", "tensorboard", "trackio", "health."
"""What settings begin with that a resumed run may change."""
RESTORE = "restore it from a copy, or start a new run with another --output_dir"


class RunDirectory:
    """Writes a run's files, and reads them. `records` has what the run has recorded so far."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records = Records(path)

    @property
    def log_path(self) -> Path:
        return self.path / "logs" / "run.log"

    def create(self, loaded: LoadedConfig, facts: Mapping[str, Any]) -> None:
        """Make the directory; write the configuration and the environment it runs in.

        Nothing is left of it if that fails.
        """
        try:
            try:
                for name in FOLDERS:
                    (self.path / name).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise not_writable(loaded, self.path, error) from error
            write_atomic(self.path / SETTINGS, loaded.text)
            self.add("env.json", {**environment_facts(), **facts})
            # Last, because this file makes the directory a run.
            write_atomic(self.path / RESOLVED, _json(loaded.resolved()))
        except BaseException:
            with contextlib.suppress(OSError):
                clear_unbegun(self.path)
            raise

    def extend(self, loaded: LoadedConfig) -> None:
        """Record the configuration of a run that goes on for more steps than it was started with.

        It is no longer finished, so its report and its scoreboard are removed, first.
        """
        for name in ("report.html", SCOREBOARD):
            remove(self.path / name)
        write_atomic(self.path / SETTINGS, loaded.text)
        write_atomic(self.path / RESOLVED, _json(loaded.resolved()))

    def resolved(self) -> Any:
        """The configuration that the run was started with, or extended to."""
        return self.read(RESOLVED, _Resolved)

    def changed_settings(self, loaded: LoadedConfig) -> dict[str, tuple[Any, Any]]:
        """The settings that differ from those that the run was started with: before and now.

        Left out are those on which the metrics do not depend, and defaults of settings that did
        not exist when the run was started.
        """
        before = _flatten(_without_time_limits(self.resolved()))
        now = _flatten(_without_time_limits(loaded.resolved()))
        ignored = {"output_dir", "trainer_gpu_ids", "trainer.world_size", "trainer.shard"}
        # A run that passed this limit, or that a guard stopped, goes on with another.
        ignored.add("orchestrator.max_env_error_frac")
        ignored |= {key for key in {*before, *now} if key.startswith(MONITORS_AND_GUARDS)}
        # they decide how many steps are done, and not what a step is
        ignored |= {key for key in {*before, *now} if key.startswith("early_stopping")}
        if now.get("ckpt.best") is None:  # the checkpoints of another choice may have gone
            ignored.add("ckpt.best")
        ignored |= {k for k in now if k not in before and loaded.provenance.get(k) == "default"}
        return {
            key: (before.get(key), now.get(key))
            for key in {*before, *now} - ignored
            if before.get(key) != now.get(key)
        }

    def check_same_tasks(self, fingerprint: str) -> None:
        """Raise UserError if a resumed run has other tasks or prompts than the original one."""
        before = self._facts().get("tasks", fingerprint)
        if before != fingerprint:
            raise UserError(
                f"the run in {self.path} was started with other tasks or prompts",
                where="orchestrator.env, orchestrator.eval.env, model.name, "
                "orchestrator.teacher_model.context",
                fix="restore the files that define them (tasks, context, chat template), "
                "or start a new run with another --output_dir",
            )

    def check_same_adapter(self, digest: str | None) -> None:
        """Raise UserError if a resumed run would start from another adapter than it did."""
        before = self._facts().get("initial_adapter", digest)
        if before != digest:
            raise UserError(
                f"the run in {self.path} was started from an adapter that has changed since",
                where="trainer.model.lora.init",
                fix="restore that adapter, or start a new run with another --output_dir",
            )

    def began(self) -> datetime | None:
        """The date and time that the run's prompts show, if they show one."""
        began = self._facts().get("began")
        return None if began is None else datetime.fromisoformat(began)

    def _facts(self) -> dict[str, Any]:
        facts: dict[str, Any] | None = self.read("env.json", _Facts)
        if facts is None:
            raise damaged(self.path / "env.json", "it is missing")
        return facts

    def log(self, step: int, metrics: Metrics) -> None:
        """Append a record to `metrics.jsonl`. Values that are not finite become null."""
        values = {k: finite(v) for k, v in metrics.items()}
        self.records.metrics.append(json.dumps({"step": step, **values}) + "\n")

    def column(self, name: str) -> dict[int, float]:
        """A metric's values by step, of the records that have it."""
        return {r["step"]: r[name] for r in self.records.all() if r.get(name) is not None}

    def has(self, step: int, metric: str) -> bool:
        """Whether a record of the step has a metric."""
        return any(r["step"] == step and metric in r for r in self.records.all())

    def read(self, name: str, shape: type[BaseModel] | None = None, fix: str = RESTORE) -> Any:
        """The content of a JSON file of the run, an object; None if it does not exist yet.

        Raises UserError (exit code 3) with `fix` for a damaged file, or one of another shape.
        """
        path = self.path / name
        if not os.path.lexists(path):
            return None
        if not path.is_file():
            raise damaged(path, "it is not a file", fix)
        try:
            value = read_json(path)
            if not isinstance(value, dict):
                raise damaged(path, "it is not a JSON object", fix)
            if shape is not None:
                shape.model_validate(value)
        except ValidationError as error:
            raise damaged(path, first_problem(error), fix) from None
        except UserError as error:
            if error.exit_code == EXIT_ENVIRONMENT:
                raise
            raise damaged(path, error.what, fix, error.where) from None
        return value

    def write(self, name: str, value: Any) -> None:
        write_atomic(self.path / name, _json(value))

    def add(self, name: str, value: Any) -> None:
        """Write a file that does not change again, and list it among the run's records."""
        text = _json(value)
        write_atomic(self.path / name, text)
        self.records.add({name: sha256(text.encode()).hexdigest()})


class _Facts(BaseModel, strict=True):
    """What a resumed run reads of `env.json`. Older versions wrote less."""

    tasks: str | None = None
    initial_adapter: str | None = None
    began: str | None = None

    @field_validator("began")
    @classmethod
    def _is_a_date(cls, value: str | None) -> str | None:
        if value is not None:
            datetime.fromisoformat(value)
        return value


class _Environments(BaseModel, strict=True):
    env: list[dict[str, Any]] | None = None


class _Orchestrator(_Environments, strict=True):
    eval: _Environments | None = None


class _Model(BaseModel, strict=True):
    lora: dict[str, Any] | Literal[False]


class _Trainer(BaseModel, strict=True):
    model: _Model


class _Resolved(BaseModel, strict=True):
    """What is read of `config.resolved.json` besides comparing it."""

    max_steps: int
    orchestrator: _Orchestrator
    trainer: _Trainer


def damaged(path: Path, reason: str, fix: str = RESTORE, where: str = "") -> UserError:
    """The error for a file of the run that cannot be used."""
    return UserError(f"{path} is damaged: {reason}", where or str(path), fix, EXIT_ENVIRONMENT)


def not_writable(loaded: LoadedConfig, path: Path, error: OSError) -> UserError:
    place = "" if error.filename in (None, str(path)) else f"{error.filename}: "
    what = f"{path} cannot be written: {place}{error.strerror or error}"
    where = loaded.provenance.get("output_dir", "output_dir")
    return UserError(what, where, "choose another --output_dir")


def is_of_a_start(child: Path) -> bool:
    """Whether a start may have made it before it wrote the file that makes a directory a run."""
    if child.is_symlink():
        return False
    if child.is_dir():
        contents = {file.name for file in child.iterdir()}
        return child.name == "sync" or (child.name in FOLDERS and contents <= {"run.log"})
    is_temporary = child.suffix == ".tmp" and any(n in child.name for n in (*FIRST_FILES, RESOLVED))
    return child.name in FIRST_FILES or is_temporary


def clear_unbegun(path: Path) -> None:
    """Remove what a start left that was cut off before it made the directory a run."""
    if (path / RESOLVED).exists():
        return
    # files first, as they tell such a directory from others only beside its folders
    for child in sorted(path.iterdir(), key=lambda child: child.is_dir()):
        if is_of_a_start(child):
            shutil.rmtree(child) if child.is_dir() else child.unlink()


def environment_facts() -> dict[str, Any]:
    """Versions and hardware, for `env.json`."""
    import torch

    versions = {}
    for package in RECORDED_PACKAGES:
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
    """The value, or None for NaN and infinity, which JSON does not have."""
    return value if math.isfinite(value) else None


def _json(value: Any) -> str:
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    return text.encode(errors="backslashreplace").decode()  # lone surrogates as JSON's escapes


def _without_time_limits(resolved: dict[str, Any]) -> dict[str, Any]:
    """A copy without `silence` and the environments' `score_timeout`, which decide what fails."""
    resolved = copy.deepcopy(resolved)
    resolved.pop("silence", None)
    orchestrator = resolved["orchestrator"]
    for table in (orchestrator, orchestrator.get("eval") or {}):
        for env in table.get("env") or ():
            env.pop("score_timeout", None)
    return resolved


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flatten(item, f"{prefix}.{key}" if prefix else key)
    return flat
