"""Makes the results: runs with several seeds, and from their figures the tables of docs/results.md.

    python -m bench.results [NAME…] [--workers N] [--out DIR] [--list | --tables | --compare DIR]

NAME is a table or an experiment; without one, everything is made. What is already made, by the same
command, is not made again: kill it and start it again as you like. Each run has one thread, and as
many are made side by side as there are cores. A run's figures are a line of
bench/results/records/EXPERIMENT.jsonl. That of a run that failed has its error, and the exit code
is then 1: remove the line, and the run is made again. With `--out` the records are in another
folder, and docs/results.md stays as it is unless `--tables` is given. `--compare` prints where the
verdicts of two folders of records differ, and exits with 1 if they do. It leaves out incomplete
ones.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.experiments import document
from bench.experiments.catalog import EXPERIMENTS
from bench.experiments.claims import INCOMPLETE
from bench.experiments.runs import ROOT, Maker, Record, Store, check_writable
from bench.experiments.tables import Experiment, Table
from minidistill.errors import EXIT_FAILED, EXIT_INTERRUPTED, UserError, printable
from minidistill.system.files import drop_output

RECORDS = ROOT / "bench" / "results" / "records"
Chosen = list[tuple[Experiment, list[Table]]]


def chosen(names: Sequence[str]) -> Chosen:
    """The tables that these names mean, by experiment. Raises ValueError for an unknown name."""
    known = {e.name for e in EXPERIMENTS} | {t.name for e in EXPERIMENTS for t in e.tables}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"no table {unknown[0]!r}; there are {', '.join(sorted(known))}")
    out: Chosen = []
    for experiment in EXPERIMENTS:
        whole = not names or experiment.name in names
        tables = [table for table in experiment.tables if whole or table.name in names]
        if tables:
            out.append((experiment, tables))
    return out


def make(picked: Chosen, folder: Path, workers: int) -> None:
    """Make the runs that are missing."""
    maker = Maker(workers)
    for experiment, tables in picked:
        store = Store.open(folder, experiment.name)
        jobs = list(store.missing(experiment.runs_of(tables), range(experiment.seeds)))
        if jobs:
            check_writable(folder)  # before hours of runs that could not be kept
            print(f"{experiment.name}: {len(jobs)} runs to make, {workers} at a time", flush=True)
            maker.make(jobs, keeper(store))


def keeper(store: Store) -> Callable[[Record, int, int], None]:
    """Keeps a record and prints it, with the time that is left."""
    began = time.monotonic()

    def keep(record: Record, count: int, total: int) -> None:
        store.add(record)
        left = (time.monotonic() - began) / count * (total - count)
        closed = record.number("gap_closed")
        shown = record.error or ("" if closed is None else f"gap closed {closed:.1%}")
        print(
            f"  {count}/{total}  {record.name}, seed {record.seed}: {shown}  "
            f"{record.seconds:.0f} s, {left / 60:.0f} min left",
            flush=True,
        )

    return keep


def failures(picked: Chosen, folder: Path) -> int:
    """How many runs of these tables have failed."""
    failed = 0
    for experiment, tables in picked:
        store = Store.open(folder, experiment.name)
        for run in experiment.runs_of(tables):
            failed += sum(r.error is not None for r in store.of(run, range(experiment.seeds)))
    return failed


def verdicts(folder: Path, picked: Chosen) -> dict[str, str]:
    """The word of each claim, by table and claim."""
    out = {}
    for experiment, tables in picked:
        records = experiment.records(Store.open(folder, experiment.name))
        for table in tables:
            for verdict in table.verdicts(records, experiment.seeds):
                out[f"{table.name}: {verdict.claim}"] = verdict.word
    return out


def compare(ours: Path, theirs: Path, picked: Chosen) -> int:
    """Print the claims with another verdict. Returns how many there are.

    Raises UserError if a folder is missing, or no verdict is in both.
    """
    for folder in (ours, theirs):
        check_exists(folder)
    here, there = verdicts(ours, picked), verdicts(theirs, picked)
    both = [name for name in here if INCOMPLETE not in (here[name], there[name])]
    if not both:
        raise UserError(
            f"none of the {len(here)} verdicts is complete in both folders",
            where=f"{ours}, {theirs}",
            fix="make the runs first; --list prints which are missing",
        )
    different = [name for name in both if here[name] != there[name]]
    for name in different:
        print(f"{name}\n  {ours}: {here[name]}\n  {theirs}: {there[name]}")
    left = f"; {len(here) - len(both)} are incomplete" if len(both) < len(here) else ""
    print(f"{len(both) - len(different)} of {len(both)} verdicts are the same{left}")
    return len(different)


def check_exists(folder: Path) -> None:
    """Raises UserError."""
    if not folder.is_dir():
        raise UserError("there is no such folder", where=str(folder), fix="check the path")


def run(picked: Chosen, options: argparse.Namespace) -> int:
    """Do what was asked. Returns the exit code. Raises UserError."""
    if options.list or options.tables:
        check_exists(options.out)
    if options.list:
        for experiment, tables in picked:
            for table in tables:
                store = Store.open(options.out, experiment.name)
                runs, seeds = experiment.runs_of([table]), range(experiment.seeds)
                missing = len(list(store.missing(runs, seeds)))
                total = len(runs) * experiment.seeds
                print(f"{experiment.name:10} {table.name:20} {total - missing}/{total} runs made")
        return 0
    if options.compare is not None:
        return 1 if compare(options.out, options.compare, picked) else 0
    if not options.tables:
        make(picked, options.out, options.workers)
    # records elsewhere are a second set, to compare: the page stays that of the first
    writes = options.tables or options.out.resolve() == RECORDS
    for experiment, _ in picked if writes else []:
        # all of its tables, for they share runs
        document.write(experiment, experiment.tables, Store.open(options.out, experiment.name))
    for name, word in verdicts(options.out, picked).items():
        print(f"{word:12} {name}")
    if failed := failures(picked, options.out):
        print(f"{failed} runs failed; the tables say so")
    return EXIT_FAILED if failed else 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("bench.results", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("names", nargs="*", metavar="NAME")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument(
        "--workers", type=int, default=cores, metavar="N", help="runs at a time; default: the cores"
    )
    parser.add_argument(
        "--out", type=Path, default=RECORDS, metavar="DIR", help="folder of the records"
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--list", action="store_true", help="print what there is")
    instead.add_argument("--tables", action="store_true", help="write the tables only")
    instead.add_argument("--compare", type=Path, metavar="DIR", help="compare the verdicts")
    options = parser.parse_args(argv)
    if options.workers < 1:
        parser.error("--workers takes 1 or more")
    try:
        picked = chosen(options.names)
    except ValueError as error:
        parser.error(str(error))
    try:
        return run(picked, options)
    except UserError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the runs end too
    code = EXIT_INTERRUPTED
    try:
        code = main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        pass
    except BrokenPipeError:  # `| head`: what was to be made or compared may not have been
        code = EXIT_INTERRUPTED
        drop_output(sys.stdout)
    sys.exit(code)
