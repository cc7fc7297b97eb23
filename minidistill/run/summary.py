"""The end of a run: adapter, final evaluation, scoreboard and report."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from minidistill.evaluation import scoreboard
from minidistill.reporting.html import write_report
from minidistill.reporting.run_directory import RunDirectory
from minidistill.reporting.terminal.base import Display
from minidistill.run import baseline
from minidistill.run.session import Session
from minidistill.trainer import checkpoint
from minidistill.types import Role

logger = logging.getLogger(__name__)
FILE = "scoreboard.json"
MISSING = "missing"
"""The scoreboard's figures that are still to be computed. A finished run's has no such key."""
LAST_STEPS = 10  # whose mean KL is `teacher_kl_last`


def finish(session: Session) -> None:
    """Write the adapter, evaluate the student, and write the scoreboard and the report.

    What is known is on disk before each pass that may fail.
    """
    directory = session.directory
    saved = checkpoint.save_model(session.policy, directory.path)
    before = directory.read(baseline.FILE) or {}
    board = _scores(session, before)
    kls = directory.column("teacher_kl")
    last_kls = kls[-LAST_STEPS:]
    board |= {
        "teacher_kl_first": kls[0],
        "teacher_kl_last": sum(last_kls) / len(last_kls),
        "heldout_kl_before": before.get("heldout_kl"),
        "heldout_kl_after": None,
        "drift_kl": None,
        "steps": session.config.max_steps,
        "seconds": session.seconds,
    }
    passes: dict[str, Callable[[], float | None]] = {"drift_kl": session.drift_kl}
    if session.evaluator is not None:
        passes = {"heldout_kl_after": session.held_out_kl} | passes
    _fill_in(session, board, passes)
    session.display.scoreboard(board)
    report = write_report(directory.path)
    logger.info(f"{saved.name}: {saved}  report: {report}")
    session.monitor.close(board)


def _fill_in(
    session: Session, board: dict[str, Any], passes: dict[str, Callable[[], float | None]]
) -> None:
    """Write the scoreboard with each figure as it is computed."""
    missing = list(passes)
    try:
        while missing:
            session.directory.write(FILE, board | {MISSING: missing})
            board[missing[0]] = passes[missing[0]]()
            del missing[0]
    except BaseException:
        logger.warning(
            f"the adapter is saved; {FILE} lacks {' and '.join(missing)}, which --resume computes"
        )
        raise
    board["seconds"] = session.seconds
    session.directory.write(FILE, board)


def show_finished(directory: RunDirectory, display: Display) -> bool:
    """Say that a run has finished and show its scoreboard. Write its report if there is none.

    Returns False, and does nothing, if the run has not finished.
    """
    board = directory.read(FILE)
    if not board or board.get(MISSING):
        return False
    display.scoreboard(board)
    logger.info(
        f"{directory.path} is already finished: {board['steps']} steps. A larger --max_steps "
        "extends it"
    )
    if not (directory.path / "report.html").exists():
        write_report(directory.path)
    return True


def _scores(session: Session, before: dict[str, Any]) -> dict[str, Any]:
    """The scored part of the scoreboard. Evaluates the final student."""
    if session.evaluator is None:
        return scoreboard.build({}, session.config.seed)
    rewards = dict(before.get("rewards", {}))
    student = session.evaluate(session.config.max_steps)
    rewards["student"] = student.rewards
    if "baseline_teacher" in rewards:
        in_context = session.evaluator.run("student with context", Role.STUDENT, context=True)
        rewards["student_with_context"] = in_context.rewards
    by_env = {
        name: {kind: values[name] for kind, values in rewards.items()} for name in student.rewards
    }
    lengths = {"length_before": before.get("length"), "length_after": student.length}
    return scoreboard.build(by_env, session.config.seed) | lengths
