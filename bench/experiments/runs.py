"""Runs of the command line with several seeds, and the files in which their figures are kept."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import platform
import re
import shlex
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch

from bench.kernels_report import processor
from bench.smollm2 import smollm2
from minidistill.errors import EXIT_ENVIRONMENT, EXIT_INTERRUPTED, EXIT_OK, UserError
from minidistill.system.subprocesses import Subprocess
from tools import forked

ROOT = Path(__file__).parent.parent.parent
NO_RESULT = (EXIT_ENVIRONMENT, EXIT_INTERRUPTED)
"""Exit codes that say nothing about what was run."""
CODE = ("minidistill", "kernels", "configs", "bench", ":!bench/results")
"""What a run may depend on."""
ONE_THREAD = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
IMPORTS = (
    "bench.experiments.measures",
    "minidistill.driver.loop",
    "transformers.models.llama.modeling_llama",
)
"""Imported once, before the first run. They take 6 to 9 s, where a short run takes 25."""
DATA = re.compile(r"""["']([^"'\n]{1,200}\.\w+)["']""")
"""How a configuration may name a file of data."""
FIGURES = (
    "baseline_student", "baseline_teacher", "baseline_diff", "student", "student_with_context",
    "gap_closed", "gap_closed_low", "gap_closed_high", "eval_tasks", "length_before",
    "length_after",
    "teacher_kl_first", "teacher_kl_last", "heldout_kl_before", "heldout_kl_after",
    "heldout_kl_closed", "heldout_kl_closed_low", "heldout_kl_closed_high",
    "unrelated_kl_before", "unrelated_kl_after", "drift_kl", "steps",
)  # fmt: skip
"""What is kept of a scoreboard."""
DIFFERENCES = {
    "gain": ("student", "baseline_student"),
    "added_back": ("student_with_context", "student"),
    "distilled": ("heldout_kl_before", "heldout_kl_after"),
}
"""Figures that follow from others: the first minus the second."""


@dataclass(frozen=True, slots=True)
class Run:
    """A run to make with each seed.

    `arguments` follow `minidistill run`. `first` has commands of `minidistill` that come before it.
    In all of them `{model}` is the folder of a model of `bench.smollm2`, and `{scratch}` a folder
    that lasts as long as they do.
    """

    name: str
    arguments: tuple[str, ...]
    measures: tuple[str, ...] = ()
    """Of `bench.experiments.measures`: what else is measured once the run has ended."""
    first: tuple[tuple[str, ...], ...] = ()
    model: str | None = None
    """One of `smollm2.NAMES`, if the arguments have `{model}`."""

    def commands(self, seed: int) -> list[list[str]]:
        """Arguments of `minidistill`, with their placeholders."""
        flags = ["--seed", str(seed)]
        before = [[*command, *(flags if command[0] == "run" else ())] for command in self.first]
        return [*before, ["run", *self.arguments, *flags, "--output_dir", "{scratch}/run"]]

    def shown(self, seed: int) -> str:
        """The commands as one types them, with the model's name in its placeholder."""
        lines = ["minidistill " + shlex.join(command) for command in self.commands(seed)]
        return filled(" && ".join(lines), {"model": f"{{{self.model}}}"})

    def inputs(self) -> str:
        """A digest of the configurations that the commands name and of the data that those name."""
        parts = [part for command in (*self.first, self.arguments) for part in command]
        files = {ROOT / part for part in parts if part.endswith(".toml")}
        return digest(tuple(sorted(files)))


@dataclass(frozen=True, slots=True)
class Record:
    """What one run with one seed gave."""

    name: str
    seed: int
    command: str
    measures: tuple[str, ...]
    inputs: str
    """Of the run: see `Run.inputs`."""
    figures: Mapping[str, Any]
    """Empty if the run failed."""
    error: str | None
    """The last line of a run that failed, or of a measure of it, with the exit code."""
    seconds: float
    commit: str
    date: str
    machine: Mapping[str, Any]

    def is_of(self, run: Run) -> bool:
        """Whether this is what the run would be, unless the code has changed."""
        asked = (run.shown(self.seed), run.measures, run.inputs())
        return (self.command, self.measures, self.inputs) == asked

    def number(self, figure: str) -> float | None:
        """A figure, or one that follows from others, if it was measured and is a number.

        `drift_share` is the drift KL as a share of the KL that was distilled, if that is positive.
        """
        if figure in DIFFERENCES:
            first, second = map(self.number, DIFFERENCES[figure])
            return None if first is None or second is None else first - second
        if figure == "drift_share":
            drift, distilled = self.number("drift_kl"), self.number("distilled")
            if drift is None or distilled is None or distilled <= 0:
                return None
            return drift / distilled
        value = self.figures.get(figure)
        if not isinstance(value, int | float) or not math.isfinite(value):
            return None
        return float(value)


