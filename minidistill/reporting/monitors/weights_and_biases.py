"""Weights & Biases, behind its table in the configuration. The package is imported lazily."""

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
"""How long the package tries to reach its server; in its own thread, so no step waits for it."""

FINISH_SECONDS = 8.0
"""How long uploads may take at the end; what is left is on disk for `wandb sync`. Less than
`background.CLOSE_SECONDS`, so that the run hears of it."""


def require() -> None:
    """Raise UserError unless the package is there.

    A folder named `wandb` (every run of the package leaves one) passes for a package without
    an origin; it is not one.
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
        # Its capture of the console would fight with the live display.
        options: dict[str, Any] = {"console": "off", "silent": True, "init_timeout": INIT_SECONDS}
        if "finish_timeout" in wandb.Settings.model_fields:  # not in older packages
            # Without it the package's own exit hook would hold the process until all is uploaded.
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
    """The id kept in `run_dir`, so that a resumed run continues its curves; made where missing."""
    path = run_dir / "wandb_id"
    if path.exists():
        kept = path.read_text(encoding="utf-8", errors="replace").strip()
        if re.fullmatch(r"[A-Za-z0-9_-]{1,64}", kept):
            return kept
    made = secrets.token_hex(4)
    run_dir.mkdir(parents=True, exist_ok=True)
    path.write_text(made + "\n", encoding="utf-8")
    return made


def _require_credentials(wandb: Any) -> None:
    """Raise unless the package is signed in: it would ask on the terminal, amid the display."""
    if "prompt" in inspect.signature(wandb.login).parameters:
        found = wandb.login(prompt=False)
    else:  # an older package
        found = wandb.api.api_key
    if not found:
        raise PermissionError(
            "no API key: run `wandb login` or set WANDB_API_KEY, or wandb.offline = true"
        )


def _flat(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """Nested figures under names with slashes, like the metrics'; what is None is left out."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}/{key}")
        elif value is not None:
            yield f"{prefix}/{key}", value
