"""What a run holds and does: models, environments, engine, trainer, and its directory."""

from __future__ import annotations

import shlex
import sys
import time
import traceback
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from minidistill import preflight
from minidistill.collect import Collector
from minidistill.config import LoadedConfig
from minidistill.data import load_environments
from minidistill.devices import rank_devices
from minidistill.engines import start_engines
from minidistill.errors import UserError
from minidistill.evaluate import Evaluator, Scores
from minidistill.header import header
from minidistill.monitors import check_monitors, open_monitors
from minidistill.prompts import PromptBuilder
from minidistill.records import TokenTexts, write_rollouts
from minidistill.roles import other_teacher
from minidistill.rundir import RunDir, choose_path
from minidistill.trainer import checkpoint
from minidistill.trainer.build import build_trainer
from minidistill.trainer.forward import PrefixCache
from minidistill.trainer.model import (
    check_same_tokens,
    load_model_config,
    load_policy,
    load_tokenizer,
)
from minidistill.trainer.ranks import Ranks
from minidistill.types import Metrics, Prompt, Rollout
from minidistill.ui import Display, Sample

CHECKED_TASKS = 32  # tasks of each split whose prompts are built and measured before the run


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
        devices = rank_devices(loaded)
        device = devices[0]
        check_monitors(config)
        tokenizer = load_tokenizer(config)
        self.environments = load_environments(orchestrator.env, "orchestrator.env")
        teacher = orchestrator.teacher_model
        self.builder = PromptBuilder(tokenizer, teacher.context, teacher.context_placement)
        prompts = self._some_prompts()
        warnings = preflight.check_prompts(config, self.builder, prompts)
        check_same_tokens(config, tokenizer)
        model_config = load_model_config(config)
        self.limit = preflight.length_limit(config, model_config)
        preflight.check_lengths(config, self.limit, prompts)
        self.texts = TokenTexts(tokenizer)

        # first of all: engines' processes start while this one loads the model
        other = other_teacher(config)
        models = (model_config, load_model_config(config, other) if other else model_config)
        started = start_engines(config, device, models, self.limit, self.warn)
        self.ranks = Ranks(devices)
        try:
            self.teaching = started.teaching
            self.ranks.start(config, self.teaching)
            self.collector = Collector(
                config, self.environments, self.builder, self.teaching, self.limit, display,
                self.warn,
            )  # fmt: skip
            self.policy = load_policy(config, tokenizer, device, self.teaching)
            shares = preflight.check_model(self.policy, prompts, warnings.append)
            self.prefixes = PrefixCache(self.policy, shares)
            self.trainer = build_trainer(
                self.policy, config, self.teaching.estimator, self.warn, self.ranks.world,
                self.prefixes,
            )  # fmt: skip
            self.engine = started.attach(self.policy, self.prefixes)
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
            config, self.policy, self.teaching, self.engine, self.dir.path, self.first_step
        )
        if not resume:
            self.dir.create(self.loaded, {"header": shown.rows})
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
        self.monitor.close(None)

    def warn(self, text: str) -> None:
        self.display.note(text, warning=True)
        self.dir.note(f"warning: {text}")

    # -- setting up ----------------------------------------------------------------------------

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
                tasks = [split[i] for i in range(min(CHECKED_TASKS, len(split)))]
                found += [self.builder.build(name, task) for task in tasks]
        return found

    def _evaluator(self) -> Evaluator | None:
        settings = self.config.orchestrator.eval
        if settings is None:
            return None
        environments = self.environments
        if settings.env is not None:
            environments = load_environments(settings.env, "orchestrator.eval.env")
        evaluator = Evaluator(self.config, environments, self.builder, self.engine, self.display)
        for prompts in evaluator.prompts.values():
            preflight.check_lengths(self.config, self.limit, prompts)
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
        rollouts, self._step = self.collector.collect(self.engine, step, version=step - 1)
        return rollouts

    def train(self, step: int, rollouts: Sequence[Rollout]) -> None:
        """One update, and its records."""
        tokens = sum(len(r.completion.token_ids) for r in rollouts)
        self.engine.sleep()
        with self.display.phase("train", tokens, "tokens") as advance:
            result = self.trainer.step(rollouts, step, advance)
        began = time.perf_counter()
        self.engine.sync(step)
        self._step["time/sync"] = time.perf_counter() - began
        metrics = result.metrics | self._step
        metrics["time/step"] = sum(v for k, v in metrics.items() if k.startswith("time/"))
        write_rollouts(self.dir.path / "rollouts", step, rollouts, result.tokens, self.texts)
        self.log(step, metrics)
        first = rollouts[0]
        reward = None if first.reward is None else first.reward.value
        shown = tuple(self.texts(first.completion.token_ids))
        sample = Sample(shown, tuple(result.tokens[0].kl), reward, first.prompt.env)
        self.display.step(step, metrics, sample)

    def log(self, step: int, metrics: Metrics) -> None:
        self.dir.log(step, metrics)
        self.monitor.log(step, metrics)

    # -- evaluation ----------------------------------------------------------------------------

    def evaluate(self, step: int) -> Scores:
        """The student's scores without the context."""
        assert self.evaluator is not None
        began = time.perf_counter()
        scores = self.evaluator.run("student", student=True, context=False)
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
