"""The end of a run: adapter, final evaluation, scoreboard and report."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from minidistill.config import Config
from minidistill.driver import baseline
from minidistill.driver.resume import STOPPED
from minidistill.driver.selection import NAMES
from minidistill.driver.session import Session
from minidistill.envs import has_task
from minidistill.errors import UserError
from minidistill.evaluation import scoreboard
from minidistill.evaluation.drift import judge_drift
from minidistill.evaluation.groups import by_context, by_environment
from minidistill.evaluation.kl import SampledKL
from minidistill.evaluation.side_by_side import after_training
from minidistill.evaluation.verdict import judge
from minidistill.reporting.html import has_report, write_report
from minidistill.reporting.monitors import Monitor, check_monitors, open_monitors
from minidistill.reporting.records import METRICS
from minidistill.reporting.run_directory import SCOREBOARD, RunDirectory, finite
from minidistill.reporting.terminal.base import Display
from minidistill.system.files import shown_path
from minidistill.system.foreign import describe
from minidistill.trainer import checkpoint
from minidistill.types import Role

logger = logging.getLogger(__name__)
MISSING = "missing"
"""The scoreboard's figures that are still to be computed. A finished run's has no such key."""
COMPLETIONS = "completions"
LAST_STEPS = 10  # whose mean KL is `teacher_kl_last`

Pass = Callable[[], dict[str, Any]]
"""Computes figures of the scoreboard."""


def finish(session: Session) -> None:
    """Write the adapter, evaluate the student, and write the scoreboard and the report.

    What is known is on disk before each pass that may fail. The records list the adapter when it
    is complete, and the scoreboard when all else is.
    """
    directory = session.directory
    if session.asked:
        _choose_weights(session)
    saved = checkpoint.save_model(session.policy, directory.path)
    files = sorted(path for path in saved.rglob("*") if path.is_file())
    directory.records.add_files(str(path.relative_to(directory.path)) for path in files)
    before = baseline.read(directory) or {}
    board = _scores(session, before)
    selection, last = session.selection, session.last_step
    chosen = last if selection.best is None else selection.best.step
    by_step = directory.column("teacher_kl")
    board |= _training_kl({step: kl for step, kl in by_step.items() if step <= chosen})
    for prompts in ("heldout", "unrelated"):
        board |= _teacher_kl(session, before, prompts, None)
    board |= {
        "drift_kl": None,
        COMPLETIONS: before.get(COMPLETIONS, []),
        "steps": last,
        "seconds": session.seconds,
    }
    if selection.best is not None:
        board["weights"] = f"of step {chosen}: {selection.described()}"
        board |= {"best_step": chosen, "best_value": selection.best.value}
    if selection.stopped is not None and last < session.config.max_steps:
        board[STOPPED] = selection.stopped
        logger.info(selection.stopped)
    _fill_in(session, board, _last_passes(session, before))
    session.display.scoreboard(board)
    report = write_run_report(directory)
    end = f"  report: {shown_path(report)}" if report else ""
    of_step = "" if selection.best is None else f", {board['weights']}"
    logger.info(f"{saved.name}: {shown_path(saved)}{of_step}{end}")
    _end(directory, board, session.monitor)


def _choose_weights(session: Session) -> None:
    """Evaluate the last step, and take the weights of the best one if the run asks for it."""
    if not session.is_evaluated(session.last_step):
        session.evaluate(session.last_step)
    session.restore_best()
    if session.config.ckpt.best is not None and session.selection.best is None:
        logger.warning(
            f"no evaluation has a finite {NAMES[session.config.ckpt.best]}, so none is the best: "
            "the weights are those of the last step"
        )


def _training_kl(by_step: dict[int, float]) -> dict[str, float | None]:
    """The KL of the first step, and the mean of the last ones. The first is never among them."""
    last = [kl for step, kl in by_step.items() if step > 1][-LAST_STEPS:]
    return {
        "teacher_kl_first": by_step.get(1),
        "teacher_kl_last": sum(last) / len(last) if last else None,
    }


def _last_passes(session: Session, before: dict[str, Any]) -> dict[str, Pass]:
    """What the last passes compute, by the figure that is missing without them.

    `before` is what was measured before training.
    """

    def heldout_kl() -> dict[str, Any]:
        kl = session.held_out_kl()
        figures = _teacher_kl(session, before, "heldout", kl)
        assert session.evaluator is not None
        prompts, known = session.evaluator.held_out(), baseline.kl_before(before, "heldout")
        figures |= by_environment(prompts, known, kl.by_prompt, session.config.seed)
        figures |= by_context(prompts, known, kl.by_prompt, session.prepared.context_count)
        if COMPLETIONS in before:
            figures[COMPLETIONS] = after_training(before[COMPLETIONS], kl.texts)
        return figures

    def drift_kl() -> dict[str, Any]:
        kl = session.drift_kl()
        return {"drift_kl": None if kl is None else finite(kl)}

    def unrelated_kl() -> dict[str, Any]:
        return _teacher_kl(session, before, "unrelated", session.unrelated_kl())

    always: dict[str, Pass] = {"drift_kl": drift_kl, "unrelated_kl_after": unrelated_kl}
    return always if session.evaluator is None else {"heldout_kl_after": heldout_kl} | always


def _teacher_kl(
    session: Session, before: dict[str, Any], prompts: str, after: SampledKL | None
) -> dict[str, Any]:
    """The scoreboard's figures of the KL to the teacher on `heldout` or `unrelated` prompts."""
    name, known = f"{prompts}_kl", baseline.kl_before(before, prompts)
    by_prompt = None if after is None else after.by_prompt
    figures = scoreboard.teacher_kl(name, known, by_prompt, session.config.seed)
    if known is None:  # a baseline of an older version has the mean alone
        figures[f"{name}_before"] = before.get(name)
    return figures


