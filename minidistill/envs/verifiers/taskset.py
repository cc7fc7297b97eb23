"""Task sets of verifiers 0.4, each of whose conversations asks an endpoint of the policy."""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
from collections.abc import Iterable, Iterator
from importlib import import_module
from typing import Any

from minidistill.envs.endpoint import Endpoint
from minidistill.envs.multi_turn import Policy
from minidistill.envs.outcomes import ScoringError
from minidistill.envs.verifiers.rows import Row, Source, plain_prompt, split_rows
from minidistill.errors import UserError
from minidistill.types import Reward

MODEL = "policy"
HARNESS = "minidistill_chat"
"""The name that verifiers finds our harness by: it takes those of modules, without dots."""
VARIABLE = "MINIDISTILL_API_KEY"
"""The beginning of the environment variables with keys. verifiers reads keys from there, and leaves
out those with `API_KEY` in their names for the programs that it starts."""
_numbers = itertools.count()


class TasksetEnvironment:
    """Conversations of the one agent of an environment of verifiers, which scores them."""

    def __init__(self, config: Any, counts: tuple[int, int], seed: int) -> None:
        """`config` is that of the package. Raises UserError for what cannot be played."""
        import verifiers.v1 as vf

        self.config = config
        name = config.env_id
        tasks: Any = vf.load_environment(config).taskset
        if not tasks.bounded:
            tasks = tasks.take(sum(counts))
        self.train, self.eval = split_rows(_sources(tasks, name), None, counts, seed, name)

    async def rollout(self, task: Row, policy: Policy) -> Reward:
        """Play and score one task. What fails in it is a failure of the conversation."""
        import verifiers.v1 as vf

        async with Endpoint(policy) as endpoint:
            with _variable(endpoint.key) as variable:
                client = vf.EvalClientConfig(base_url=endpoint.url, api_key_var=variable)
                context = vf.ModelContext(model=MODEL, client=client)
                # what it serves for a conversation is kept in the environment
                environment = vf.load_environment(self.config)
                async with environment.serving():
                    episode = await environment.run_episode(task.source, context)
        traces = episode.traces
        if not episode.ok:
            errors = [*episode.errors, *(error for trace in traces for error in trace.errors)]
            why = f"{errors[0].type}: {errors[0].message}" if errors else "it did not end well"
            raise ScoringError(why)
        if len(traces) != 1:
            raise ScoringError(f"its agent ran {len(traces)} times, and each run has its reward")
        named = {name: reward and reward.score for name, reward in traces[0].rewards.items()}
        figures = {**traces[0].metrics, **named}
        metrics = {name: float(value) for name, value in figures.items() if value is not None}
        return Reward(float(traces[0].reward), metrics)


def load_config(env: str, args: dict[str, Any]) -> Any:
    """The configuration of the task set `env`. `args` are the rest of a table `env` of verifiers.

    An agent without a harness is asked in plain chat, and one without a runtime runs in processes
    of this machine. Raises UserError for several agents.
    """
    import verifiers.v1 as vf
    from verifiers.v1.configs.agent import agent_config_fields
    from verifiers.v1.runtimes import SubprocessConfig
    from verifiers.v1.utils.loaders import default_harness_id

    sys.modules.setdefault(HARNESS, import_module("minidistill.envs.verifiers.chat_harness"))
    taskset = {**args.get("taskset", {}), "id": env}
    config = vf.resolve_env_config({**args, "taskset": taskset})
    agents = agent_config_fields(config)
    if len(agents) != 1:
        raise UserError(
            f"verifiers: {config.env_id} has {len(agents)} agents, and one is trained",
            where="args",
            fix="use an environment with one agent",
        )
    [(role, agent)] = agents.items()
    changes: dict[str, Any] = {}
    if "runtime" not in agent.model_fields_set:
        changes["runtime"] = SubprocessConfig()
    if agent.harness is None and default_harness_id(env) == "bash":  # it has none of its own
        changes["harness"] = vf.HarnessConfig(id=HARNESS)
    return config.model_copy(update={role: agent.model_copy(update=changes)})


def _sources(tasks: Iterable[Any], name: str) -> Iterator[Source]:
    for task in tasks:
        data = task.data
        if data.prompt is None:
            raise UserError(
                f"verifiers: a task of {name} has no prompt, and a run draws its tasks by them",
                where="args",
                fix="use a task set whose tasks have prompts",
            )
        prompt = plain_prompt(data.prompt)
        if data.system_prompt:
            prompt = ({"role": "system", "content": data.system_prompt}, *prompt)
        yield Source(prompt, getattr(data, "answer", None), data.model_dump(mode="json"), task)


@contextlib.contextmanager
def _variable(value: str) -> Iterator[str]:
    """An environment variable with this value."""
    name = f"{VARIABLE}_{next(_numbers)}"
    os.environ[name] = value
    try:
        yield name
    finally:
        del os.environ[name]