@dataclass(slots=True)
class Store:
    """The records of an experiment, a line each, sorted by run and seed."""

    path: Path
    records: dict[tuple[str, int], Record] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, name: str) -> Store:
        """Raises UserError if a line is no record."""
        store = cls(folder / f"{name}.jsonl")
        store._read()
        return store

    def add(self, record: Record) -> None:
        """Write the record, besides those that another process has written meanwhile."""
        check_writable(self.path.parent)
        with locked(self.path.parent):
            self._read()
            self.records[record.name, record.seed] = record
            lines = [json.dumps(asdict(self.records[key])) for key in sorted(self.records)]
            beside = self.path.with_suffix(".part")
            beside.write_text("\n".join(lines) + "\n")
            beside.replace(self.path)  # a reader, or a kill, never meets half a file

    def _read(self) -> None:
        self.records.clear()  # lines may have been removed
        if not self.path.is_file():
            return
        for number, line in enumerate(self.path.read_text().splitlines(), 1):
            try:
                values = json.loads(line)
                record = Record(**values | {"measures": tuple(values["measures"])})
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(
                    f"this line is no record of a run ({type(error).__name__}: {error})",
                    where=f"{self.path}:{number}",
                    fix="remove the line: its run is then made again",
                ) from error
            self.records[record.name, record.seed] = record

    def of(self, run: Run, seeds: Sequence[int]) -> list[Record]:
        """The records of a run as it is defined now, by seed."""
        found = (self.records.get((run.name, seed)) for seed in seeds)
        return [record for record in found if record is not None and record.is_of(run)]

    def missing(self, runs: Sequence[Run], seeds: Sequence[int]) -> Iterator[tuple[Run, int]]:
        """What is to be made, all runs with one seed before the next seed."""
        for seed in seeds:
            for run in runs:
                if not self.of(run, [seed]):
                    yield run, seed


def check_writable(folder: Path) -> None:
    """Make the folder. Raises UserError if records cannot be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"records cannot be written: {error.strerror}", where=str(folder), fix="use --out DIR"
        ) from error


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Wait until no other process writes records there."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


class Failed(Exception):
    """A run failed, which is a result. The message is the error of its record."""


class Maker:
    """Makes runs side by side, each on one thread."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.stopped = threading.Event()
        self.children: set[Subprocess] = set()
        self.code = commit()  # read now, since files may be edited during the runs

    def make(
        self, jobs: Sequence[tuple[Run, int]], done: Callable[[Record, int, int], None]
    ) -> None:
        """Call `done` with each record, how many there are now, and how many there will be."""
        for model in {run.model for run, _ in jobs if run.model}:
            smollm2(model)  # which is converted once, and not by two runs at a time
        forked.start_server(IMPORTS, [str(ROOT)], ONE_THREAD)
        with ThreadPoolExecutor(self.workers) as pool:
            try:
                futures = [pool.submit(self.one, run, seed) for run, seed in jobs]
                for count, future in enumerate(as_completed(futures), 1):
                    if (record := future.result()) is not None:
                        done(record, count, len(jobs))
            except BaseException:
                self.stop()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def stop(self) -> None:
        """End the runs that are being made."""
        self.stopped.set()
        for child in list(self.children):
            child.kill()

    def one(self, run: Run, seed: int) -> Record | None:
        """Make one run. Returns None if everything is to stop."""
        began, inputs = time.perf_counter(), run.inputs()
        error, figures = None, {}
        with tempfile.TemporaryDirectory(prefix="minidistill-results-") as scratch:
            try:
                figures = self.figures(run, seed, Path(scratch))
            except Failed as failed:
                error = str(failed)
        if self.stopped.is_set():
            return None
        return Record(
            run.name, seed, run.shown(seed), run.measures, inputs, figures, error,
            round(time.perf_counter() - began, 1), self.code, date.today().isoformat(), machine(),
        )  # fmt: skip

    def figures(self, run: Run, seed: int, scratch: Path) -> dict[str, Any]:
        """Run its commands and its measures. Raises Failed."""
        places = {"scratch": str(scratch)}
        if run.model is not None:
            places["model"] = str(smollm2(run.model))
        for command in run.commands(seed):
            self.call("minidistill", [filled(part, places) for part in command])
        folder = scratch / "run"
        figures = scoreboard_figures(folder)
        if run.measures:
            output = self.call("bench.experiments.measures", [*run.measures, str(folder)])
            figures |= json.loads(output.splitlines()[-1])
        return figures

    def call(self, module: str, arguments: Sequence[str]) -> str:
        """The output of `python -m MODULE…`.

        Raises Failed if it fails, and UserError if it was ended from outside, or lacks something of
        the machine.
        """
        if self.stopped.is_set():
            raise Failed("stopped")
        child = Subprocess(module, arguments, (), ONE_THREAD, ROOT, forked.ForkedPopen)
        self.children.add(child)
        try:
            if self.stopped.is_set():  # `stop` may have come between the two
                child.kill()
            code, output = child.popen.wait(), child.output()
        finally:
            self.children.discard(child)
            child.close()
        if (code < 0 or code in NO_RESULT) and not self.stopped.is_set():
            raise UserError(
                f"a run was killed by signal {-code}" if code < 0 else last_error(output),
                where=" ".join([module, *arguments]),
                fix="start again, with fewer --workers if memory ran out",
                exit_code=EXIT_ENVIRONMENT,
            )
        if code != EXIT_OK:
            raise Failed(f"{module.rpartition('.')[2]}, exit code {code}: {last_error(output)}")
        return output


