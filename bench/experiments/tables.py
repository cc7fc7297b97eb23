"""Experiments, and their tables as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from bench.experiments.claims import Claim, Records, Verdict, judged, numbers
from bench.experiments.runs import Record, Run, Store
from bench.experiments.statistics import T975, Mean, mean
from minidistill.errors import printable


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def three(value: float) -> str:
    """Three significant digits, without an exponent, down to 5 decimals."""
    if abs(value) >= 999.5:
        return whole(value)
    return f"{value:.3g}" if abs(value) >= 1e-4 or value == 0 else f"{value:.5f}"


def whole(value: float) -> str:
    return f"{value:,.0f}"


@dataclass(frozen=True, slots=True)
class Column:
    """A figure of the runs. Without `interval` the mean stands alone."""

    title: str
    figure: str
    show: Callable[[float], str] = three
    unit: str = ""
    interval: bool = False
    worst: bool = False
    """The lowest value of any seed in place of the mean."""

    def cell(self, records: Sequence[Record], prefix: str = "") -> str:
        found = numbers(records, prefix + self.figure)
        if not found:
            return "–"
        measured = mean(found)
        text = self.show(measured.lowest if self.worst else measured.value) + self.unit
        if len(found) < len(records):  # a mean of the others says little
            return f"{text} ({len(found)} of {len(records)})"
        if self.interval and measured.low is not None and measured.high is not None:
            text += f" ({self.show(measured.low)} to {self.show(measured.high)})"
        return text


BEFORE = Column("before", "baseline_student", percent, "%")
IN_CONTEXT = Column("in context", "baseline_teacher", percent, "%")
STUDENT = Column("student", "student", percent, "%", interval=True)
GAP = Column("gap closed", "gap_closed", percent, "%", interval=True)
WORST_GAP = Column("lowest seed", "gap_closed", percent, "%", worst=True)
ADDED_BACK = Column("context added back", "student_with_context", percent, "%", interval=True)
KL_BEFORE = Column("held-out KL before", "heldout_kl_before")
KL_AFTER = Column("held-out KL after", "heldout_kl_after", interval=True)
KL_CLOSED = Column("KL closed", "heldout_kl_closed", percent, "%", interval=True)
DRIFT = Column("drift KL", "drift_kl", three, interval=True)
LENGTH_BEFORE = Column("length before", "length_before")
LENGTH = Column("length after", "length_after")
TOKENS = Column("tokens trained on", "tokens", whole)
USUAL = (BEFORE, IN_CONTEXT, STUDENT, GAP, WORST_GAP, KL_AFTER, DRIFT)


@dataclass(frozen=True, slots=True)
class Row:
    """A line of a table: a run under the name that it has there.

    The name of each figure is `prefix` and then the column's, so one run can have several lines.
    """

    label: str
    run: str
    prefix: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of runs. `plot` is the column that the plot shows."""

    name: str
    title: str
    rows: tuple[Row, ...]
    columns: tuple[Column, ...] = USUAL
    claims: tuple[Claim, ...] = ()
    plot: Column = GAP
    answers: bool = False
    """Whether the answers of the runs with seed 0, by the measure `answers`, stand below."""

    @property
    def runs(self) -> list[str]:
        """The names of the runs that it shows."""
        return list(dict.fromkeys(row.run for row in self.rows))

    def verdicts(self, records: Records, seeds: int) -> list[Verdict]:
        return [judged(claim, records, seeds) for claim in self.claims]


@dataclass(frozen=True, slots=True)
class Experiment:
    """Runs that tables share, each made with seeds 0, 1, … below `seeds`."""

    name: str
    runs: tuple[Run, ...]
    tables: tuple[Table, ...]
    seeds: int = 5

    def __post_init__(self) -> None:
        names = [run.name for run in self.runs]
        assert len(set(names)) == len(names), f"two runs of {self.name} have one name"
        missing = {run for table in self.tables for run in table.runs} - set(names)
        assert not missing, f"{self.name} has no run {missing}"
        assert self.seeds <= max(T975), f"intervals are known for {max(T975)} seeds at most"

    def runs_of(self, tables: Iterable[Table]) -> list[Run]:
        """The runs that these tables show."""
        shown = {run for table in tables for run in table.runs}
        return [run for run in self.runs if run.name in shown]

    def records(self, store: Store) -> dict[str, list[Record]]:
        """By the run's name, those that are made."""
        return {run.name: store.of(run, range(self.seeds)) for run in self.runs}


