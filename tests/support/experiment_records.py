"""Records of runs that were never made."""

from __future__ import annotations

from typing import Any

from bench.experiments.runs import Record, Run

SHORT = Run("short", ("configs/sokoban.toml",))
OTHER = Run("other", ("configs/sokoban.toml", "--trainer.optim.lr", "1e-3"))


def record(run: Run, seed: int, error: str | None = None, **figures: Any) -> Record:
    return Record(
        run.name, seed, run.shown(seed), run.measures, run.inputs(), figures, error,
        61.0, "0123abcd", "2026-11-28", {"processor": "a CPU"},
    )  # fmt: skip


def records(run: Run, figure: str, *values: float) -> dict[str, list[Record]]:
    return {run.name: [record(run, seed, **{figure: v}) for seed, v in enumerate(values)]}
