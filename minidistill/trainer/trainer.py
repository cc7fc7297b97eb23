"""One optimizer step from a batch of rollouts: passes of teacher and student, the loss, AdamW."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from minidistill.config import Config
from minidistill.estimators import TeacherInputs
from minidistill.placement.placement import Placement
from minidistill.trainer.batching import collate
from minidistill.trainer.cost import StepCost
from minidistill.trainer.distributed.fsdp import full_tensor, is_sharded
from minidistill.trainer.forward import PrefixCache, hidden_states
from minidistill.trainer.guards import first_line, is_out_of_memory, mismatch_limit, refusal
from minidistill.trainer.metrics import summarize
from minidistill.trainer.micro_batches import MicroBatches, OutOfMemory, sequence_too_long
from minidistill.trainer.objective import figures_by_rollout, loss_settings
from minidistill.trainer.optim import Optimizer, learning_rate
from minidistill.trainer.policy import Policy, Weights
from minidistill.trainer.step import (
    Count,
    GatherState,
    LoadState,
    ReceivedParts,
    StepResult,
    StepRollouts,
    TrainStep,
    token_count,
)
from minidistill.trainer.teacher_passes import TeacherContext, in_order, teacher_passes
from minidistill.types import Advance, Metrics, Role, Rollout, TokenFigures
from minidistill_kernels import DistillOutput

logger = logging.getLogger(__name__)


class Trainer:
    """Trains the policy towards its teacher, which runs here or was scored by an engine.

    The loss of a step is normalized by the step's completion tokens, so micro-batches, padding,
    packing and the number of ranks do not change it.

    Every rank has one. The other ranks run the driver's calls as commands.
    """

    def __init__(
        self, policy: Policy, config: Config, placement: Placement, prefixes: PrefixCache
    ) -> None:
        self.policy, self.config = policy, config
        self.estimator = placement.teacher.estimator
        self.rank_group = policy.rank_group
        self.prefixes = prefixes
        self.sampler = Role(config.orchestrator.sample_from)
        self.loss = loss_settings(config, self.estimator, len(policy.head_VH))
        self.micro_batches = MicroBatches(
            placement.micro_batch_tokens, policy.rank_group, policy.attention.layout
        )
        self.optimizer = Optimizer(policy, config)
        self.cost = StepCost(policy.device)
        self.max_mismatch = mismatch_limit(config, policy.dtype)

    def step(self, rollouts: Sequence[Rollout], step: int, advance: Advance) -> StepResult:
        """One update. Steps count from 1. `advance` is called with the number of trained tokens.

        Raises UserError (exit code 4) if the loss or the gradient is not finite, or if the sampler
        ran other weights. The weights are then unchanged.
        """
        return self._command(StepRollouts.of(rollouts), step, advance, token_count)

    def stream_step(self, rollouts: StepRollouts, step: int, advance: Advance) -> StepResult:
        """`step` on rollouts of which some are still sampled. `advance` counts rollouts.

        The update is that of `step` up to float error, and depends on no timing. With sharded
        weights training begins when all parts are there: an engine that restarts meanwhile gathers
        the weights from all ranks.
        """
        if self.policy.sharded is not None:
            rollouts = StepRollouts.of([r for part in rollouts.parts for r in part])
        return self._command(rollouts, step, advance, len)

    def _command(
        self, rollouts: StepRollouts, step: int, advance: Advance, count: Count
    ) -> StepResult:
        prompts = rollouts.teacher_prompts
        prefix = self.prefixes.common(prompts, Role.TEACHER) if prompts else ()
        command = TrainStep(step, rollouts.tokens, prefix)
        with self.rank_group.run_on_all_ranks(command):
            return self.take_step(command, iter(rollouts.parts), advance, count)

    def take_step(
        self,
        command: TrainStep,
        parts: Iterator[Sequence[Rollout]],
        advance: Advance,
        count: Count,
    ) -> StepResult:
        """Take part in a step. The driver sends the rollouts to the other ranks, whose result is
        empty."""
        began = time.perf_counter()
        self.cost.start()
        received = ReceivedParts(self.rank_group, parts)
        if self.policy.sharded is not None:
            list(received)  # all ranks have them before one may run out of memory
        local_figures = self._gradient(received, command, advance, count)
        rollouts = [r for part in received.parts for r in part]
        tokens = sum(len(r.completion.token_ids) for r in rollouts)
        if tokens != command.tokens:
            self._scale_gradients(command.tokens / tokens)
        stepped = self.optimizer.stepped.values()
        self.rank_group.sum_gradients([p for p in stepped if not is_sharded(p)])
        rate = learning_rate(self.config, command.step)
        norm = self.optimizer.clip()
        figures = self._gather_figures(local_figures, advance, count)
        metrics: Metrics = {}
        error = None
        if figures:
            metrics = summarize(rollouts, figures, self.estimator, self.loss, self.sampler)
            metrics |= {"optim/lr": rate, "optim/grad_norm": norm}
            error = refusal(metrics, command.step, self.max_mismatch)
        if self.rank_group.broadcast_object(error is not None):
            self.optimizer.zero_grad()
            if error is not None:
                raise error
            return StepResult({}, [], [])
        with self.policy.lock:
            self.optimizer.step(rate)
            if self.policy.teacher_weights is Weights.EMA:
                self.policy.update_ema(self.config.orchestrator.teacher_model.ema_decay)
        metrics |= self._performance(tokens, began + received.waited)
        return StepResult(metrics, figures, rollouts)

    def _gather_figures(
        self, local_figures: dict[int, TokenFigures], advance: Advance, count: Count
    ) -> list[TokenFigures]:
        """The figures of every rollout in order; an empty list on the other ranks.

        The driver also logs the other ranks' warnings.
        """
        share = local_figures, self.rank_group.drain_warnings()
        by_rollout: dict[int, TokenFigures] = {}
        for rank, (figures, warnings) in enumerate(self.rank_group.gather_object(share)):
            by_rollout |= figures
            if rank > 0:
                for warning in warnings:
                    logger.warning(f"rank {rank}: {warning}")
                advance(count([*figures.values()]))
        return [by_rollout[i] for i in sorted(by_rollout)]

    def _performance(self, tokens: int, began: float) -> Metrics:
        """Time and memory of a step that has computed since `began`; empty on the other ranks."""
        cost = self.cost.metrics(self.rank_group)
        if not cost:
            return {}
        seconds = time.perf_counter() - began
        rate = tokens / seconds
        return {"time/train": seconds, "perf/train_tokens_per_second": rate, **cost}

    # -- the gradient --------------------------------------------------------------------------

    def _gradient(
        self, received: ReceivedParts, command: TrainStep, advance: Advance, count: Count
    ) -> dict[int, TokenFigures]:
        """Add the loss's gradient to the parameters. Returns this rank's figures by rollout.

        On OOM the step starts again with smaller micro-batches. Raises UserError (exit code 3) if a
        single sequence does not fit.
        """
        reported = 0
        context = self._teacher_context(command.prefix)
        while True:
            done = 0

            def progress(figures: Sequence[TokenFigures]) -> None:
                nonlocal done, reported
                done += count(figures)
                if done > reported:
                    advance(done - reported)
                    reported = done

            figures, failure = self._accumulate(received, command, context, progress)
            if self.policy.sharded is None:
                failures = {self.rank_group.rank: failure} if failure else {}
            else:  # every pass needs all ranks, so all of them start again
                by_rank = self.rank_group.all_gather_object(failure)
                failures = {rank: failure for rank, failure in enumerate(by_rank) if failure}
            if not failures:
                return figures
            self._discard_gradients()
            self.micro_batches.shrink(failures, sharded=self.policy.sharded is not None)

    def _accumulate(
        self,
        parts: Iterable[Sequence[Rollout]],
        command: TrainStep,
        context: TeacherContext,
        progress: Callable[[Sequence[TokenFigures]], None],
    ) -> tuple[dict[int, TokenFigures], OutOfMemory | None]:
        """One attempt at the step, which ends at the first part with OOM."""
        figures: dict[int, TokenFigures] = {}
        first = passes = 0
        for part in parts:
            batches = self.micro_batches.passes(
                part, sharded=self.policy.sharded is not None, cached=len(command.prefix)
            )
            seeds = [self._dropout_seed(command.step, passes + i) for i in range(len(batches))]
            found, failure = self._accumulate_part(
                part, batches, seeds, 1 / command.tokens, context, progress
            )
            if failure is not None:
                return {}, failure
            figures |= {first + i: f for i, f in found.items()}
            first, passes = first + len(part), passes + len(batches)
        self.policy.reshard()
        return figures, None

    def _accumulate_part(
        self,
        rollouts: Sequence[Rollout],
        passes: Sequence[Sequence[int]],
        seeds: Sequence[int],
        weight: float,
        context: TeacherContext,
        progress: Callable[[Sequence[TokenFigures]], None],
    ) -> tuple[dict[int, TokenFigures], OutOfMemory | None]:
        """The passes of one part, each with its rollouts and its seed for dropout.

        On OOM a sharded rank continues with its shortest rollout, because collectives need every
        rank. Other ranks stop.
        """
        sharded = self.policy.sharded
        lengths = [max(r.student_length, r.teacher_length) for r in rollouts]
        shortest = [rollouts[lengths.index(min(lengths))]]
        figures: dict[int, TokenFigures] = {}
        message = None
        for rows, seed in zip(passes, seeds, strict=True):
            torch.manual_seed(seed)
            if sharded is not None:
                sharded.begin_pass()
            if message is None:
                batch = [rollouts[i] for i in rows] or shortest
                batch_figures, message = self._try_pass(batch, context, weight if rows else 0.0)
                self.rank_group.progress()
                figures.update(zip(rows, batch_figures, strict=False))
                progress(batch_figures if rows else [])
                if message is not None:
                    self._discard_gradients()
                    if sharded is not None:
                        sharded.repeat_pass(message)
            if message is not None and sharded is None:
                break
            if message is not None and self._try_pass(shortest, context, 0.0)[1] is not None:
                raise sequence_too_long(min(lengths), message)
        if message is None:
            return figures, None
        self.policy.reshard()
        own = [rollouts[i] for rows in passes for i in rows] or shortest
        return {}, OutOfMemory(
            message=message,
            tokens=self.micro_batches.tokens(own, len(context[0])),
            longest=max(max(r.student_length, r.teacher_length) for r in own),
            single_sequences=max(map(len, passes), default=1) <= 1,
        )

    def _dropout_seed(self, step: int, index: int) -> int:
        """Each micro-batch of a step has its own dropout, the same on every attempt."""
        number = index * self.rank_group.size + self.rank_group.rank
        return self.config.seed * 1_000_003 + step * 1009 + number

    def _try_pass(
        self, batch: Sequence[Rollout], context: TeacherContext, weight: float
    ) -> tuple[list[TokenFigures], str | None]:
        """Run a micro-batch forward and backward.

        Returns each rollout's figures, or on OOM the allocator's message. The error is not raised,
        because its traceback would keep the graph in memory.
        """
        try:
            output = self._objective(batch, context)
            (output.loss.sum() * weight).backward()
            return figures_by_rollout(output, [len(r.completion.token_ids) for r in batch]), None
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return [], first_line(error)

    def _discard_gradients(self) -> None:
        parameters = list(self.policy.model.parameters())
        if self.policy.sharded is not None:
            parameters += self.policy.sharded.parameters()
        for parameter in parameters:
            parameter.grad = None
        self.optimizer.zero_grad()
        if self.policy.device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.no_grad()
    def _scale_gradients(self, factor: float) -> None:
        """Multiply the gradients, in the dtype in which they have been accumulated."""
        for parameter in {*self.optimizer.stepped.values(), *(p for _, p in self.optimizer.named)}:
            if parameter.grad is not None:
                parameter.grad.mul_(factor)

    def _objective(self, rollouts: Sequence[Rollout], context: TeacherContext) -> DistillOutput:
        policy = self.policy
        student = collate(
            [r.prompt.student_ids for r in rollouts],
            [r.completion.sequence for r in rollouts],
            predicted=[r.completion.sampled_at for r in rollouts],
            pad_id=policy.pad_id,
            layout=policy.attention.layout,
        ).to(policy.device)
        teacher = self._teacher_inputs(rollouts, context)
        self.cost.count(student)
        student_NH = hidden_states(policy, student)
        sizes = torch.tensor([len(r.completion.token_ids) for r in rollouts])
        advantage_N = torch.tensor([r.advantage for r in rollouts]).repeat_interleave(sizes)
        sampler_N = torch.tensor([p for r in rollouts for p in r.completion.logprobs])
        output = self.estimator.loss_function(self.loss)(
            student_NH,
            policy.head,
            student.targets_N,
            **teacher,
            advantage_N=advantage_N.to(policy.device),
            sampler_logp_N=sampler_N.to(policy.device),
        )
        if self.sampler is Role.TEACHER and output.teacher_entropy is None:
            # the ratio π / q has too long a tail to estimate KL(π‖q) from the teacher's samples
            return output._replace(kl=output.teacher_logp - output.logp)
        return output

    @torch.no_grad()
    def _teacher_context(self, prefix: tuple[int, ...]) -> TeacherContext:
        """The prefix that the teacher reads once for the whole step, if it runs in the trainer."""
        if not prefix:
            return (), None
        policy = self.policy
        try:
            with policy.running_as(Role.TEACHER), policy.inference():
                return prefix, self.prefixes.states(prefix, Role.TEACHER)
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                raise sequence_too_long(len(prefix), str(error)) from error
            raise

    @torch.no_grad()
    def _teacher_inputs(
        self, rollouts: Sequence[Rollout], context: TeacherContext
    ) -> TeacherInputs:
        """The teacher's inputs to the objective: an engine's scores, or a pass in the trainer."""
        policy = self.policy
        completions = [r.completion for r in rollouts]
        scores = [r.teacher for r in rollouts if r.teacher is not None]
        if scores:
            return self.estimator.engine_scores(scores, completions, policy.device)
        student = policy.causal
        with policy.running_as(Role.TEACHER), policy.inference():
            passes = []
            for rows, tokens, states in teacher_passes(policy, self.prefixes, rollouts, context):
                self.cost.count(tokens)
                passes.append((rows, hidden_states(policy, tokens, states)))
            head = None if policy.causal is student else policy.head
            return {"h_t_NH": in_order(passes, rollouts), "teacher_weight": head}

    # -- checkpoints ---------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """What training changes: full tensors by name, for a checkpoint."""
        tensors = {f"optimizer/{k}": v for k, v in self.optimizer.state().items()}
        tensors |= {f"policy/{k}": v for k, v in self.policy.state().items()}
        if self.policy.sharded is None:
            return tensors
        with self.rank_group.run_on_all_ranks(GatherState()):
            full = ((k, full_tensor(v)) for k, v in tensors.items())
            return {k: v.cpu() for k, v in full if self.rank_group.rank == 0}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned, with any number of ranks.

        The driver sends the tensors. On the other ranks only their shapes and dtypes matter.
        """
        shapes = {k: torch.empty_like(v, device="meta") for k, v in state.items()}
        with self.rank_group.run_on_all_ranks(LoadState(shapes)):
            for prefix, target in (("policy/", self.policy), ("optimizer/", self.optimizer)):
                target.load_state(
                    (
                        key.removeprefix(prefix),
                        self.rank_group.broadcast(tensor, self.policy.device),
                    )
                    for key, tensor in state.items()
                    if key.startswith(prefix)
                )
