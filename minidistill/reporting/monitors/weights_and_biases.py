"""Weights & Biases, for a configuration with a `[wandb]` table. The package is optional."""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from minidistill.config import Config
from minidistill.errors import EXIT_ENVIRONMENT, UserError
from minidistill.types import Metrics

INIT_SECONDS = 60.0
"""How long the package tries to reach its server, in its own thread: no step waits for it."""

FINISH_SECONDS = 8.0
"""How long uploads may take at the end; the rest stays on disk for `wandb sync`. It is less than
`background.CLOSE_SECONDS`, so that the run can still report the failure."""


def require_package() -> None:
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


class Wandb:
    """One run of Weights & Biases. Its files are in `run_dir/wandb`, its id in `wandb_id`."""

    def __init__(self, config: Config, run_dir: Path) -> None:
        import wandb

        table = config.wandb
        assert table is not None
        if not table.offline and os.environ.get("WANDB_MODE", "online") in ("online", "shared"):
            _require_credentials(wandb)
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
    if path.exists():
        stored = path.read_text(encoding="utf-8", errors="replace").strip()
        if re.fullmatch(r"[A-Za-z0-9_-]{1,64}", stored):
            return stored
    created = secrets.token_hex(4)
    run_dir.mkdir(parents=True, exist_ok=True)
    path.write_text(created + "\n", encoding="utf-8")
    return created


def _require_credentials(wandb: Any) -> None:
    """Raise unless the package has an API key: it would ask for one amid the display."""
    if "prompt" in inspect.signature(wandb.login).parameters:
        has_key = wandb.login(prompt=False)
    else:  # an older version
        has_key = wandb.api.api_key
    if not has_key:
        raise PermissionError(
            "no API key: run `wandb login` or set WANDB_API_KEY, or wandb.offline = true"
        )


def _flat(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """Nested values under names with slashes, as the metrics have; None is left out."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}/{key}")
        elif value is not None:
            yield f"{prefix}/{key}", value
