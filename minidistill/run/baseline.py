"""The evaluation before step 1."""

from __future__ import annotations

import time
from collections.abc import Sequence

from minidistill.run.session import Session
from minidistill.trainer.policy import Weights
from minidistill.types import Metrics, Role

FILE = "baseline.json"


def evaluate_baseline(session: Session) -> None:
    """Log both roles' rewards and the KL on held-out prompts, as step 0.

    The results are kept in `baseline.json`, so a resumed run does not evaluate again.
    """
    evaluator = session.evaluator
    if evaluator is None:
        return
    results = session.directory.read(FILE)
    if results is None:
        began = time.perf_counter()
        results = {"rewards": {}, "heldout_kl": session.held_out_kl()}
        if session.config.orchestrator.teacher_model.eval_baseline:
            student = evaluator.run("student", _student_role(session), context=False)
            teacher = evaluator.run("teacher", Role.TEACHER, context=True)
            results["length"] = student.length
            results["rewards"] = {
                "baseline_student": student.rewards,
                "baseline_teacher": teacher.rewards,
            }
        results["seconds"] = time.perf_counter() - began
        session.directory.write(FILE, results)
    metrics: Metrics = {"eval/heldout_kl": results["heldout_kl"], "time/eval": results["seconds"]}
    for name in evaluator.prompts if results["rewards"] else ():
        student_reward, teacher_reward = (
            _mean(by_env[name]) for by_env in results["rewards"].values()
        )
        metrics[f"eval/{name}/baseline_student/avg"] = student_reward
        metrics[f"eval/{name}/baseline_teacher/avg"] = teacher_reward
        metrics[f"eval/{name}/baseline_diff"] = teacher_reward - student_reward
    session.log(0, metrics)
    if results["rewards"]:
        session.display.baseline(metrics)


def _student_role(session: Session) -> Role:
    """The role that samples as the untrained student does, the cheaper one if there are two.

    Unless the teacher is another model, or the student starts from a trained adapter, the teacher's
    weights are the student's before training, and it runs without the adapter.
    """
    policy = session.policy
    differs = policy.teacher_weights is Weights.OTHER or not policy.starts_as_base
    return Role.STUDENT if differs else Role.TEACHER


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