def markdown(experiment: Experiment, table: Table, store: Store) -> str:
    """The table with its plot, its verdicts, and where it comes from."""
    records = experiment.records(store)
    blocks = [grid(experiment, table, records), remarks(experiment, table, records)]
    if table.answers:
        blocks.append(answers(table, records))
    blocks.append([f"![{table.title}](results/{table.name}.svg)"])
    blocks.append([source(experiment, table, records)])
    return "\n\n".join("\n".join(lines) for lines in blocks if lines)


def grid(experiment: Experiment, table: Table, records: Records) -> list[str]:
    lines = [
        "| " + " | ".join(["run", *(column.title for column in table.columns)]) + " |",
        "|---" * (1 + len(table.columns)) + "|",
    ]
    for row in table.rows:
        cells = [column.cell(records[row.run], row.prefix) for column in table.columns]
        made = len([r for r in records[row.run] if r.error is None])
        short = f" ({made} of {experiment.seeds} seeds)" if made < experiment.seeds else ""
        lines.append("| " + " | ".join([row.label + short, *cells]) + " |")
    return lines


def remarks(experiment: Experiment, table: Table, records: Records) -> list[str]:
    """The runs that failed, and the verdicts."""
    failed = [r for run in table.runs for r in records[run] if r.error is not None]
    lines = [f"- `{r.name}`, seed {r.seed}, failed: {r.error}." for r in failed]
    for verdict in table.verdicts(records, experiment.seeds):
        figures = f": {verdict.figures}" if verdict.figures else ""
        lines.append(f"- {verdict.claim} **{verdict.word.capitalize()}**{figures}.")
    return lines


def answers(table: Table, records: Records) -> list[str]:
    """What the runs with seed 0 answered before and after, as a table."""
    lines = ["| run | prompt | base | in context | student |", "|---|---|---|---|---|"]
    for row in table.rows:
        for made in records[row.run]:
            for answer in made.figures.get("answers", ()) if made.seed == 0 else ():
                texts = (answer[view] for view in ("prompt", "base", "in_context", "student"))
                lines.append("| " + " | ".join([row.label, *map(code, texts)]) + " |")
    return lines if len(lines) > 2 else []


def code(text: str) -> str:
    """A model's text as code within a table's cell, so that nothing in it is markup."""
    shown = " ↵ ".join(printable(text).split("\n")).replace("|", "\\|")
    return f"`` {shown} ``" if "`" in shown else f"`{shown}`" if shown else "(nothing)"


def source(experiment: Experiment, table: Table, records: Records) -> str:
    """Where a table comes from: the command, how many runs, the commits and the machines."""
    made = [record for run in table.runs for record in records[run]]
    total = len(table.runs) * experiment.seeds
    if not made:
        return f"`python -m bench.results {table.name}`: not run yet."
    commits = ", ".join(sorted({r.commit for r in made}))
    machines = "; ".join(sorted({str(r.machine["processor"]) for r in made}))
    minutes = sum(r.seconds for r in made) / 60
    short = "" if len(made) == total else f"{len(made)} of "
    seeds = f"seeds 0 to {experiment.seeds - 1}" if experiment.seeds > 1 else "seed 0"
    return (
        f"`python -m bench.results {table.name}`: {short}{total} runs, {seeds}, "
        f"{minutes:.0f} minutes of a core; commit {commits}; {machines}. "
        f"Each run's command is in [its record](../bench/results/records/{experiment.name}.jsonl)."
    )


def means(table: Table, records: Records) -> list[tuple[str, Mean]]:
    """What the plot shows: the mean of each row whose runs all have the figure."""
    out = []
    for row in table.rows:
        made = [r for r in records[row.run] if r.error is None]
        found = numbers(made, row.prefix + table.plot.figure)
        if found and len(found) == len(made):
            out.append((row.label, mean(found)))
    return out
