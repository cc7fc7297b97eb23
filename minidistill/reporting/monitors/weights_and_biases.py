"""Weights & Biases, for a configuration with a `[wandb]` table. The package is optional."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minidistill.config import Config
from minidistill.config.schema import WandbConfig
from minidistill.errors import EXIT_ENVIRONMENT, UserError
from minidistill.reporting.monitors.base import Sample, flat, table
from minidistill.reporting.monitors.packages import answer_in_time, require
from minidistill.reporting.monitors.run_id import run_id
from minidistill.types import Metrics

INIT_SECONDS = 60.0
"""How long the package tries to reach its server, in its own thread: no step waits for it."""
ID = "wandb_id"
"""The file with the run's id, in its directory."""
STEP = "step"
"""The axis of all metrics, as in `metrics.jsonl`."""
WITHOUT_KEY = (
    "keep the log on disk with wandb.offline = true (or WANDB_MODE=offline), or run with --no-wandb"
)
FINISH_SECONDS = 8.0
"""How long uploads may take at the end; the rest stays on disk for `wandb sync`. It is less than
`background.CLOSE_SECONDS`, so that the run can still report the failure."""


def check(settings: WandbConfig) -> None:
    """Raise UserError (exit code 3) without the package, or without an API key where one is needed.

    The package would ask for a key amid the display.
    """
    require("wandb", "wandb")
    online = os.environ.get("WANDB_MODE", "online") in ("online", "shared")
    needs_key = online and not settings.offline
    ready = answer_in_time("wandb", lambda: _is_ready(needs_key), WITHOUT_KEY)
    if not ready:
        raise UserError(
            "the configuration has a [wandb] table, but wandb has no API key",
            where="wandb",
            fix=f"run `wandb login`, set WANDB_API_KEY, {WITHOUT_KEY}",
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


class Wandb:
    """One run of Weights & Biases. Its files are in `run_dir/wandb`, its id in `wandb_id`."""

    def __init__(self, config: Config, run_dir: Path) -> None:
        import wandb

        chosen = config.wandb
        assert chosen is not None
        # The package's capture of the console would interfere with the live display.
        options: dict[str, Any] = {"console": "off", "silent": True, "init_timeout": INIT_SECONDS}
        if "finish_timeout" in wandb.Settings.model_fields:  # missing from older versions
            # Without it the package's exit hook blocks the process until all is uploaded.
            options |= {"finish_timeout": FINISH_SECONDS, "finish_timeout_raises": True}
        # It would record the address of the git remote, which may hold a token, and local changes.
        known = wandb.Settings.model_fields
        options |= {name: True for name in ("disable_git", "disable_code") if name in known}
        self._run = wandb.init(
            project=chosen.project,
            name=chosen.name or run_dir.resolve().name,
            entity=chosen.entity,
            tags=list(chosen.tags),
            mode="offline" if chosen.offline else None,
            dir=str(run_dir),
            id=run_id(run_dir, ID, "W&B", begun=(run_dir / "wandb").is_dir()),
            resume="allow",
            config=config.model_dump(mode="json"),
            settings=wandb.Settings(**options),
        )
        # A resumed run repeats steps. The package's own axis would refuse what it has seen once.
        self._run.define_metric(STEP, hidden=True)
        self._run.define_metric("*", step_metric=STEP)

    def log(self, step: int, metrics: Metrics) -> None:
        self._run.log({STEP: step, **metrics})

    def samples(self, step: int, rows: Sequence[Sample]) -> None:
        import wandb

        columns, texts = table(rows)
        self._run.log({STEP: step, "samples": wandb.Table(columns=columns, data=texts)})

    def close(self, summary: Mapping[str, Any] | None) -> None:
        if summary is not None:
            self._run.summary.update(dict(flat(summary, "scoreboard")))
        self._run.finish()
