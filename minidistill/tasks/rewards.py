"""Rewards and advantages of rollouts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby

import numpy as np

from minidistill.config import Config
from minidistill.envs import Environment, has_rewards
from minidistill.envs.outcomes import Attempt, Outcome, ScoringError, score_attempts
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
    environments: Mapping[str, Environment],
    rollouts: Sequence[Rollout],
    advance: Advance,
    check: Callable[[Sequence[str]], None] = lambda errors: None,
) -> tuple[list[Reward | None], list[str]]:
    """The reward of each rollout, None if its environment failed, and the failures.

    `check` is called with the failures at the end, and after each that took long, so that it can
    stop the scoring by raising. An environment that cannot score any more raises CannotScoreError.
    """
    rewards: list[Reward | None] = [None] * len(rollouts)
    failures: dict[int, str] = {}

    def report(row: int, outcome: Outcome) -> None:
        if isinstance(outcome, Reward):
            rewards[row] = outcome
        else:
            prompt = rollouts[row].prompt
            failures[row] = f"task {prompt.task.id} of {prompt.env}: {outcome}"
        advance(1)
        if isinstance(outcome, ScoringError) and outcome.slow:
            check(in_order())

    def in_order() -> list[str]:
        return [failures[row] for row in sorted(failures)]

    rows_by_env: dict[str, list[int]] = {}
    for row, rollout in enumerate(rollouts):
        rows_by_env.setdefault(rollout.prompt.env, []).append(row)
    for name, rows in rows_by_env.items():
        attempts = [
            Attempt(r.prompt.task, r.text, len(r.completion.token_ids))
            for r in (rollouts[row] for row in rows)
        ]

        def report_attempt(index: int, outcome: Outcome, rows: Sequence[int] = rows) -> None:
            report(rows[index], outcome)

        score_attempts(environments[name], attempts, report_attempt)
    check(in_order())
    return rewards, in_order()


def check_errors(errors: Sequence[str], total: int, limit: float) -> None:
    """Raise UserError (exit code 4) if more than the share `limit` of rollouts failed, or all."""
    if errors and (len(errors) == total or not len(errors) / total <= limit):
        raise UserError(
            f"the environment failed on {len(errors)} of {total} rollouts, first: {errors[0]}",
            where="orchestrator.env",
            fix="fix the environment, or raise orchestrator.max_env_error_frac, or score_timeout "
            "in its table if it needs more time; --resume continues from the last checkpoint",
            exit_code=EXIT_HEALTH,
        )


def with_advantages(rollouts: Sequence[Rollout], std_norm: bool) -> list[Rollout]:
    """The rollouts with their advantages: reward minus the mean reward of the group.

    A group is a run of consecutive rollouts of the same prompt; a group of one has advantage 0. A
    conversation counts once in the mean, however many samples it has.
    `std_norm` also divides by the group's population standard deviation, unless that is 0. Raises
    UserError (exit code 4) if the mean is not finite.
    """
    out = []
    for _, rollouts_of_prompt in groupby(rollouts, key=lambda r: id(r.group)):
        group = list(rollouts_of_prompt)
        rewards = np.array([r.reward.value if r.reward else 0.0 for r in group])
        once = rewards[[r.part == 0 for r in group]]
        with np.errstate(over="ignore", invalid="ignore"):
            advantages = rewards - once.mean()
            if std_norm and (deviation := once.std()) > 1e-8:
                # an infinite one would make each advantage 0
                advantages = advantages / (deviation if np.isfinite(deviation) else np.nan)
            fits = np.isfinite(advantages.astype(np.float32)).all()  # as the loss has them
        if not fits:  # finite rewards, whose sum or square may not be
            raise UserError(
                f"the rewards of task {group[0].group.task.id} are too large for their mean: "
                f"{', '.join(f'{reward:g}' for reward in rewards)}",
                where="orchestrator.env",
                fix=f"scale the reward of {group[0].prompt.env!r}",
                exit_code=EXIT_HEALTH,
            )
        out += [
            dataclasses.replace(r, advantage=float(a))
            for r, a in zip(group, advantages, strict=True)
        ]
    return out
