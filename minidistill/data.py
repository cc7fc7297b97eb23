"""Which tasks a step trains on, and what their completions earned."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

import numpy as np

from minidistill.config import Config
from minidistill.config.orchestrator import EnvConfig
from minidistill.engines.base import Advance, stable_seed
from minidistill.envs import Environment, has_rewards, load_environment
from minidistill.errors import EXIT_HEALTH, UserError
from minidistill.types import Prompt, Reward, Rollout, Task


def load_environments(configs: Iterable[EnvConfig], where: str) -> dict[str, Environment]:
    """Environments by name, in the configuration's order."""
    return {
        config.name: load_environment(config.id, config.args, f"{where}.{index}")
        for index, config in enumerate(configs)
    }


def fingerprint(environments: Mapping[str, Environment], prompts: Iterable[Prompt]) -> str:
    """A hash of how many tasks there are, and of what `prompts` ask and are scored by."""
    sizes = [[name, len(e.train), len(e.eval)] for name, e in environments.items()]
    said = [[p.env, p.task.id, p.student_ids, p.teacher_ids, p.task.answer] for p in prompts]
    # of an answer that is no plain data only its kind is sure to be the same in every process
    text = json.dumps([sizes, said], skipkeys=True, default=lambda value: type(value).__name__)
    return hashlib.sha256(text.encode()).hexdigest()


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


class TaskSampler:
    """Every training task once an epoch, in an order that the seed and the epoch decide.

    What a step gets depends on its number alone, so a resumed run sees what it would have seen.
    """

    def __init__(self, environments: Mapping[str, Environment], seed: int) -> None:
        self.environments, self.seed = environments, seed
        self.starts = np.cumsum([0, *(len(e.train) for e in environments.values())])
        if not len(self):
            raise UserError(
                "the environments have no training tasks",
                where="orchestrator.env",
                fix="raise the number of training examples in their args",
            )
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def __len__(self) -> int:
        return int(self.starts[-1])

    def draw(self, step: int, count: int) -> list[tuple[str, Task]]:
        """The tasks of a step counted from 1, each with its environment's name."""
        names = list(self.environments)
        drawn = []
        for position in range((step - 1) * count, step * count):
            index = self._index(position)
            which = int(np.searchsorted(self.starts, index, side="right")) - 1
            task = self.environments[names[which]].train[index - int(self.starts[which])]
            drawn.append((names[which], task))
        return drawn

    def _index(self, position: int) -> int:
        epoch, offset = divmod(position, len(self))
        if self._order[0] != epoch:
            rng = np.random.default_rng(stable_seed(self.seed, "epoch", epoch))
            self._order = (epoch, rng.permutation(len(self)))
        return int(self._order[1][offset])


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
