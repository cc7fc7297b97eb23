"""A run: the baseline, then collect → train → sync a step at a time, then the scoreboard."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from minidistill import logs
from minidistill.config import LoadedConfig
from minidistill.driver.baseline import evaluate_baseline
from minidistill.driver.prepare import prepare
from minidistill.driver.resume import is_extended, with_recorded_adapter
from minidistill.driver.session import Session, open_session
from minidistill.driver.summary import finish, show_finished
from minidistill.errors import EXIT_INTERRUPTED, EXIT_OK
from minidistill.reporting.run_directory import RunDirectory
from minidistill.reporting.run_path import claim_path
from minidistill.reporting.terminal import (
    Display,
    SafeDisplay,
    lasting_output,
    open_display,
)
from minidistill.rollouts.stream_collector import StreamCollector
from minidistill.system.foreign import Interrupted, check_interrupted, handling
from minidistill.trainer.step import StepResult
from minidistill.types import Metrics

logger = logging.getLogger(__name__)


def run(
    loaded: LoadedConfig,
    *,
    resume: bool,
    display: Display | None = None,
    claimed: Callable[[Path], None] = lambda path: None,
) -> int:
    """Execute a run and return its exit code. Raises UserError for errors the user can fix.

    `display` shows it; by default what suits standard output. `claimed` is called with the run's
    directory, before anything is checked or written.
    """
    with (
        lasting_output(),
        contextlib.closing(SafeDisplay(display or open_display())) as shown,
        logs.to_terminal(shown.note),
        _hangups(),
        claim_path(loaded, resume) as path,
    ):
        claimed(path)
        directory = RunDirectory(path)
        if resume:
            loaded = with_recorded_adapter(loaded, directory)
        with logs.to_file(directory.log_path):
            same = resume and not is_extended(loaded, directory)
            code = EXIT_OK
            if not (same and show_finished(directory, shown, loaded.config)):
                prepared = prepare(loaded, directory, resume, shown.phase)
                with open_session(prepared, shown) as session, _interrupts() as interrupt:
                    check_interrupted()
                    code = _run(session, interrupt)
            shown.end(code, path)
            return code


def _run(session: Session, interrupt: Interrupt) -> int:
    if session.first_step == 1:
        evaluate_baseline(session)
    elif session.evaluation_missing():
        session.evaluate(session.first_step - 1)
    last = session.config.max_steps
    for step in range(session.first_step, last + 1):
        if session.selection.stopped:  # a resumed run had come to its end
            break
        train_step(session, step)
        if session.problem is not None:
            session.save_checkpoint(step)
            raise session.problem
        if step < last and session.evaluation_due(step):
            session.evaluate(step)
        ends = step == last or session.selection.stopped is not None
        if ends or interrupt.requested or session.checkpoint_due(step):
            session.save_checkpoint(step)
        if interrupt.requested and not ends:
            logger.warning(f"stopped after step {step}; --resume continues from here")
            return EXIT_INTERRUPTED
    finish(session)
    return EXIT_OK


def train_step(session: Session, step: int) -> None:
    """Collect a step's rollouts, train on them, and send the new weights to the engine."""
    step_began = time.perf_counter()
    if session.stream_collector is not None:
        result, metrics = _streamed_step(session, session.stream_collector, step)
    else:
        result, metrics = _plain_step(session, step)
    sync_began = time.perf_counter()
    session.engine.sync(step)
    now = time.perf_counter()
    seconds = now - step_began
    tokens = sum(len(r.completion.token_ids) for r in result.rollouts)
    metrics |= {"time/sync": now - sync_began, "time/step": seconds}
    metrics["perf/tokens_per_second"] = tokens / seconds
    session.record(step, result.rollouts, result.tokens, metrics)


def _plain_step(session: Session, step: int) -> tuple[StepResult, Metrics]:
    rollouts, collected = session.collect(step)
    tokens = sum(len(r.completion.token_ids) for r in rollouts)
    if session.async_collector is None:
        session.engine.sleep()
    with session.display.phase("train", tokens, "tokens") as advance:
        result = session.trainer.step(rollouts, step, advance)
    return result, result.metrics | collected


def _streamed_step(
    session: Session, collector: StreamCollector, step: int
) -> tuple[StepResult, Metrics]:
    """Train on complete groups while others are sampled."""
    stream = collector.start(step, step - 1)
    with session.display.phase("train", stream.size, "rollouts") as advance:
        result = session.trainer.stream_step(stream.rollouts, step, advance)
    return stream.by_number(result), stream.metrics(result.metrics)


class Interrupt:
    """Whether the run was told to stop, by Ctrl-C or SIGTERM."""

    requested = False

    def handle(self, signum: int, frame: FrameType | None) -> None:
        """Stop after the current step, which is saved. A second signal stops at once."""
        if self.requested:
            raise Interrupted
        self.requested = True
        _say("stopping after this step; press Ctrl-C again to stop now")


@contextlib.contextmanager
def _interrupts() -> Iterator[Interrupt]:
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():  # only that one gets signals
        yield interrupt
        return
    before = {
        signum: signal.signal(signum, interrupt.handle)
        for signum in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield interrupt
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@contextlib.contextmanager
def _hangups() -> Iterator[None]:
    """A terminal that goes away (SIGHUP) does not end the run. `nohup` has that effect already."""
    said = False

    def hung_up(signum: int, frame: FrameType | None) -> None:
        nonlocal said
        if not said:
            said = True
            _say("the terminal is gone (SIGHUP): the run goes on, SIGTERM ends it")

    with handling(signal.SIGHUP, signal.SIG_DFL, hung_up):
        yield


def _say(message: str) -> None:
    """Warn, in a signal handler.

    From a thread: this one may be writing to the same stream, which is not reentrant.
    """
    with contextlib.suppress(RuntimeError):  # no more threads: the signal counts all the same
        threading.Thread(target=logger.warning, args=(message,)).start()
