"""The evaluation before step 1."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Annotated, Any, Self

from annotated_types import MinLen
from pydantic import BaseModel, NonNegativeInt, field_validator, model_validator

from minidistill.driver.selection import REWARD, pooled_mean
from minidistill.driver.session import Session
from minidistill.envs import has_rewards
from minidistill.evaluation import scoreboard
from minidistill.evaluation.intervals import PromptSums
from minidistill.evaluation.side_by_side import before_training
from minidistill.evaluation.verdict import NOTHING_TO_CLOSE, judge
from minidistill.reporting.run_directory import RunDirectory, damaged
from minidistill.trainer.policy import Weights
from minidistill.types import Metrics, Role

logger = logging.getLogger(__name__)
FILE = "baseline.json"
FIX = "restore it from a copy; if no step has been saved, delete it and --resume computes it again"


class _ByPrompt(BaseModel, strict=True):
    """A `PromptSums`."""

    mean: float
    sums: list[float]
    tokens: list[NonNegativeInt]

    @model_validator(mode="after")
    def _are_of_the_same_prompts(self) -> Self:
        if len(self.sums) != len(self.tokens):
            raise ValueError("sums and tokens have different lengths")
        return self


class _Baseline(BaseModel, strict=True):
    """What is read of `baseline.json`. Older versions wrote less."""

    rewards: dict[str, dict[str, Annotated[list[float], MinLen(1)]]]
    heldout_kl: float
    seconds: float
    heldout_by_prompt: _ByPrompt | None = None
    unrelated_by_prompt: _ByPrompt | None = None
    length: float | None = None
    completions: list[dict[str, Any]] = []

    @field_validator("rewards")
    @classmethod
    def _are_of_both_roles(cls, rewards: dict[str, Any]) -> dict[str, Any]:
        if rewards and tuple(rewards) != ("baseline_student", "baseline_teacher"):
            raise ValueError("it has other rewards than baseline_student and baseline_teacher")
        return rewards


def evaluate_baseline(session: Session) -> None:
    """Log both roles' rewards and the KL on held-out prompts, as step 0.

    Warns if there is no gap to close. The results are kept in `baseline.json`, so a resumed run
    does not evaluate again.
    """
    if session.evaluator is None:
        return
    results = read(session.directory, session.evaluator.prompts)
    if results is None:
        began = time.perf_counter()
        results = _evaluate(session)
        results["seconds"] = time.perf_counter() - began
        session.directory.add(FILE, results)
    metrics: Metrics = {"eval/heldout_kl": results["heldout_kl"], "time/eval": results["seconds"]}
    for name in session.evaluator.prompts if results["rewards"] else ():
        student_reward, teacher_reward = (
            _mean(by_env[name]) for by_env in results["rewards"].values()
        )
        metrics[f"eval/{name}/baseline_student/avg"] = student_reward
        metrics[f"eval/{name}/baseline_teacher/avg"] = teacher_reward
        metrics[f"eval/{name}/baseline_diff"] = teacher_reward - student_reward
    if results["rewards"] and "reward" in session.asked:
        metrics[REWARD] = pooled_mean(results["rewards"]["baseline_student"])
    session.log(0, metrics)
    session.monitor.samples(0, results.get("completions") or [])
    session.selection.take(0, metrics)
    session.display.baseline(metrics)
    for warning in _warnings(session, results):
        logger.warning(warning)


def read(directory: RunDirectory, environments: Iterable[str] = ()) -> dict[str, Any] | None:
    """The results that a run has kept, None without any. `environments` have been evaluated.

    Raises UserError (exit code 3) for a damaged file.
    """
    results: dict[str, Any] | None = directory.read(FILE, _Baseline, FIX)
    for by_env in (results or {}).get("rewards", {}).values():
        if missing := set(environments) - by_env.keys():
            raise damaged(directory.path / FILE, f"it lacks {', '.join(sorted(missing))}", FIX)
    return results


def _evaluate(session: Session) -> dict[str, Any]:
    """Everything that is measured before training."""
    assert session.evaluator is not None
    evaluator = session.evaluator
    teacher_texts = session.teacher_texts()
    held_out, unrelated = session.held_out_kl(), session.unrelated_kl()
    results: dict[str, Any] = {
        "rewards": {},
        "heldout_kl": held_out.mean,
        "heldout_by_prompt": asdict(held_out.by_prompt),
        "unrelated_by_prompt": None if unrelated is None else asdict(unrelated.by_prompt),
        "completions": before_training(held_out.prompts, held_out.texts, teacher_texts),
    }
    if session.config.orchestrator.teacher_model.eval_baseline:
        student = evaluator.run("student", _student_role(session), context=False)
        teacher = evaluator.run("teacher", Role.TEACHER, context=True)
        results["length"] = student.length
        results["rewards"] = {
            "baseline_student": student.rewards,
            "baseline_teacher": teacher.rewards,
        }
    return results


def kl_before(results: dict[str, Any], prompts: str) -> PromptSums | None:
    """The KL to the teacher before training on `heldout` or `unrelated` prompts, if it is known."""
    by_prompt = results.get(f"{prompts}_by_prompt")
    return None if by_prompt is None else PromptSums(**by_prompt)


def _warnings(session: Session, results: dict[str, Any]) -> list[str]:
    """A sentence for each environment, and for all together, if there is no gap to close."""
    rewards, seed = results["rewards"], session.config.seed
    scored = {
        name: {kind: by_env[name] for kind, by_env in rewards.items()}
        for name, environment in session.prepared.evaluation_environments.items()
        if has_rewards(environment)
    }
    board = scoreboard.build(scored, seed)
    board |= scoreboard.teacher_kl("heldout_kl", kl_before(results, "heldout"), None, seed)
    board |= judge(board)
    boards = {"": board}
    boards |= {f"{name}: ": part for name, part in board.get("per_env", {}).items()}
    return [
        f"{name}{part['verdict']} The scoreboard will have no percentage."
        for name, part in boards.items()
        if part["outcome"] in NOTHING_TO_CLOSE
    ]


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