def _fill_in(session: Session, board: dict[str, Any], passes: dict[str, Pass]) -> None:
    """Write the scoreboard, with its verdict, before and after each of the last passes."""
    prepared = session.prepared
    environments = *prepared.environments.values(), *prepared.evaluation_environments.values()
    is_task = any(map(has_task, environments))
    missing = list(passes)
    try:
        while True:
            board |= judge(board) | judge_drift(board, has_task=is_task)
            board["seconds"] = session.seconds
            session.directory.write(SCOREBOARD, board | ({MISSING: missing} if missing else {}))
            if not missing:
                return
            board |= passes[missing[0]]()
            del missing[0]
    except BaseException:
        logger.warning(
            f"the adapter is saved; {SCOREBOARD} lacks {' and '.join(missing)}, "
            "which --resume computes"
        )
        raise


def show_finished(directory: RunDirectory, display: Display, config: Config) -> bool:
    """Say that a run has finished and show its scoreboard. Make the parts that it lacks.

    Returns False if the run has not finished, or if its end has to be repeated: its last step is
    restored then.
    """
    if (board := _whole_board(directory)) is None:
        return False
    folder = "adapter" if config.trainer.model.lora else "model"
    listed = directory.records.listed()  # nothing by older versions
    saved = any(name.startswith(f"{folder}/") for name in listed)
    if not saved and (listed or not (directory.path / folder).is_dir()):
        return False
    display.scoreboard(board)
    if not has_report(directory.path):
        write_run_report(directory)
    if listed and SCOREBOARD not in listed:  # it was killed before its monitors had the scoreboard
        check_monitors(config)
        _end(directory, board, open_monitors(config, directory.path, board["steps"] + 1))
    further = "A larger --max_steps extends it"
    if board.get(STOPPED):
        further = "It stopped early: a larger --early_stopping.patience continues it"
    logger.info(
        f"{shown_path(directory.path)} is already finished: {board['steps']} steps. {further}"
    )
    return True


def write_run_report(directory: RunDirectory) -> Path | None:
    """Write the report and return its path. If that fails, warn: the report is not worth a run."""
    try:
        return write_report(directory.path)
    except Exception as error:
        reason = error.what if isinstance(error, UserError) else describe(error)
        logger.warning(
            f"no report: {reason}; `minidistill report {directory.path}` writes it again",
            exc_info=error,
        )
        return None


def _whole_board(directory: RunDirectory) -> dict[str, Any] | None:
    """The scoreboard of a run whose files are as they were written; else None, and a warning."""
    if not (directory.path / SCOREBOARD).exists():
        return None
    board: dict[str, Any] | None = None
    try:
        board = directory.read(SCOREBOARD, _Board)
        problem = directory.records.damage()
    except UserError as error:
        problem = error.what
    if problem is not None:
        logger.warning(f"{problem}: the run's end is repeated from its last checkpoint")
        return None
    return None if board is None or board.get(MISSING) else board


def _end(directory: RunDirectory, board: dict[str, Any], monitor: Monitor) -> None:
    """Send the scoreboard to the monitors, and list it: the run has all of its parts then."""
    monitor.samples(board["steps"], board.get(COMPLETIONS) or [])
    monitor.close({key: value for key, value in board.items() if key != COMPLETIONS})
    directory.records.add_files((METRICS, SCOREBOARD))
    directory.records.flush()


class _Board(BaseModel, strict=True):
    """What is read of `scoreboard.json` again. Displays show the rest whatever it is."""

    steps: int
    seconds: float
    missing: list[str] = []


def _scores(session: Session, before: dict[str, Any]) -> dict[str, Any]:
    """The scored part of the scoreboard. Evaluates the final student."""
    if session.evaluator is None:
        return scoreboard.build({}, session.config.seed)
    rewards = dict(before.get("rewards", {}))
    if not session.asked:
        student = session.evaluate(session.last_step)
    else:  # its record is there
        student = session.scores or session.evaluator.run("student", Role.STUDENT, context=False)
    rewards["student"] = student.rewards
    if "baseline_teacher" in rewards:
        in_context = session.evaluator.run("student with context", Role.STUDENT, context=True)
        rewards["student_with_context"] = in_context.rewards
    by_env = {
        name: {kind: values[name] for kind, values in rewards.items()} for name in student.rewards
    }
    lengths = {"length_before": before.get("length"), "length_after": student.length}
    return scoreboard.build(by_env, session.config.seed) | lengths
