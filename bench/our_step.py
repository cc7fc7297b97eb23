"""A run of minidistill whose steps are taken one at a time, for the benchmarks of a step.

The steps are the run's own: `prepare`, `open_session` and `train_step`, with the embedded engine on
a CPU. Only the display is silent, and no token ends a completion.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.pair import use_threads
from bench.workload import Case, write_case
from minidistill.config import load_config
from minidistill.driver.loop import train_step
from minidistill.driver.prepare import prepare
from minidistill.driver.session import Session, open_session
from minidistill.reporting.run_directory import RunDirectory
from minidistill.reporting.terminal.base import Header, Sample
from minidistill.types import Advance, Metrics, Rollout, TokenFigures


@dataclass(frozen=True, slots=True)
class Step:
    """A finished step."""

    seconds: float
    cpu_seconds: float
    """Of all threads."""
    rollouts: Sequence[Rollout]
    tokens: Sequence[TokenFigures]
    metrics: Metrics


class OurRun:
    """A session, and its steps."""

    def __init__(self, session: Session, case: Case) -> None:
        self.session, self.case = session, case
        self._next = session.first_step
        self._recorded: tuple[Any, ...] = ()
        record = session.record

        def remember(*results: Any) -> None:
            self._recorded = results
            record(*results)

        session.record = remember  # type: ignore[method-assign,assignment]
        session.policy.eos_ids = frozenset()

    def step(self) -> Step:
        """Take the next step. Raises SystemExit if a completion has another length."""
        began, cpu_began = time.perf_counter(), time.process_time()
        train_step(self.session, self._next)
        cpu_seconds, seconds = time.process_time() - cpu_began, time.perf_counter() - began
        self._next += 1
        _, rollouts, tokens, metrics = self._recorded
        lengths = {len(r.completion.token_ids) for r in rollouts}
        if lengths != {self.case.completion}:
            raise SystemExit(f"completions have {sorted(lengths)} tokens: {self.case.completion}")
        return Step(seconds, cpu_seconds, rollouts, tokens, metrics)


@contextlib.contextmanager
def open_run(case: Case, folder: Path) -> Iterator[OurRun]:
    """The case's run, in the folder. Raises UserError as `minidistill run` does."""
    loaded = load_config([str(write_case(case, folder))])
    prepared = prepare(loaded, RunDirectory(folder / "run"), resume=False)
    with open_session(prepared, Silent()) as session:
        yield OurRun(session, case)


def use_cpu(threads: int) -> None:
    """Compute on the CPU with this many threads, also where there is a GPU."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # read when CUDA is first used
    use_threads(threads)


def peak_rss() -> int:
    """Bytes that this process has held at most, since its program began."""
    status = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in status if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


class Silent:
    """A display that shows nothing."""

    def open(self, header: Header) -> None: ...

    @contextlib.contextmanager
    def phase(self, name: str, total: int, unit: str) -> Iterator[Advance]:
        yield lambda count: None

    def step(self, step: int, metrics: Metrics, sample: Sample | None) -> None: ...

    def evaluation(self, step: int, metrics: Metrics) -> None: ...

    def baseline(self, metrics: Metrics) -> None: ...

    def checkpoint(self, step: int, path: Path) -> None: ...

    def scoreboard(self, board: Mapping[str, Any]) -> None: ...

    def end(self, exit_code: int, directory: Path) -> None: ...

    def note(self, text: str, warning: bool = False) -> None: ...

    def close(self) -> None: ...
