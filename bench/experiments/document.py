"""The tables' places in docs/results.md, between two marks each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.experiments.plot import svg
from bench.experiments.runs import ROOT, Store
from bench.experiments.tables import Experiment, Table, markdown, means
from tools import blocks

PAGE = ROOT / "docs" / "results.md"


def write(experiment: Experiment, tables: Sequence[Table], store: Store, page: Path = PAGE) -> None:
    """Write the tables and their plots. Raises ValueError if the page has no place for one."""
    text = page.read_text()
    for table in tables:  # before a plot is written that has no place
        text = placed(text, table.name, markdown(experiment, table, store))
    plots = page.parent / "results"
    plots.mkdir(exist_ok=True)
    for table in tables:
        (plots / f"{table.name}.svg").write_text(plot(experiment, table, store))
    page.write_text(text)


def plot(experiment: Experiment, table: Table, store: Store) -> str:
    """The table's plot as SVG."""
    unit = table.plot.unit.strip()
    axis = f"{table.plot.title}, {unit}" if unit else table.plot.title
    return svg(table.title, axis, means(table, experiment.records(store)), table.plot.show)


def placed(text: str, name: str, block: str) -> str:
    """The page with this block between the marks of its name."""
    try:
        return blocks.placed(text, f"<!-- table: {name} -->", f"<!-- end: {name} -->", block)
    except ValueError as error:
        raise ValueError(f"no place for {name} in docs/results.md: {error}") from error