def digest(files: tuple[Path, ...]) -> str:
    """Of the contents of these files, and of those that they name as a path beside them."""
    seen = hashlib.sha256()
    for file in files:
        text = file.read_text()
        seen.update(text.encode())
        names = (file.parent / found for found in DATA.findall(text))
        for named in sorted({name for name in names if name.is_file()}):
            seen.update(named.read_bytes())
    return seen.hexdigest()[:16]


def filled(text: str, places: Mapping[str, str]) -> str:
    """The text with its placeholders replaced. Other braces are TOML."""
    for name, value in places.items():
        text = text.replace("{" + name + "}", value)
    return text


def last_error(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error:")]
    return (errors or lines or ["no output"])[-1].removeprefix("error: ")


def scoreboard_figures(folder: Path) -> dict[str, Any]:
    """The figures of a run's scoreboard, and how much it was trained on."""
    board = json.loads((folder / "scoreboard.json").read_text())
    figures = {name: board.get(name) for name in FIGURES}
    config = json.loads((folder / "config.resolved.json").read_text())
    steps = steps_of(folder)
    lengths = [step["completions/length_mean"] for step in steps]
    samples = config["orchestrator"]["batch_size"]
    mismatches = [step["kl/sampler_mismatch"] for step in steps if "kl/sampler_mismatch" in step]
    return figures | {
        "sampler_mismatch": max(mismatches, default=None),
        "samples": samples * len(steps),
        "tokens": round(sum(lengths) * samples),
        "train_seconds": round(sum(step["time/step"] for step in steps), 1),
    }


def steps_of(folder: Path) -> list[dict[str, Any]]:
    """The metrics of each step of training."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [step for line in lines if "time/step" in (step := json.loads(line))]


def commit() -> str:
    """The commit that is checked out, with "+" if code differs from it; "unknown" without git."""

    def git(*command: str) -> str:
        try:
            done = subprocess.run(
                ["git", *command], cwd=ROOT, text=True, capture_output=True, check=False
            )
        except OSError:
            return ""
        return done.stdout.strip()

    name = git("rev-parse", "--short=8", "HEAD")
    return name + ("+" if git("status", "--porcelain", "--", *CODE) else "") if name else "unknown"


def machine() -> dict[str, Any]:
    return {
        # with the instruction set, which decides how results are rounded
        "processor": f"{processor()}, {torch.backends.cpu.get_cpu_capability()}",
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": 1,
    }
