"""The two ends of a run: the baseline before step 1 and the scoreboard after the last."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from minidistill.evaluation import scoreboard
from minidistill.evaluation.kl import drift_kl, held_out_kl
from minidistill.reporting.html import write_report
from minidistill.run.session import Session
from minidistill.trainer import checkpoint
from minidistill.types import Metrics, Role

LAST_STEPS = 10  # `teacher_kl_last` is the mean of that many


def baseline(session: Session) -> None:
    """Both roles' scores and the KL on held-out prompts, logged as step 0.

    What was found is kept in `baseline.json`, so that a resumed run need not find it again.
    """
    if session.evaluator is None:
        return
    found = session.dir.read("baseline.json")
    if found is None:
        began = time.perf_counter()
        found = {"rewards": {}, "heldout_kl": _held_out_kl(session)}
        if session.config.orchestrator.teacher_model.eval_baseline:
            student = session.evaluator.run("student", Role.TEACHER, context=False)
            teacher = session.evaluator.run("teacher", Role.TEACHER, context=True)
            found["length"] = student.length
            found["rewards"] = {
                "baseline_student": student.rewards,
                "baseline_teacher": teacher.rewards,
            }
        found["seconds"] = time.perf_counter() - began
        session.dir.write("baseline.json", found)
    metrics: Metrics = {"eval/heldout_kl": found["heldout_kl"], "time/eval": found["seconds"]}
    for name in session.evaluator.prompts if found["rewards"] else ():
        before, above = (_mean(by_env[name]) for by_env in found["rewards"].values())
        metrics[f"eval/{name}/baseline_student/avg"] = before
        metrics[f"eval/{name}/baseline_teacher/avg"] = above
        metrics[f"eval/{name}/baseline_diff"] = above - before
    session.log(0, metrics)
    if found["rewards"]:
        session.display.baseline(metrics)


def finish(session: Session) -> None:
    """Final evaluation, adapter, scoreboard and report."""
    before = session.dir.read("baseline.json") or {}
    board = _scores(session, before)
    kls = session.dir.column("teacher_kl")
    tail = kls[-LAST_STEPS:]
    board |= {
        "teacher_kl_first": kls[0],
        "teacher_kl_last": sum(tail) / len(tail),
        "heldout_kl_before": before.get("heldout_kl"),
        "heldout_kl_after": _held_out_kl(session) if session.evaluator else None,
        "drift_kl": drift_kl(session.config, session.policy, session.engine, session.builder),
        "steps": session.config.max_steps,
        "seconds": session.seconds,
    }
    saved = checkpoint.save_model(session.policy, session.dir.path)
    session.dir.write("scoreboard.json", board)
    session.display.scoreboard(board)
    session.monitor.close(board)
    report = write_report(session.dir.path)
    session.display.note(f"{saved.name}: {saved}  report: {report}")


def _scores(session: Session, before: dict[str, Any]) -> dict[str, Any]:
    """The scored part of the board; the final student is evaluated here."""
    if session.evaluator is None:
        return scoreboard.build({}, session.config.seed)
    found = dict(before.get("rewards", {}))
    student = session.evaluate(session.config.max_steps)
    found["student"] = student.rewards
    if "baseline_teacher" in found:
        again = session.evaluator.run("student with context", Role.STUDENT, context=True)
        found["student_with_context"] = again.rewards
    by_env = {
        name: {kind: rewards[name] for kind, rewards in found.items()} for name in student.rewards
    }
    lengths = {"length_before": before.get("length"), "length_after": student.length}
    return scoreboard.build(by_env, session.config.seed) | lengths


def _held_out_kl(session: Session) -> float:
    assert session.evaluator is not None
    return held_out_kl(
        session.config,
        session.policy,
        session.engine,
        session.evaluator.held_out(),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
