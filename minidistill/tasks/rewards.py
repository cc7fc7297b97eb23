"""Rewards and advantages of rollouts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from itertools import groupby

import numpy as np

from minidistill.config import Config
from minidistill.envs import Environment, has_rewards
from minidistill.errors import EXIT_HEALTH, UserError
from minidistill.types import Advance, Reward, Rollout


def check_rewards(
    config: Config, environments: Mapping[str, Environment], evaluated: bool = False
) -> None:
    """Raise UserError if training needs a reward (or, with `evaluated`, the baseline does) and an
    environment has none. Without this check, zeros would be reported as rewards."""
    orchestrator, adv_tau = config.orchestrator, config.trainer.loss.adv_tau
    if evaluated:
        needed, reason = orchestrator.teacher_model.eval_baseline, "eval_baseline = true"
        where, fix = "orchestrator.teacher_model.eval_baseline", "set eval_baseline = false"
    else:
        needed = not orchestrator.buffer.skip_verification
        reason = f"training with adv_tau = {adv_tau:g} and skip_verification = false"
        where = "trainer.loss.adv_tau, orchestrator.buffer.skip_verification"
        fix = "set adv_tau = 0 and skip_verification = true"
    without = [name for name, env in environments.items() if not has_rewards(env)]
    if needed and without:
        raise UserError(
            f"the environment {without[0]!r} has no reward, and {reason} needs one",
            where=where,
            fix=f"{fix}, or use an environment with a reward",
        )


def score(
    environments: Mapping[str, Environment], rollouts: Sequence[Rollout], advance: Advance
) -> tuple[list[Reward | None], list[str]]:
    """The reward of each rollout, None if its environment raised, and the errors raised."""
    rewards: list[Reward | None] = []
    errors = []
    for rollout in rollouts:
        task = rollout.prompt.task
        try:
            reward = environments[rollout.prompt.env].score(task, rollout.text)
            if not math.isfinite(reward.value):
                raise ValueError(f"the reward is {reward.value}")
            # scalars of numpy and torch become plain floats, which JSON can hold
            metrics = {name: float(value) for name, value in reward.metrics.items()}
            rewards.append(Reward(float(reward.value), metrics))
        except Exception as error:  # an environment is third-party code
            rewards.append(None)
            errors.append(f"task {task.id}: {type(error).__name__}: {error}")
        advance(1)
    return rewards, errors


def check_errors(errors: Sequence[str], total: int, limit: float) -> None:
    """Raise UserError (exit code 4) if more than the share `limit` of rollouts failed, or all."""
    if errors and (len(errors) == total or len(errors) / total > limit):
        raise UserError(
            f"the environment failed on {len(errors)} of {total} rollouts, first: {errors[0]}",
            where="orchestrator.env",
            fix="fix the environment, or raise orchestrator.max_env_error_frac; "
            "--resume continues from the last checkpoint",
            exit_code=EXIT_HEALTH,
        )


def with_advantages(rollouts: Sequence[Rollout], std_norm: bool) -> list[Rollout]:
    """The rollouts with their advantages: reward minus the mean reward of the group.

    A group is a run of consecutive rollouts of the same prompt; a group of one has advantage 0.
    `std_norm` also divides by the group's population standard deviation, unless that is 0.
    """
    out = []
    for _, rollouts_of_prompt in groupby(rollouts, key=lambda r: id(r.prompt)):
        group = list(rollouts_of_prompt)
        rewards = np.array([r.reward.value if r.reward else 0.0 for r in group])
        advantages = rewards - rewards.mean()
        if std_norm and rewards.std() > 1e-8:
            advantages = advantages / rewards.std()
        out += [
            dataclasses.replace(r, advantage=float(a))
            for r, a in zip(group, advantages, strict=True)
        ]
    return out
