"""Building a run: engines, ranks and the model are started and loaded."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from minidistill.config.adapter import without_initial_adapter
from minidistill.driver.model_checks import DOING, check_model
from minidistill.driver.prepare import Prepared
from minidistill.engines.base import Engine
from minidistill.engines.launch import EngineLauncher
from minidistill.envs.isolated import IsolatedEnvironment, close_environments
from minidistill.envs.protocol import Environment
from minidistill.evaluation.evaluator import Evaluator
from minidistill.placement.placement import Placement
from minidistill.reporting.terminal.base import Display
from minidistill.rollouts.async_collector import AsyncCollector
from minidistill.rollouts.collector import Collector
from minidistill.rollouts.stream_collector import StreamCollector
from minidistill.system.files import remove_leftovers
from minidistill.system.scratch import sweep
from minidistill.trainer.build import build_trainer
from minidistill.trainer.distributed.launcher import RankLauncher
from minidistill.trainer.forward import PrefixCache
from minidistill.trainer.guards import explain_out_of_memory
from minidistill.trainer.loading import load_policy
from minidistill.trainer.policy import Policy
from minidistill.trainer.token_budget import TokenBudget
from minidistill.trainer.trainer import Trainer

SMALLER_MODEL = {
    "where": "model.name",
    "fix": 'use a smaller model or model.dtype = "bfloat16", train an adapter instead of every '
    "weight, or give engines on this GPU less (inference.gpu_memory_utilization)",
}
STREAMED_TOKENS = 2048
"""Of a part that is trained while others are sampled, for each rank. Smaller passes cost more than
they hide (docs/performance.md)."""


@dataclass(frozen=True, slots=True)
class Components:
    """The parts of a run, loaded and started."""

    placement: Placement
    """As started: see `EngineLauncher.start`."""
    policy: Policy
    trainer: Trainer
    engine: Engine
    collector: Collector
    async_collector: AsyncCollector | None
    """Collects one step ahead, with `schedule = "async"`."""
    stream_collector: StreamCollector | None
    """Hands groups to the trainer while others are sampled, with `schedule = "sync"` and engines
    that run beside the trainer."""
    evaluator: Evaluator | None
    budget: TokenBudget
    """Of the trainer's passes outside a training step."""
    ranks: RankLauncher
    environments: Sequence[Environment]
    """All of them, with their processes."""

    def abort(self) -> None:
        """Close without waiting for the trainer's other ranks."""
        self.ranks.group.broken = True
        self.close()

    def close(self) -> None:
        with contextlib.ExitStack() as stack:  # the last is closed first, and each of them is
            for collector in (self.async_collector, self.stream_collector):
                if collector is not None:
                    stack.callback(collector.close)
            stack.callback(close_environments, self.environments)
            stack.callback(self.engine.close)
            stack.callback(self.ranks.close)


def build(prepared: Prepared, display: Display) -> Components:
    """Start the engines and the trainer's ranks, and load the model while they start.

    Raises UserError if something cannot be loaded or started. Nothing is left running then.
    """
    sweep()
    if prepared.resume:
        remove_leftovers(prepared.directory.path)
    config, placement = prepared.config, prepared.plan.placement
    if prepared.restores:
        config = without_initial_adapter(config)
    devices = placement.devices
    if devices[0].type == "cuda":
        torch.cuda.set_device(devices[0])  # Triton launches kernels on the current device
    launcher = EngineLauncher(config, placement, prepared.directory.path / "sync")
    ranks = RankLauncher(devices)
    environments = prepared.all_environments
    scored = prepared.scored_environments
    isolated = [env for env in scored if isinstance(env, IsolatedEnvironment)]
    try:
        for environment in isolated:
            environment.start()
        placement = launcher.start()
        ranks.start(config, placement)
        phase = display.phase("load the model", 1, "model")
        with phase, explain_out_of_memory("loading the model", **SMALLER_MODEL):
            policy = load_policy(
                config,
                prepared.tokenizer,
                placement,
                end_of_turn_ids=prepared.builder.end_of_turn_ids,
            )
        budget = TokenBudget(placement.micro_batch_tokens)
        phase = display.phase("check the model", 1, "model")
        with phase, explain_out_of_memory(DOING, **SMALLER_MODEL):
            prefixes = PrefixCache(policy, shares=True, contexts=prepared.contexts)
            samples = launcher.sampled_by(policy)
            if not check_model(policy, prepared.prompts, budget, samples, prefixes):
                prefixes = PrefixCache(policy, shares=False)
        with explain_out_of_memory("preparing the optimizer", **SMALLER_MODEL):
            trainer = build_trainer(policy, config, placement, ranks.group, prefixes)
        with display.phase("wait for the engine", 1, "engine"):
            engine = launcher.attach(policy, prefixes)
        collector = Collector(
            config,
            prepared.environments,
            prepared.builder,
            placement,
            display,
            prepared.train_tasks,
        )
        evaluator = None
        if config.orchestrator.eval is not None:
            evaluator = Evaluator(
                config,
                prepared.evaluation_environments,
                prepared.evaluation_prompts,
                prepared.builder,
                engine,
                display,
                placement.max_length,
            )
        for environment in isolated:
            environment.check()
    except BaseException:
        ranks.group.broken = True
        ranks.close()
        launcher.close()
        close_environments(environments)
        raise
    is_async = config.schedule == "async"
    # a conversation's group is complete with its last turn, so there is nothing to hand over before
    streams = not (is_async or engine.sleeps or collector.conversing) and engine.streams
    least_tokens = STREAMED_TOKENS * placement.ranks
    return Components(
        placement=placement,
        policy=policy,
        trainer=trainer,
        engine=engine,
        collector=collector,
        async_collector=AsyncCollector(collector, engine) if is_async else None,
        stream_collector=StreamCollector(collector, engine, least_tokens) if streams else None,
        evaluator=evaluator,
        budget=budget,
        ranks=ranks,
        environments=environments,
    )
