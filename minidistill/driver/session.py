"""A run in progress: its components, its records and its checkpoints."""

from __future__ import annotations

import contextlib
import logging
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from minidistill.driver.build import Components, build
from minidistill.driver.header import header
from minidistill.driver.prepare import Prepared
from minidistill.driver.resume import check_nothing_was_saved
from minidistill.driver.selection import HELDOUT_KL, REWARD, Selection, asked, pooled_mean
from minidistill.errors import UserError
from minidistill.evaluation.evaluator import Scores
from minidistill.evaluation.kl import SampledKL, drift_kl, teacher_kl
from minidistill.evaluation.unrelated import DRIFT_TOKENS, unrelated_prompts
from minidistill.placement.machine import GIB
from minidistill.placement.measured import planned_and_measured
from minidistill.reporting.html import LiveReport
from minidistill.reporting.monitors import open_monitors
from minidistill.reporting.rollout_log import TokenTexts, with_inserted, write_rollouts
from minidistill.reporting.terminal.base import Display, Sample
from minidistill.trainer import checkpoint
from minidistill.trainer.forward import PrefixCache
from minidistill.trainer.guards import explain_out_of_memory
from minidistill.trainer.health import Health
from minidistill.trainer.metrics import by_group
from minidistill.types import Metrics, Role, Rollout, TokenFigures

logger = logging.getLogger(__name__)
EVALUATED = "eval/completions/length_mean"
"""A metric that every evaluation of the trained student has."""
WITHOUT_BEST = (
    "restore it from a copy, or resume with --no-ckpt.best: the last step's weights count"
)
SHORTER = {
    "where": "orchestrator.sampling.max_tokens",
    "fix": "lower orchestrator.sampling.max_tokens, or give engines on the trainer's GPU less "
    "(inference.gpu_memory_utilization)",
}


@contextlib.contextmanager
def open_session(prepared: Prepared, display: Display) -> Iterator[Session]:
    """Build the run's components and open its directory. Everything is closed at the end."""
    components = build(prepared, display)
    try:
        session = Session(prepared, components, display)
    except BaseException:
        components.abort()
        raise
    try:
        yield session
    except BaseException as error:
        logger.debug("the run ended with an error", exc_info=error)
        raise
    finally:
        session.report.close()
        components.close()
        session.monitor.close(None)


