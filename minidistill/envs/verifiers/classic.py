"""Environments of verifiers 0.1.14 to 0.3: played in process, through a client of that package."""

from __future__ import annotations

from typing import Any

from minidistill.envs.multi_turn import Policy
from minidistill.envs.outcomes import ScoringError
from minidistill.envs.verifiers.client import MODEL, client_class
from minidistill.envs.verifiers.reward_errors import note_errors, noted_errors, rubrics_of
from minidistill.envs.verifiers.rows import Row, Source, plain_prompt, split_rows
from minidistill.errors import UserError
from minidistill.system.foreign import describe
from minidistill.types import Reward


class ClassicEnvironment:
    """Conversations that an `Environment` of verifiers drives. It scores them with its rubric."""

    def __init__(
        self, environment: Any, counts: tuple[int, int], seed: int, zero_errors: bool
    ) -> None:
        """Raises UserError if it cannot be played: rewards of a group, no rows."""
        self.environment, self.zero_errors = environment, zero_errors
        name = environment.env_id
        _refuse(name, environment)
        rubrics = list(rubrics_of(environment))
        for rubric in rubrics:
            note_errors(rubric)
        self.has_rewards = any(map(_gives_rewards, rubrics))
        held_out = environment.build_eval_dataset()
        train = environment.build_dataset()
        if train is None:  # it is for evaluation alone
            train, held_out = held_out, None
        self.train, self.eval = split_rows(
            map(_source, train), held_out and map(_source, held_out), counts, seed, name
        )
        self._client = client_class()

    async def rollout(self, task: Row, policy: Policy) -> Reward:
        """Play and score one row. What its own code raises is a failure of the conversation."""
        environment = self.environment
        with noted_errors() as errors:
            state = await environment.rollout(task.source, self._client(policy), MODEL, {})
            if (error := state.get("error")) is not None:
                raise ScoringError(describe(error.__cause__ or error))
            if not self.has_rewards:
                return Reward(0.0)
            await environment.rubric.score_rollout(state)
            await environment.rubric.cleanup(state)
        if errors and not self.zero_errors:
            raise ScoringError(errors[0])
        metrics = dict(state["metrics"] or {})
        if self.zero_errors:
            metrics["reward_errors"] = float(len(errors))
        return Reward(state["reward"], metrics)


def _refuse(name: str, environment: Any) -> None:
    members = [environment, *getattr(environment, "env_map", {}).values()]
    if any(getattr(member.rubric, "has_group_rewards", False) for member in members):
        raise UserError(
            f"verifiers: {name} has rewards that compare the answers of a group, and each "
            "conversation is scored alone",
            where="args",
            fix="use an environment whose reward functions score one answer",
        )


def _gives_rewards(rubric: Any) -> bool:
    """Whether a rubric has a function with a weight, or scores in a way of its own."""
    own = "verifiers" not in type(rubric).score_rollout.__module__.split(".")
    return own or any(rubric.weights)


def _source(row: dict[str, Any]) -> Source:
    return Source(plain_prompt(row["prompt"]), row.get("answer"), row, row)
