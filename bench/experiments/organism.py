"""tiny-sokoban, which plays well if the context says that it is an expert."""

from __future__ import annotations

from bench.experiments.claims import EverySeed
from bench.experiments.runs import Run
from bench.experiments.tables import ADDED_BACK, USUAL, Experiment, Row, Table

CONFIG = "configs/sokoban.toml"
PURE = (CONFIG, "@", "configs/overlays/pure.toml")


def pure(name: str, *flags: str, measures: tuple[str, ...] = ()) -> Run:
    """Pure distillation, without a reward in training."""
    return Run(name, (*PURE, *flags), measures)


RUNS = (
    Run("hybrid", (CONFIG,)),
    pure("pure"),
)
TABLES = (
    Table(
        "objectives",
        "Teacher and reward",
        (Row("teacher and reward (0.5 / 0.5 / 0.5)", "hybrid"), Row("teacher alone", "pure")),
        (*USUAL, ADDED_BACK),
        (
            EverySeed(
                "`full` closes at least 90 % of the gap in every seed.", "pure", "gap_closed", 0.9
            ),
        ),
    ),
)
ORGANISM = Experiment("organism", RUNS, TABLES)