class Session:
    """One run. The loop calls it; it keeps the records."""

    def __init__(self, prepared: Prepared, components: Components, display: Display) -> None:
        self.prepared, self.config, self.display = prepared, prepared.config, display
        self.directory, self.builder = prepared.directory, prepared.builder
        self.policy, self.trainer = components.policy, components.trainer
        self.engine, self.evaluator = components.engine, components.evaluator
        self.collector, self.async_collector = components.collector, components.async_collector
        self.stream_collector = components.stream_collector
        self.budget = components.budget
        self.texts = TokenTexts(prepared.tokenizer)
        self.first_step, self.last_step = 1, 0
        """The first that this process trains, and the last that is trained."""
        self._history: tuple[dict[str, Any], ...] = ()
        self.health = Health(self.config.health, self.directory.path / "rollouts")
        self.selection, self.asked = Selection(self.config), asked(self.config)
        self.scores: Scores | None = None
        """Of the weights as they are, if they have been evaluated."""
        self.problem: UserError | None = None
        """Why the run must not go on after the last step, if it must not."""
        self._began, self._seconds_before = time.perf_counter(), 0.0
        if prepared.resume:
            self._resume()
        if prepared.extended:
            self.directory.extend(prepared.loaded)
        run_header = header(
            prepared.plan,
            components.placement,
            self.policy,
            self.engine,
            self.builder,
            self.directory,
            self.first_step,
            prepared.context_count,
            self._history,
        )
        if not prepared.resume:
            facts = {"header": run_header.rows, "tasks": prepared.fingerprint}
            if prepared.initial_adapter is not None:
                facts["initial_adapter"] = prepared.initial_adapter
            if self.builder.began is not None:
                facts["began"] = self.builder.began.isoformat()
            self.directory.create(prepared.loaded, facts)
        self.engine.sync(self.first_step - 1)
        self.monitor = open_monitors(self.config, self.directory.path, self.first_step)
        self.report = LiveReport(self.directory.path)
        display.open(run_header)
        self.report.refresh()
        logger.debug(f"started at step {self.first_step}: {shlex.join(sys.argv[1:])}")

    @explain_out_of_memory(
        "restoring the checkpoint",
        where="ckpt",
        fix="free the memory that other programs hold, or resume on a machine with more",
    )
    def _resume(self) -> None:
        records = self.directory.records
        root = self.directory.path / "checkpoints"
        saved = checkpoint.restore(self.trainer, root, records.disagreement)
        if saved is None:
            check_nothing_was_saved(self.config, self.directory)
        step = saved["step"] if saved else 0
        records.rewind(saved)
        self._history = tuple(records.all())
        self.health.replay(self._history)
        self.selection.replay(self._history)
        self.first_step, self.last_step = step + 1, step
        if self.selection.best is not None:
            checkpoint.check_saved(root, self.selection.best.step, WITHOUT_BEST)
        self._seconds_before = saved["seconds"] if saved else 0.0
        if saved:
            checkpoint.complete(root, step, self.config.ckpt.keep, self._best_step)
        logger.info(f"resuming after step {step}")

    # -- a step --------------------------------------------------------------------------------

    @explain_out_of_memory(
        "sampling",
        where="orchestrator.batch_size",
        fix="lower orchestrator.batch_size or orchestrator.sampling.max_tokens",
    )
    def collect(self, step: int) -> tuple[list[Rollout], Metrics]:
        """The step's rollouts, scored and with advantages, and the collection's metrics."""
        if self.async_collector is None:
            return self.collector.collect(self.engine, step, step - 1)
        collected = self.async_collector.take(step, step - 1)
        if step < self.config.max_steps:
            self.async_collector.start(step + 1, step - 1)
        return collected

    def record(
        self,
        step: int,
        rollouts: Sequence[Rollout],
        tokens: Sequence[TokenFigures],
        metrics: Metrics,
    ) -> None:
        """Write and show a step's results. `tokens` has the per-token results of each rollout."""
        self.last_step, self.scores = step, None
        if (peak := self.engine.peak_memory()) is not None:
            metrics = metrics | {"perf/peak_memory_gib/engine": peak / GIB}
        sums = write_rollouts(self.directory.path, step, rollouts, tokens, self.texts)
        self.directory.records.add(sums)
        if len(self.prepared.environments) > 1:
            metrics = metrics | by_group("env", [r.prompt.env for r in rollouts], rollouts, tokens)
        if self.builder.contexts.are_drawn:
            groups = [r.prompt.context.group for r in rollouts]
            metrics = metrics | by_group("context", groups, rollouts, tokens)
        self.log(step, metrics)
        first = rollouts[0]
        reward = None if first.reward is None else first.reward.value
        shown = with_inserted(first.completion, self.texts, tokens[0].kl.tolist())
        sample = Sample(*shown, reward, first.prompt.env)
        self.display.step(step, metrics, sample)
        self.problem = self.health.take(step, metrics)
        if step == self.first_step:
            logger.info(planned_and_measured(self.prepared.plan, self.policy.device))

    def log(self, step: int, metrics: Metrics) -> None:
        self.directory.log(step, metrics)
        self.monitor.log(step, metrics)
        self.report.refresh()

    # -- evaluation ----------------------------------------------------------------------------

    def evaluation_due(self, step: int) -> bool:
        settings = self.config.orchestrator.eval
        return settings is not None and settings.interval > 0 and step % settings.interval == 0

    def evaluation_missing(self) -> bool:
        """Whether the step before the first one lacks an evaluation that is due.

        It was the last step of a run that is extended, which is evaluated after its checkpoint.
        """
        step = self.first_step - 1
        due = self.evaluation_due(step) and step < self.config.max_steps
        return due and not self.is_evaluated(step)

    def is_evaluated(self, step: int) -> bool:
        return self.directory.has(step, EVALUATED)

    def evaluate(self, step: int) -> Scores:
        """Evaluate the student without the context."""
        assert self.evaluator is not None
        if self.async_collector is not None:
            self.async_collector.wait_until_idle()
        began = time.perf_counter()
        scores = self.evaluator.run("student", Role.STUDENT, context=False)
        metrics = {f"eval/{n}/student/avg": sum(v) / len(v) for n, v in scores.rewards.items()}
        metrics[EVALUATED] = scores.length
        if "reward" in self.asked:
            metrics[REWARD] = pooled_mean(scores.rewards)
        if "heldout_kl" in self.asked:
            metrics[HELDOUT_KL] = self.held_out_kl().mean
        metrics["time/eval"] = time.perf_counter() - began
        self.log(step, metrics)
        self.display.evaluation(step, metrics)
        self.selection.take(step, metrics)
        self.scores = scores
        return scores

    @explain_out_of_memory("computing the KL on held-out prompts", **SHORTER)
    def held_out_kl(self) -> SampledKL:
        """KL(student‖teacher) on held-out prompts."""
        assert self.evaluator is not None
        answers = self.evaluator.student_answers()
        prompts = self.evaluator.held_out()
        return teacher_kl(
            self.config,
            self.policy,
            self.engine,
            prompts,
            self.budget,
            answers=answers,
            prefixes=self._prefixes(),
        )

    @explain_out_of_memory("computing the KL on unrelated prompts", **SHORTER)
    def unrelated_kl(self) -> SampledKL | None:
        """KL(student‖teacher) on unrelated prompts; None if the context leaves no room for them, or
        is in a program's requests alone."""
        if not any(context.text for context in self.prepared.shown_contexts):
            return None
        prompts = unrelated_prompts(self.builder, self.prepared.shown_contexts)
        longest = max(len(prompt.teacher_ids) for prompt in prompts)
        tokens = min(DRIFT_TOKENS, self.prepared.plan.placement.max_length - longest)
        if tokens < 1:
            return None
        return teacher_kl(
            self.config,
            self.policy,
            self.engine,
            prompts,
            self.budget,
            label="unrelated",
            max_tokens=tokens,
            prefixes=self._prefixes(),
        )

    def _prefixes(self) -> PrefixCache | None:
        """With which the context is read once. Sharded ranks do without: they have to read the same
        prefixes in each step."""
        return self.trainer.prefixes if self.policy.sharded is None else None

    @explain_out_of_memory("sampling the teacher's completions", **SHORTER)
    def teacher_texts(self) -> list[str]:
        """The teacher's answers to the held-out prompts that are kept, with the context."""
        assert self.evaluator is not None
        return [answer.text for answer in self.evaluator.teacher_answers()]

    @explain_out_of_memory("computing the drift on unrelated prompts", **SHORTER)
    def drift_kl(self) -> float | None:
        """Mean KL(base‖student) on unrelated prompts, nats a token; None without a base."""
        return drift_kl(self.config, self.policy, self.engine, self.builder, self.budget)

    # -- checkpoints ---------------------------------------------------------------------------

    @property
    def seconds(self) -> float:
        """Time spent in the run, including earlier parts of a resumed one."""
        return self._seconds_before + time.perf_counter() - self._began

    def checkpoint_due(self, step: int) -> bool:
        interval = self.config.ckpt.interval
        return (interval > 0 and step % interval == 0) or self.selection.is_best(step)

    @property
    def _best_step(self) -> int | None:
        return None if self.selection.best is None else self.selection.best.step

    @explain_out_of_memory(
        "saving a checkpoint",
        where="ckpt.interval",
        fix="give the machine more free memory; --resume continues from the last checkpoint",
    )
    def save_checkpoint(self, step: int) -> None:
        progress = {**self.directory.records.flush(), "seconds": self.seconds}
        root = self.directory.path / "checkpoints"
        keep = self.config.ckpt.keep
        path = checkpoint.save(self.trainer, root, step, progress, keep, self._best_step)
        self.display.checkpoint(step, path)

    @explain_out_of_memory(
        "restoring the best checkpoint",
        where="ckpt.best",
        fix="free the memory that other programs hold; --resume continues from here",
    )
    def restore_best(self) -> None:
        """Take back the weights of the best evaluation, in the trainer and the engines."""
        step = self._best_step
        if step is None or step == self.last_step:
            return
        with self.policy.lock:
            root = self.directory.path / "checkpoints"
            checkpoint.restore_step(self.trainer, root, step, WITHOUT_BEST)
        self.engine.sync(self.last_step + 1)  # a version that no engine has seen
        self.scores = None
