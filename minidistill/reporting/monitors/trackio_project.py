"""trackio, for a configuration with a `[trackio]` table. The package is optional."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minidistill.config import Config
from minidistill.reporting.monitors.base import Sample, flat, table
from minidistill.reporting.monitors.packages import answer_in_time, require
from minidistill.reporting.monitors.run_id import run_id
from minidistill.types import Metrics

ID = "trackio_id"
"""The file with the end of a run's name, by which a resumed run finds its curves."""


def check() -> None:
    """Raise UserError (exit code 3) unless the package is installed and can be imported."""
    require("trackio", "trackio")
    answer_in_time("trackio", _can_be_imported, "or run with --no-trackio")


def _can_be_imported() -> bool:
    import trackio

    return bool(trackio.init)


class Trackio:
    """One run of a trackio project, which is where the package keeps it: see `TRACKIO_DIR`."""

    def __init__(self, config: Config, run_dir: Path) -> None:
        import trackio

        _silence()
        chosen = config.trackio
        assert chosen is not None
        name = chosen.name or run_dir.resolve().name
        self._table = trackio.Table
        self._run = trackio.init(
            project=chosen.project,
            # a run is found by its name alone, and other directories may have the same
            name=f"{name}-{run_id(run_dir, ID, 'trackio')}",
            config=config.model_dump(mode="json"),
            resume="allow",
            embed=False,
        )

    def log(self, step: int, metrics: Metrics) -> None:
        self._run.log(dict(metrics), step=step)

    def samples(self, step: int, rows: Sequence[Sample]) -> None:
        columns, texts = table(rows)
        self._run.log({"samples": self._table(columns=columns, data=texts)}, step=step)

    def close(self, summary: Mapping[str, Any] | None) -> None:
        if summary is not None:
            self._run.log(dict(flat(summary, "scoreboard")), step=summary["steps"])
        self._run.finish()


def _silence() -> None:
    """Keep the package from writing to the terminal, which is the display's."""
    for name, module in list(sys.modules.items()):
        if name == "trackio" or name.startswith("trackio."):
            module.__dict__["print"] = lambda *args, **kwargs: None
