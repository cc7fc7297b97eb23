"""What a run holds and does: models, environments, engine, trainer, and its directory."""

from __future__ import annotations

import shlex
import sys
import time
import traceback
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch

from minidistill.config import LoadedConfig
from minidistill.engines.launch import start_engines
from minidistill.envs.registry import load_environments
from minidistill.errors import UserError
from minidistill.evaluation.evaluator import Evaluator, Scores
from minidistill.models.hub import check_same_tokens, load_tokenizer
from minidistill.placement.devices import check_settings, rank_devices
from minidistill.placement.local import plan_here
from minidistill.placement.measured import planned_and_measured
from minidistill.placement.planner import Plan
from minidistill.placement.render import flags
from minidistill.reporting.monitors import check_monitors, open_monitors
from minidistill.reporting.rollout_log import TokenTexts, write_rollouts
from minidistill.reporting.run_directory import RunDir, choose_path
from minidistill.reporting.terminal import Display, Sample
from minidistill.rollouts.async_collector import AsyncCollector
from minidistill.rollouts.collector import Collector
from minidistill.run import preflight
from minidistill.run.header import header
from minidistill.tasks.lengths import check_lengths
from minidistill.tasks.prompts import PromptBuilder
from minidistill.tasks.rewards import check_rewards
from minidistill.tasks.sampling import fingerprint
from minidistill.trainer import checkpoint
from minidistill.trainer.build import build_trainer
from minidistill.trainer.distributed.launcher import Ranks
from minidistill.trainer.forward import PrefixCache
from minidistill.trainer.loading import load_policy
from minidistill.types import Metrics, Prompt, Role, Rollout

# Tasks of each split whose prompts are built and measured before the run: of one that makes its
# tasks when they are asked for, and of a list
CHECKED_TASKS, CHECKED_LIST = 32, 2000


def finished_board(loaded: LoadedConfig) -> dict[str, Any] | None:
    """The scoreboard of a run that has ended, None for one that can go on."""
    return RunDir(choose_path(loaded, resume=True)).read("scoreboard.json")


