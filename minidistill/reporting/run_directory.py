"""A run's directory: which files it holds, and how they survive a crash."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import platform
import re
import sys
from collections.abc import Iterator, Mapping
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from minidistill.config import LoadedConfig
from minidistill.errors import UserError
from minidistill.files import write_atomic, writing
from minidistill.reporting.run_lock import LOCK, LockedError, locked
from minidistill.types import Metrics

RECORDED_PACKAGES = ("minidistill", "torch", "triton", "transformers", "peft", "vllm", "numpy")


@contextlib.contextmanager
def claim_path(loaded: LoadedConfig, resume: bool) -> Iterator[Path]:
    """Where the run lives, see `choose_path`, which no other run uses until the end.

    A number that another run has just taken is passed over. Raises UserError for a directory that
    is in use, and as `choose_path` does.
    """
    number = 0
    with contextlib.ExitStack() as stack:
        while True:
            path = choose_path(loaded, resume, above=number)
            try:
                stack.enter_context(locked(path))
            except LockedError as error:
                if resume or loaded.config.output_dir is not None:
                    raise UserError(
                        f"{path} is in use by another run ({error})",
                        where=loaded.provenance.get("output_dir", "output_dir"),
                        fix="wait until that has ended, or choose another --output_dir",
                    ) from None
                number = max(number, _run_number(path.name, _name(loaded)) or 0)
            except OSError as error:
                raise _not_writable(loaded, path, error) from error
            else:
                break
        choose_path(loaded, resume, above=number)  # a run may have ended there meanwhile
        yield path


def choose_path(loaded: LoadedConfig, resume: bool, above: int = 0) -> Path:
    """Where the run lives: `output_dir`, or `runs/NAME` with NAME from the first file.

    Without `output_dir` a new run gets the next free number (`runs/NAME-2`) `above` a given one,
    and `resume` takes the newest run. Raises UserError if the directory holds a run already (unless
    resuming), holds none (when resuming), or cannot be written.
    """
    output_dir = loaded.config.output_dir
    where = loaded.provenance.get("output_dir", "output_dir")
    if output_dir is not None:
        path = Path(output_dir).expanduser()
    else:
        path = _runs_path(loaded, resume, above)
    holds_run = os.path.exists(path / "config.resolved.json")
    if resume and not holds_run:
        fix = "check --output_dir, or leave out --resume"
        raise UserError(f"there is no run to resume in {path}", where, fix)
    fix = "choose another --output_dir"
    if holds_run and not resume:
        raise UserError(f"{path} already holds a run", where, f"{fix}, or continue with --resume")
    ancestor = next(p for p in (path, *path.absolute().parents) if os.path.exists(p))
    if not (ancestor.is_dir() and os.access(ancestor, os.R_OK | os.W_OK | os.X_OK)):
        what = f"{path} cannot be written: {ancestor} is not a writable directory"
        raise UserError(what, where, fix)
    if not resume and ancestor == path and _is_used(path):
        raise UserError(f"{path} exists and is not empty", where, fix)
    return path


def _name(loaded: LoadedConfig) -> str:
    return loaded.files[0].stem if loaded.files else "run"


def _is_used(path: Path) -> bool:
    """Whether a directory holds anything but the lock of a run that has not begun."""
    try:
        return any(child.name != LOCK for child in path.iterdir())
    except FileNotFoundError:  # another run has just given it up
        return False
    except OSError:  # somebody else's
        return True


def _runs_path(loaded: LoadedConfig, resume: bool, above: int) -> Path:
    """The newest `runs/NAME-N` when resuming, else the next one."""
    runs = Path("runs")
    name = _name(loaded)
    # a directory that holds nothing is one of a run that has not begun, or was killed before
    paths = runs.iterdir() if runs.is_dir() else ()
    numbered = {n: path for path in paths if (n := _run_number(path.name, name)) is not None}
    by_number = {n: path for n, path in numbered.items() if not path.is_dir() or _is_used(path)}
    newest = max(by_number, default=0)
    if resume and by_number:
        return by_number[newest]
    newest = max(newest, above)
    return runs / (name if newest == 0 else f"{name}-{newest + 1}")


def _not_writable(loaded: LoadedConfig, path: Path, error: OSError) -> UserError:
    what = f"{path} cannot be written: {error.strerror or error}"
    where = loaded.provenance.get("output_dir", "output_dir")
    return UserError(what, where, "choose another --output_dir")


def _run_number(directory: str, name: str) -> int | None:
    """1 for `name`, N for `name-N`, None for the directories of other runs."""
    if directory == name:
        return 1
    match = re.fullmatch(re.escape(name) + "-([0-9]+)", directory)
    return int(match[1]) if match else None


class RunDirectory:
    """Writes a run's files. `metrics.jsonl` grows by one line per record."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def log_path(self) -> Path:
        return self.path / "logs" / "run.log"

    def create(self, loaded: LoadedConfig, facts: Mapping[str, Any]) -> None:
        """Make the directory; write the configuration and the environment it runs in."""
        try:
            for name in ("checkpoints", "rollouts", "logs"):
                (self.path / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _not_writable(loaded, self.path, error) from error
        write_atomic(self.path / "config.toml", loaded.text)
        write_atomic(self.path / "env.json", _json({**environment_facts(), **facts}))
        # Last, because this file makes the directory a run.
        write_atomic(self.path / "config.resolved.json", _json(loaded.resolved()))

    def extend(self, loaded: LoadedConfig) -> None:
        """Record the configuration of a run that goes on for more steps than it was started with.

        It is no longer finished, so its report and its scoreboard are removed, first.
        """
        for name in ("report.html", "scoreboard.json"):
            (self.path / name).unlink(missing_ok=True)
        write_atomic(self.path / "config.toml", loaded.text)
        write_atomic(self.path / "config.resolved.json", _json(loaded.resolved()))

    def changed_settings(self, loaded: LoadedConfig) -> dict[str, tuple[Any, Any]]:
        """The settings that differ from those that the run was started with: before and now.

        Left out are those on which the metrics do not depend, and defaults of settings that did
        not exist when the run was started.
        """
        before = _flatten(_without_time_limits(self.read("config.resolved.json")))
        now = _flatten(_without_time_limits(loaded.resolved()))
        ignored = {"output_dir", "trainer_gpu_ids", "trainer.world_size", "trainer.shard"}
        # A run that passed this limit, or that a guard stopped, goes on with another.
        ignored.add("orchestrator.max_env_error_frac")
        ignored |= {key for key in {*before, *now} if key.startswith(("wandb", "health."))}
        ignored |= {k for k in now if k not in before and loaded.provenance.get(k) == "default"}
        return {
            key: (before.get(key), now.get(key))
            for key in {*before, *now} - ignored
            if before.get(key) != now.get(key)
        }

    def check_same_tasks(self, fingerprint: str) -> None:
        """Raise UserError if a resumed run has other tasks or prompts than the original one."""
        before = (self.read("env.json") or {}).get("tasks", fingerprint)
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
        before = (self.read("env.json") or {}).get("initial_adapter", digest)
        if before != digest:
            raise UserError(
                f"the run in {self.path} was started from an adapter that has changed since",
                where="trainer.model.lora.init",
                fix="restore that adapter, or start a new run with another --output_dir",
            )

    def began(self) -> datetime | None:
        """The date and time that the run's prompts show, if they show one."""
        began = (self.read("env.json") or {}).get("began")
        return None if began is None else datetime.fromisoformat(began)

    def log(self, step: int, metrics: Metrics) -> None:
        """Append a record. Values that are not finite become null."""
        values = {k: finite(v) for k, v in metrics.items()}
        with writing(self.metrics_path), open(self.metrics_path, "a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    def lines(self) -> int:
        """The number of complete records."""
        with contextlib.suppress(FileNotFoundError):
            return self.metrics_path.read_bytes().count(b"\n")
        return 0

    def column(self, name: str) -> dict[int, float]:
        """A metric's values by step, of the records that have it."""
        records = map(json.loads, self.metrics_path.read_bytes().splitlines()[: self.lines()])
        return {r["step"]: r[name] for r in records if r.get(name) is not None}

    def has(self, step: int, metric: str) -> bool:
        """Whether a record of the step has a metric."""
        records = map(json.loads, self.metrics_path.read_bytes().splitlines()[: self.lines()])
        return any(record["step"] == step and metric in record for record in records)

    def records(self) -> Iterator[dict[str, Any]]:
        """The complete records, in order."""
        if self.lines():
            lines = self.metrics_path.read_bytes().splitlines()[: self.lines()]
            yield from map(json.loads, lines)

    def truncate(self, lines: int) -> None:
        """Keep the first `lines` records. A resumed run repeats those after its checkpoint."""
        kept = b""
        with contextlib.suppress(FileNotFoundError):
            # A writer that was killed may have left half a line.
            complete = self.metrics_path.read_bytes().splitlines(keepends=True)[: self.lines()]
            kept = b"".join(complete[:lines])
        write_atomic(self.metrics_path, kept)

    def read(self, name: str) -> Any:
        """The content of a JSON file of the run, or None if it does not exist yet."""
        path = self.path / name
        return json.loads(path.read_bytes()) if path.exists() else None

    def write(self, name: str, value: Any) -> None:
        write_atomic(self.path / name, _json(value))

    def clear_rollouts_after(self, step: int) -> None:
        """Remove the rollouts of later steps, and temporary files of a writer that was killed."""
        for file in (self.path / "rollouts").glob("step_*"):
            number = file.name.removeprefix("step_").partition(".")[0]
            if file.suffix == ".tmp" or int(number) > step:
                file.unlink()


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
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _without_time_limits(resolved: dict[str, Any]) -> dict[str, Any]:
    """A copy without the environments' `score_timeout`, which decides only what fails."""
    resolved = copy.deepcopy(resolved)
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
