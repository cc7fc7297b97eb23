"""The end of a run: final evaluation, adapter, scoreboard and report."""

from __future__ import annotations

import logging
from typing import Any

from minidistill.evaluation import scoreboard
from minidistill.evaluation.kl import drift_kl
from minidistill.reporting.html import write_report
from minidistill.run import baseline
from minidistill.run.session import Session
from minidistill.trainer import checkpoint
from minidistill.types import Role

logger = logging.getLogger(__name__)
LAST_STEPS = 10  # whose mean KL is `teacher_kl_last`


def finish(session: Session) -> None:
    """Evaluate the student, then write the adapter, the scoreboard and the report."""
    before = session.directory.read(baseline.FILE) or {}
    board = _scores(session, before)
    kls = session.directory.column("teacher_kl")
    last_kls = kls[-LAST_STEPS:]
    board |= {
        "teacher_kl_first": kls[0],
        "teacher_kl_last": sum(last_kls) / len(last_kls),
        "heldout_kl_before": before.get("heldout_kl"),
        "heldout_kl_after": session.held_out_kl() if session.evaluator else None,
        "drift_kl": drift_kl(
            session.config, session.policy, session.engine, session.builder, session.pass_tokens
        ),
        "steps": session.config.max_steps,
        "seconds": session.seconds,
    }
    saved = checkpoint.save_model(session.policy, session.directory.path)
    session.directory.write("scoreboard.json", board)
    session.display.scoreboard(board)
    session.monitor.close(board)
    report = write_report(session.directory.path)
    logger.info(f"{saved.name}: {saved}  report: {report}")


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