class Session:
    """One run from its first check to its scoreboard.

    Nothing is written before every check has passed.
    """

    def __init__(self, loaded: LoadedConfig, resume: bool, display: Display) -> None:
        self.loaded, self.config, self.display = loaded, loaded.config, display
        config, orchestrator = self.config, self.config.orchestrator
        self.dir = RunDir(choose_path(loaded, resume))
        if resume:
            self.dir.check_same(loaded)
        check_monitors(config)
        tokenizer = load_tokenizer(config)
        self.environments = load_environments(orchestrator.env, "orchestrator.env")
        check_rewards(config, self.environments)
        teacher = orchestrator.teacher_model
        self.builder = PromptBuilder(tokenizer, teacher.context, teacher.context_placement)
        prompts = self._some_prompts()
        self.tasks = fingerprint(self.environments, prompts)
        if resume:
            self.dir.check_tasks(self.tasks)
        warnings = preflight.check_prompts(config, self.builder, prompts)
        check_same_tokens(config, tokenizer)
        self.plan, models = self._plan()
        self.limit = preflight.length_limit(config, models[0])
        check_lengths(config, self.limit, prompts)
        self.texts = TokenTexts(tokenizer)

        warnings += self.plan.warnings
        parts = self.plan.partition
        devices = rank_devices(loaded, parts.trainer)
        device = devices[0]
        if device.type == "cuda":
            torch.cuda.set_device(device)  # where kernels are launched
        # first of all: engines' processes start while this one loads the model
        started = start_engines(
            config, device, parts, self.plan.teaching, models, self.limit,
            self.dir.path / "sync",
        )  # fmt: skip
        self.ranks = Ranks(devices)
        try:
            self.teaching = started.teaching
            self.ranks.start(config, self.teaching)
            self.collector = Collector(
                config, self.environments, self.builder, self.teaching, self.limit, display
            )
            self.policy = load_policy(config, tokenizer, device, self.teaching)
            shares = preflight.check_model(self.policy, prompts, warnings.append)
            self.prefixes = PrefixCache(self.policy, shares)
            self.trainer = build_trainer(
                self.policy, config, self.teaching.estimator, self.warn, self.ranks.world,
                self.prefixes,
            )  # fmt: skip
            self.engine = started.attach(self.policy, self.prefixes)
            self.ahead = (
                AsyncCollector(self.collector, self.engine) if config.schedule == "async" else None
            )
            self.evaluator = self._evaluator()
            self._open(resume, warnings)
        except BaseException:
            self.ranks.world.broken = True
            self.ranks.close()
            started.close()
            raise

    def _open(self, resume: bool, warnings: Sequence[str]) -> None:
        """The last of setting up: from here on there is something on disk and on the display."""
        config = self.config
        self.first_step = 1
        self._began = time.perf_counter()
        self._seconds_before = 0.0
        if resume:
            self._resume()
        shown = header(
            self.plan, self.policy, self.teaching, self.engine, self.dir.path, self.first_step
        )
        if not resume:
            self.dir.create(self.loaded, {"header": shown.rows, "tasks": self.tasks})
        self.engine.sync(self.first_step - 1)
        self.monitor = open_monitors(config, self.dir.path, self.warn)
        self.display.open(shown)
        self.dir.note(f"started at step {self.first_step}: {shlex.join(sys.argv[1:])}")
        for text in warnings:
            self.warn(text)

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self.dir.note("".join(traceback.format_exception(error)))
        self.ranks.close()
        self.engine.close()
        if self.ahead is not None:
            self.ahead.close()
        self.monitor.close(None)

    def warn(self, text: str) -> None:
        self.display.note(text, warning=True)
        self.dir.note(f"warning: {text}")

    # -- setting up ----------------------------------------------------------------------------

    def _plan(self) -> tuple[Plan, tuple[Any, Any]]:
        """What runs where, refused where it cannot be, and the models' configurations."""
        found, models = plan_here(self.config)
        check_settings(self.loaded, found)
        for problem in found.problems:
            change = f": try {flags(found.change)}" if found.change else ""
            self.warn(f"by the plan this does not fit, {problem}{change}")
        return found, models

    def _some_prompts(self) -> list[Prompt]:
        found = []
        for name, environment in self.environments.items():
            for split in (environment.train, environment.eval):
                if len(split) == 0:
                    raise UserError(
                        f"the environment {name!r} has no tasks in a split",
                        where="orchestrator.env",
                        fix="give it at least one task for training and one for evaluation",
                    )
                most = CHECKED_LIST if isinstance(split, list | tuple) else CHECKED_TASKS
                tasks = [split[i] for i in range(min(most, len(split)))]
                found += [self.builder.build(name, task) for task in tasks]
        return found

    def _evaluator(self) -> Evaluator | None:
        settings = self.config.orchestrator.eval
        if settings is None:
            return None
        environments = self.environments
        if settings.env is not None:
            environments = load_environments(settings.env, "orchestrator.eval.env")
        check_rewards(self.config, environments, evaluated=True)
        evaluator = Evaluator(self.config, environments, self.builder, self.engine, self.display)
        for prompts in evaluator.prompts.values():
            check_lengths(self.config, self.limit, prompts)
        return evaluator

    def _resume(self) -> None:
        facts = checkpoint.restore(self.trainer, self.dir.path / "checkpoints", self.warn)
        step = facts["step"] if facts else 0
        self.dir.truncate(facts["metrics_lines"] if facts else 0)
        self.dir.clear_rollouts_after(step)
        self.first_step = step + 1
        self._seconds_before = facts["seconds"] if facts else 0.0
        self.display.note(f"resuming after step {step}")

    # -- one step ------------------------------------------------------------------------------

    def sample(self, step: int) -> list[Rollout]:
        """The step's rollouts, scored, with their advantages."""
        self._step_began = time.perf_counter()
        if self.ahead is None:
            rollouts, self._step = self.collector.collect(self.engine, step, step - 1)
            return rollouts
        rollouts, self._step = self.ahead.take(step, step - 1)
        if step < self.config.max_steps:
            self.ahead.start(step + 1, step - 1)
        return rollouts

    def train(self, step: int, rollouts: Sequence[Rollout]) -> None:
        """One update, and its records."""
        tokens = sum(len(r.completion.token_ids) for r in rollouts)
        if self.ahead is None:
            self.engine.sleep()
        with self.display.phase("train", tokens, "tokens") as advance:
            result = self.trainer.step(rollouts, step, advance)
        began = time.perf_counter()
        self.engine.sync(step)
        now = time.perf_counter()
        metrics = result.metrics | self._step
        metrics |= {"time/sync": now - began, "time/step": now - self._step_began}
        write_rollouts(self.dir.path / "rollouts", step, rollouts, result.tokens, self.texts)
        self.log(step, metrics)
        first = rollouts[0]
        reward = None if first.reward is None else first.reward.value
        shown = tuple(self.texts(first.completion.token_ids))
        sample = Sample(shown, tuple(result.tokens[0].kl), reward, first.prompt.env)
        self.display.step(step, metrics, sample)
        if step == self.first_step:
            self.display.note(planned_and_measured(self.plan, self.policy.device))

    def log(self, step: int, metrics: Metrics) -> None:
        self.dir.log(step, metrics)
        self.monitor.log(step, metrics)

    # -- evaluation ----------------------------------------------------------------------------

    def evaluate(self, step: int) -> Scores:
        """The student's scores without the context."""
        assert self.evaluator is not None
        if self.ahead is not None:
            self.ahead.wait_until_idle()
        began = time.perf_counter()
        scores = self.evaluator.run("student", Role.STUDENT, context=False)
        metrics = {f"eval/{n}/student/avg": sum(v) / len(v) for n, v in scores.rewards.items()}
        metrics["eval/completions/length_mean"] = scores.length
        metrics["time/eval"] = time.perf_counter() - began
        self.log(step, metrics)
        self.display.evaluation(step, metrics)
        return scores

    def evaluation_due(self, step: int) -> bool:
        settings = self.config.orchestrator.eval
        return settings is not None and settings.interval > 0 and step % settings.interval == 0

    # -- keeping -------------------------------------------------------------------------------

    @property
    def seconds(self) -> float:
        """Time spent in the run, earlier parts of a resumed one included."""
        return self._seconds_before + time.perf_counter() - self._began

    def checkpoint_due(self, step: int) -> bool:
        interval = self.config.ckpt.interval
        return interval > 0 and step % interval == 0

    def checkpoint(self, step: int) -> None:
        facts = {"metrics_lines": self.dir.lines(), "seconds": self.seconds}
        root = self.dir.path / "checkpoints"
        checkpoint.save(self.trainer, root, step, facts, self.config.ckpt.keep)
