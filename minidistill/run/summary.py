"""The end of a run: adapter, final evaluation, scoreboard and report."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from minidistill.envs import has_task
from minidistill.evaluation import scoreboard
from minidistill.evaluation.drift import judge_drift
from minidistill.evaluation.intervals import PromptSums
from minidistill.evaluation.side_by_side import after_training
from minidistill.evaluation.verdict import judge
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
COMPLETIONS = "completions"
LAST_STEPS = 10  # whose mean KL is `teacher_kl_last`


def finish(session: Session) -> None:
    """Write the adapter, evaluate the student, and write the scoreboard and the report.

    What is known is on disk before each pass that may fail.
    """
    directory = session.directory
    saved = checkpoint.save_model(session.policy, directory.path)
    before = directory.read(baseline.FILE) or {}
    board = _scores(session, before)
    board |= _training_kl(directory.column("teacher_kl"))
    board |= {"drift_kl": None, "steps": session.config.max_steps, "seconds": session.seconds}
    _fill_in(session, board, before)
    session.display.scoreboard(board)
    report = write_report(directory.path)
    logger.info(f"{saved.name}: {saved}  report: {report}")
    session.monitor.close({key: value for key, value in board.items() if key != COMPLETIONS})


def _training_kl(by_step: dict[int, float]) -> dict[str, float | None]:
    """The KL of the first step, and the mean of the last ones. The first is never among them."""
    last = [kl for step, kl in by_step.items() if step > 1][-LAST_STEPS:]
    return {
        "teacher_kl_first": by_step.get(1),
        "teacher_kl_last": sum(last) / len(last) if last else None,
    }


def _fill_in(session: Session, board: dict[str, Any], before: dict[str, Any]) -> None:
    """Compute the last figures, and write the scoreboard before and after each."""
    seed = session.config.seed
    heldout, unrelated = (baseline.kl_before(before, name) for name in ("heldout", "unrelated"))

    def heldout_figures(after: PromptSums | None) -> dict[str, Any]:
        figures = scoreboard.teacher_kl("heldout_kl", heldout, after, seed)
        if heldout is None:  # a baseline of an older version has the mean alone
            figures["heldout_kl_before"] = before.get("heldout_kl")
        return figures

    def heldout_kl() -> dict[str, Any]:
        kl = session.held_out_kl()
        figures = heldout_figures(kl.by_prompt)
        rows = before.get(COMPLETIONS)
        if rows is not None:
            figures[COMPLETIONS] = after_training(session.builder, rows, kl.completions)
        return figures

    def unrelated_kl() -> dict[str, Any]:
        kl = session.unrelated_kl()
        after = None if kl is None else kl.by_prompt
        return scoreboard.teacher_kl("unrelated_kl", unrelated, after, seed)

    board |= heldout_figures(None)
    board |= scoreboard.teacher_kl("unrelated_kl", unrelated, None, seed)
    board |= {COMPLETIONS: before.get(COMPLETIONS, [])}
    passes: dict[str, Callable[[], dict[str, Any]]] = {
        "heldout_kl_after": heldout_kl,
        "drift_kl": lambda: {"drift_kl": session.drift_kl()},
        "unrelated_kl_after": unrelated_kl,
    }
    if session.evaluator is None:
        del passes["heldout_kl_after"]
    prepared = session.prepared
    environments = *prepared.environments.values(), *prepared.evaluation_environments.values()
    is_task = any(map(has_task, environments))
    missing = list(passes)
    try:
        while True:
            board |= judge(board) | judge_drift(board, has_task=is_task)
            board["seconds"] = session.seconds
            session.directory.write(FILE, board | ({MISSING: missing} if missing else {}))
            if not missing:
                return
            board |= passes[missing[0]]()
            del missing[0]
    except BaseException:
        logger.warning(
            f"the adapter is saved; {FILE} lacks {' and '.join(missing)}, which --resume computes"
        )
        raise


def show_finished(directory: RunDirectory, display: Display) -> bool:
    """Show the scoreboard of a finished run, and write its report if there is none.

    Returns whether the run has finished.
    """
    board = directory.read(FILE)
    if not board or board.get(MISSING):
        return False
    display.scoreboard(board)
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
