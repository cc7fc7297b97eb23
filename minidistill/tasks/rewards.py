"""Which tasks a step trains on, and what their completions earned."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from itertools import groupby

import numpy as np

from minidistill.config import Config
from minidistill.engines.base import Advance
from minidistill.envs import Environment, has_rewards
from minidistill.errors import EXIT_HEALTH, UserError
from minidistill.types import Reward, Rollout


def check_rewards(
    config: Config, environments: Mapping[str, Environment], evaluated: bool = False
) -> None:
    """Raise UserError where training (or, `evaluated`, the baseline) asks for a reward and an
    environment has none: figures of nothing would look like figures."""
    orchestrator, adv_tau = config.orchestrator, config.trainer.loss.adv_tau
    if evaluated:
        asked, by = orchestrator.teacher_model.eval_baseline, "eval_baseline = true"
        where, fix = "orchestrator.teacher_model.eval_baseline", "set eval_baseline = false"
    else:
        asked = not orchestrator.buffer.skip_verification
        by = f"training with adv_tau = {adv_tau:g} and skip_verification = false"
        where = "trainer.loss.adv_tau, orchestrator.buffer.skip_verification"
        fix = "set adv_tau = 0 and skip_verification = true"
    without = [name for name, found in environments.items() if not has_rewards(found)]
    if asked and without:
        raise UserError(
            f"the environment {without[0]!r} has no reward, and {by} asks for one",
            where=where,
            fix=f"{fix}, or use an environment with a reward",
        )


def score(
    environments: Mapping[str, Environment], rollouts: Sequence[Rollout], advance: Advance
) -> tuple[list[Reward | None], list[str]]:
    """Each rollout's reward, None where its environment raised, and what was raised."""
    rewards: list[Reward | None] = []
    errors = []
    for rollout in rollouts:
        task = rollout.prompt.task
        try:
            reward = environments[rollout.prompt.env].score(task, rollout.text)
            if not math.isfinite(reward.value):
                raise ValueError(f"the reward is {reward.value}")
            # numpy's and torch's scalars too become what JSON can hold
            figures = {name: float(value) for name, value in reward.metrics.items()}
            rewards.append(Reward(float(reward.value), figures))
        except Exception as error:  # an environment is anybody's code
            rewards.append(None)
            errors.append(f"task {task.id}: {type(error).__name__}: {error}")
        advance(1)
    return rewards, errors


def check_errors(errors: Sequence[str], total: int, limit: float) -> None:
    """Raise UserError (exit code 4) where more than `limit` of `total` rollouts failed, or all."""
    if errors and (len(errors) == total or len(errors) / total > limit):
        raise UserError(
            f"the environment failed on {len(errors)} of {total} rollouts, first: {errors[0]}",
            where="orchestrator.env",
            fix="mend the environment, or raise orchestrator.max_env_error_frac; "
            "--resume goes on from the last checkpoint",
            exit_code=EXIT_HEALTH,
        )


def with_advantages(rollouts: Sequence[Rollout], std_norm: bool) -> list[Rollout]:
    """Each rollout's reward minus its prompt's mean reward; 0 in a group of one.

    Rollouts of one prompt stand together. `std_norm` divides by the group's standard deviation
    (population; groups of equal rewards stay 0).
    """
    out = []
    for _, same in groupby(rollouts, key=lambda r: id(r.prompt)):
        group = list(same)
        rewards = np.array([r.reward.value if r.reward else 0.0 for r in group])
        advantages = rewards - rewards.mean()
        if std_norm and rewards.std() > 1e-8:
            advantages = advantages / rewards.std()
        out += [
            dataclasses.replace(r, advantage=float(a))
            for r, a in zip(group, advantages, strict=True)
        ]
    return out
