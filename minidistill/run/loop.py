"""The run: baseline, then sample → train → record a step at a time, then the scoreboard."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

from minidistill.config import LoadedConfig
from minidistill.errors import EXIT_INTERRUPTED, EXIT_OK
from minidistill.reporting.terminal import Display, open_display
from minidistill.run.outcome import baseline, finish
from minidistill.run.session import Session, finished_board


def run(loaded: LoadedConfig, *, resume: bool) -> int:
    """Carry out a run and return the exit code. Raises UserError for what the user can mend."""
    config = loaded.config
    display = open_display()
    try:
        if resume and (board := finished_board(loaded)):
            display.scoreboard(board)
            return EXIT_OK
        with Session(loaded, resume, display) as session, Interrupt(display) as interrupt:
            if session.first_step == 1:
                baseline(session)
            for step in range(session.first_step, config.max_steps + 1):
                rollouts = session.sample(step)
                session.train(step, rollouts)
                last = step == config.max_steps
                if not last and session.evaluation_due(step):
                    session.evaluate(step)
                if last or interrupt.asked or session.checkpoint_due(step):
                    session.checkpoint(step)
                if interrupt.asked and not last:
                    display.note(f"stopped after step {step}; --resume goes on from here", True)
                    return EXIT_INTERRUPTED
            finish(session)
            return EXIT_OK
    finally:
        display.close()


class Interrupt:
    """Ctrl-C and SIGTERM let the step end and be kept; a second one stops at once."""

    def __init__(self, display: Display) -> None:
        self.display = display
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        self.display.note("stopping after this step; once more stops at once", True)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
