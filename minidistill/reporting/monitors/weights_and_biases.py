"""Weights & Biases, for a configuration with a `[wandb]` table. The package is optional."""

from __future__ import annotations

import importlib.util
import inspect
import logging
import os
import queue
import re
import secrets
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from minidistill.config import Config
from minidistill.config.schema import WandbConfig
from minidistill.errors import EXIT_ENVIRONMENT, UserError
from minidistill.system.files import write_atomic
from minidistill.system.foreign import describe, foreign_code
from minidistill.types import Metrics

logger = logging.getLogger(__name__)
CHECK_SECONDS = 30.0
"""How long the package may take to be imported and to look for its API key."""
INIT_SECONDS = 60.0
"""How long the package tries to reach its server, in its own thread: no step waits for it."""

WITHOUT_KEY = (
    "keep the log on disk with wandb.offline = true (or WANDB_MODE=offline), or run with --no-wandb"
)
FINISH_SECONDS = 8.0
"""How long uploads may take at the end; the rest stays on disk for `wandb sync`. It is less than
`background.CLOSE_SECONDS`, so that the run can still report the failure."""


def check(table: WandbConfig) -> None:
    """Raise UserError (exit code 3) without the package, or without an API key where one is needed.

    The package would ask for a key amid the display.
    """
    _require_package()
    online = os.environ.get("WANDB_MODE", "online") in ("online", "shared")
    needs_key = online and not table.offline
    answer: queue.SimpleQueue[bool | UserError] = queue.SimpleQueue()

    def ask() -> None:
        try:
            with foreign_code(_broken):
                answer.put(_is_ready(needs_key))
        except UserError as error:
            answer.put(error)

    # in a thread, because code that hangs there would keep the run from starting
    threading.Thread(target=ask, name="wandb credentials", daemon=True).start()
    try:
        ready = answer.get(timeout=CHECK_SECONDS)
    except queue.Empty:
        logger.warning(
            f"wandb did not say within {CHECK_SECONDS:g} s whether it can be used: the run starts, "
            "and W&B may turn out to be off"
        )
        return
    if isinstance(ready, UserError):
        raise ready
    if not ready:
        raise UserError(
            "the configuration has a [wandb] table, but wandb has no API key",
            where="wandb",
            fix=f"run `wandb login`, set WANDB_API_KEY, {WITHOUT_KEY}",
            exit_code=EXIT_ENVIRONMENT,
        )


def _require_package() -> None:
    """Raise UserError (exit code 3) unless the package is installed.

    Python takes any folder named `wandb` for a package, and every run of the package leaves one.
    Such a folder has no origin.
    """
    spec = importlib.util.find_spec("wandb")
    if spec is None or spec.origin is None:
        raise UserError(
            "the configuration has a [wandb] table, but the package wandb is not installed",
            where="wandb",
            fix="pip install 'minidistill[wandb]', or run with --no-wandb",
            exit_code=EXIT_ENVIRONMENT,
        )


def _is_ready(needs_key: bool) -> bool:
    """Whether the package can be imported and has an API key, if one is needed."""
    import wandb

    if not needs_key:
        return True
    if "prompt" not in inspect.signature(wandb.login).parameters:  # an older version
        return bool(wandb.api.api_key)
    wandb.setup(wandb.Settings(silent=True))  # else it asks its server for the user's name
    return bool(wandb.login(prompt=False, verify=False))


def _broken(error: BaseException) -> UserError:
    return UserError(
        f"the configuration has a [wandb] table, but wandb cannot be used: {describe(error)}",
        where="wandb",
        fix=f"correct that, {WITHOUT_KEY}",
        exit_code=EXIT_ENVIRONMENT,
    )


class Wandb:
    """One run of Weights & Biases. Its files are in `run_dir/wandb`, its id in `wandb_id`."""

    def __init__(self, config: Config, run_dir: Path) -> None:
        import wandb

        table = config.wandb
        assert table is not None
        # The package's capture of the console would interfere with the live display.
        options: dict[str, Any] = {"console": "off", "silent": True, "init_timeout": INIT_SECONDS}
        if "finish_timeout" in wandb.Settings.model_fields:  # missing from older versions
            # Without it the package's exit hook blocks the process until all is uploaded.
            options |= {"finish_timeout": FINISH_SECONDS, "finish_timeout_raises": True}
        self._run = wandb.init(
            project=table.project,
            name=table.name or run_dir.resolve().name,
            entity=table.entity,
            tags=list(table.tags),
            mode="offline" if table.offline else None,
            dir=str(run_dir),
            id=run_id(run_dir),
            resume="allow",
            config=config.model_dump(mode="json"),
            settings=wandb.Settings(**options),
        )

    def log(self, step: int, metrics: Metrics) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self, summary: Mapping[str, Any] | None) -> None:
        if summary is not None:
            self._run.summary.update(dict(_flat(summary, "scoreboard")))
        self._run.finish()


def run_id(run_dir: Path) -> str:
    """The id stored in `run_dir`, created if missing. A resumed run continues its curves."""
    path = run_dir / "wandb_id"
    if path.is_file():  # reading a pipe would never end
        stored = path.read_text(encoding="utf-8", errors="replace").strip()
        if re.fullmatch(r"[A-Za-z0-9_-]{1,64}", stored):
            return stored
    created = secrets.token_hex(4)
    run_dir.mkdir(parents=True, exist_ok=True)
    write_atomic(path, created + "\n")
    return created


def _flat(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """Nested values under names with slashes, as the metrics have; None is left out."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}/{key}")
        elif value is not None:
            yield f"{prefix}/{key}", value
