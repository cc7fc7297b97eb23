"""A trainer on the shipped model, with rollouts sampled from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from minidistill.config import LoadedConfig
from minidistill.engines.embedded import EmbeddedEngine
from minidistill.envs.registry import load_environments
from minidistill.models.hub import load_tokenizer
from minidistill.placement.machine import Machine
from minidistill.placement.placement import Placement
from minidistill.placement.planner import plan_run
from minidistill.tasks.prompts import PromptBuilder
from minidistill.tasks.rewards import score, with_advantages
from minidistill.tasks.sampling import TaskSampler
from minidistill.trainer.build import build_trainer
from minidistill.trainer.distributed.rank_group import RankGroup
from minidistill.trainer.forward import PrefixCache, can_share_prefix
from minidistill.trainer.loading import load_policy
from minidistill.trainer.policy import Policy
from minidistill.trainer.trainer import Trainer
from minidistill.types import Request, Role, Rollout, SamplingParams

# A step of 12 rollouts of 8 puzzles
SMALL_STEP = (
    "--orchestrator.batch_size", "12", "--orchestrator.env.0.args.num_train_examples", "8",
)  # fmt: skip
# For training on the same rollouts again, which otherwise looks like an engine with stale weights
NO_MISMATCH_LIMIT = ("--trainer.loss.max_sampler_mismatch", "off")


@dataclass
class Lab:
    """A policy, its trainer and embedded engine, and the rollouts of one step."""

    policy: Policy
    trainer: Trainer
    engine: EmbeddedEngine
    builder: PromptBuilder
    rollouts: list[Rollout]

    def gradients(self) -> dict[str, torch.Tensor]:
        """The step's gradient of each parameter. The weights do not change."""
        gradients = {}
        optimizer = self.trainer.optimizer

        def record(rate: float) -> None:
            held = optimizer.stepped.items()
            gradients.update({n: p.grad.clone() for n, p in held if p.grad is not None})
            optimizer.zero_grad()

        original = optimizer.step, optimizer.clip
        optimizer.step, optimizer.clip = record, lambda: 0.0  # type: ignore[method-assign]
        self.trainer.step(self.rollouts, 1, lambda count: None)
        optimizer.step, optimizer.clip = original  # type: ignore[method-assign]
        return gradients


def cpu_placement(loaded: LoadedConfig) -> Placement:
    """The placement on a machine without GPUs, whatever machine the tests run on."""
    machine = Machine(gpus=0, bytes=16 << 30, vllm=False, bf16=False)
    return plan_run(loaded, machine).placement


def make_lab(
    loaded: LoadedConfig,
    *,
    shares: bool | None = None,
    trained: bool = True,
    rank_group: RankGroup | None = None,
) -> Lab:
    """A lab of this configuration, on the driver of a rank group.

    With `trained` the weights differ from their initial values, as after some training. `shares`
    sets whether the prefix cache is used; by default it is if the model supports it.
    """
    config = loaded.config
    tokenizer = load_tokenizer(config)
    placement = cpu_placement(loaded)
    policy = load_policy(config, tokenizer, placement)
    generator = torch.Generator().manual_seed(1)
    if trained:
        for name, parameter in policy.parameters:
            if "lora_B" in name or not policy.lora:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data.add_((0.03 if policy.lora else 0.003) * noise)
    share = can_share_prefix(policy) if shares is None else shares
    prefixes = PrefixCache(policy, share)
    trainer = build_trainer(policy, config, placement, rank_group or RankGroup(), prefixes)
    engine = EmbeddedEngine(policy, prefixes)
    teacher = config.orchestrator.teacher_model
    builder = PromptBuilder(tokenizer, teacher.context, teacher.context_placement)
    return Lab(policy, trainer, engine, builder, sample(loaded, engine, builder))


def sample(loaded: LoadedConfig, engine: Any, builder: PromptBuilder) -> list[Rollout]:
    """The scored rollouts of one step, with their advantages."""
    config, orchestrator = loaded.config, loaded.config.orchestrator
    environments = load_environments(orchestrator.env, "")
    groups = orchestrator.batch_size // orchestrator.rollouts_per_example
    tasks = TaskSampler(environments, config.seed).draw(1, groups)
    prompts = [builder.build(name, task) for name, task in tasks]
    jobs = [(p, s) for p in prompts for s in range(orchestrator.rollouts_per_example)]
    completions = engine.generate(
        [Request(p.student_ids, 100 + i) for i, (p, _) in enumerate(jobs)],
        SamplingParams(orchestrator.sampling.max_tokens, orchestrator.sampling.temperature),
        Role.STUDENT,
    )
    rollouts = [
        Rollout(p, s, c, builder.decode(c.token_ids))
        for (p, s), c in zip(jobs, completions, strict=True)
    ]
    rewards, _ = score(environments, rollouts, lambda count: None)
    scored = [
        Rollout(r.prompt, r.sample, r.completion, r.text, reward)
        for r, reward in zip(rollouts, rewards, strict=True)
    ]
    return with_advantages(scored, orchestrator.advantage.std_norm)


def assert_same_gradients(
    gradients: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]
) -> None:
    """Up to fp32's rounding, relative to the largest of them, which is not zero."""
    scale = max(float(g.abs().max()) for g in expected.values())
    assert scale > 1e-3
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=2e-6 * scale)
