"""A rank's share of a step's gradient: micro-batches through teacher, student and objective."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from minidistill.config import Config
from minidistill.errors import UserError
from minidistill.estimators import Estimator, TeacherInputs
from minidistill.trainer.batching import collate, share_out, split_by_tokens
from minidistill.trainer.forward import KeysValues, PrefixCache, hidden_states
from minidistill.trainer.guards import is_out_of_memory, too_large
from minidistill.trainer.objective import figures_by_rollout, loss_settings
from minidistill.trainer.policy import Policy
from minidistill.types import Advance, Role, Rollout, TokenFigures
from minidistill_kernels import DistillOutput

logger = logging.getLogger(__name__)

TeacherContext = tuple[tuple[int, ...], KeysValues | None]
"""The ids that all of a step's teacher prompts begin with, and their keys and values."""


@dataclass(frozen=True, slots=True)
class OutOfMemory:
    """A try at a step in which a micro-batch did not fit in a rank's memory."""

    message: str
    tokens: int
    """Of the rank's rollouts in this step."""
    longest: int
    """The tokens of the longest of them."""
    single_sequences: bool
    """Every micro-batch of the rank was one sequence."""


class Gradients:
    """Leaves the gradient of a step's loss in the parameters, summed over micro-batches.

    On OOM the step starts again with half the micro-batch size, which later steps keep.
    """

    def __init__(
        self, policy: Policy, config: Config, estimator: Estimator, prefixes: PrefixCache
    ) -> None:
        self.policy, self.config = policy, config
        self.estimator, self.prefixes = estimator, prefixes
        self.rank_group = policy.rank_group
        self.loss = loss_settings(config, estimator)
        self.budget = config.trainer.micro_batch_tokens

    def compute(
        self, rollouts: Sequence[Rollout], step: int, advance: Advance
    ) -> dict[int, TokenFigures]:
        """The figures of this rank's rollouts, by index. `advance` is told of their tokens.

        Raises UserError (exit code 3) if a single sequence does not fit.
        """
        reported = 0
        while True:
            done = 0

            def progress(count: int) -> None:
                nonlocal done, reported
                done += count
                if done > reported:
                    advance(done - reported)
                    reported = done

            figures, failure = self._accumulate(rollouts, step, progress)
            if self.policy.sharded is None:
                failures = {self.rank_group.rank: failure} if failure else {}
            else:  # every pass needs all ranks, so all of them start again
                by_rank = self.rank_group.all_gather_object(failure)
                failures = {rank: failure for rank, failure in enumerate(by_rank) if failure}
            if not failures:
                return figures
            self._halve_micro_batches(failures)

    def _accumulate(
        self, rollouts: Sequence[Rollout], step: int, advance: Advance
    ) -> tuple[dict[int, TokenFigures], OutOfMemory | None]:
        """Try the step once.

        On OOM a sharded rank continues with its shortest rollout, because collectives need every
        rank. Other ranks stop.
        """
        sharded = self.policy.sharded
        lengths = [max(r.student_length, r.teacher_length) for r in rollouts]
        shortest = [rollouts[lengths.index(min(lengths))]]
        total = sum(len(r.completion.token_ids) for r in rollouts)
        context = self._teacher_context(rollouts)
        passes = self._passes(lengths)
        figures: dict[int, TokenFigures] = {}
        message = None
        for index, rows in enumerate(passes):
            self._seed_dropout(step, index)
            if sharded is not None:
                sharded.begin_pass()
            if message is None:
                batch = [rollouts[i] for i in rows] or shortest
                batch_figures, message = self._try_pass(batch, context, 1 / total if rows else 0.0)
                figures.update(zip(rows, batch_figures, strict=False))
                advance(sum(len(f.loss) for f in batch_figures) if rows else 0)
                if message is not None:
                    self._discard_gradients()
                    if sharded is not None:
                        sharded.repeat_pass()
            if message is not None and sharded is None:
                break
            if message is not None and self._try_pass(shortest, context, 0.0)[1] is not None:
                raise _sequence_too_long(min(lengths), message)
        self.policy.reshard()
        if message is None:
            return figures, None
        batches = [rows for rows in passes if rows]
        batch_lengths = [lengths[i] for rows in batches for i in rows] or [min(lengths)]
        return {}, OutOfMemory(
            message=message,
            tokens=sum(batch_lengths),
            longest=max(batch_lengths),
            single_sequences=max(map(len, batches), default=1) == 1,
        )

    def _seed_dropout(self, step: int, index: int) -> None:
        """Give each micro-batch of a step its own dropout, the same on every try."""
        number = index * self.rank_group.size + self.rank_group.rank
        torch.manual_seed(self.config.seed * 1_000_003 + step * 1009 + number)

    def _try_pass(
        self, batch: Sequence[Rollout], context: TeacherContext, weight: float
    ) -> tuple[list[TokenFigures], str | None]:
        """Run a micro-batch forward and backward.

        Returns each rollout's figures, or what the allocator said on OOM. The error is not raised,
        because its traceback would keep the graph in memory.
        """
        try:
            output = self._objective(batch, context)
            (output.loss.sum() * weight).backward()
            return figures_by_rollout(output, [len(r.completion.token_ids) for r in batch]), None
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return [], str(error).strip().partition("\n")[0] or "out of memory"

    def _passes(self, lengths: Sequence[int]) -> list[list[int]]:
        """The rollouts of each of this rank's micro-batches.

        With sharded weights every rank runs the same number of passes; some may be empty.
        """
        passes = []
        for share in share_out(lengths, self.rank_group.size):
            share_lengths = [lengths[i] for i in share]
            groups = split_by_tokens(share_lengths, self.budget, self.config.trainer.packing)
            passes.append([[share[i] for i in group] for group in groups])
        if self.policy.sharded is not None:
            most = max(map(len, passes))
            passes = [groups + [[]] * (most - len(groups)) for groups in passes]
        return passes[self.rank_group.rank]

    def _halve_micro_batches(self, failures: dict[int, OutOfMemory]) -> None:
        """Set the micro-batch size by the rank with the least room."""
        self._discard_gradients()
        for failure in failures.values():
            if failure.single_sequences:
                raise _sequence_too_long(failure.longest, failure.message)
        # by what a micro-batch held: a much larger budget would have to be halved several times
        rank, worst = min(failures.items(), key=lambda item: item[1].tokens)
        self.budget = min(self.budget, worst.tokens) // 2
        if self.policy.sharded is not None and self.rank_group.rank:
            return  # the driver warns for all
        where = f" on rank {rank}" if rank != self.rank_group.rank else ""
        logger.warning(
            f"out of memory{where} ({worst.message}): "
            f"trainer.micro_batch_tokens is {self.budget} from here on"
        )

    def _discard_gradients(self) -> None:
        parameters = list(self.policy.model.parameters())
        if self.policy.sharded is not None:
            parameters += self.policy.sharded.parameters()
        for parameter in parameters:
            parameter.grad = None
        if self.policy.device.type == "cuda":
            torch.cuda.empty_cache()

    # -- a micro-batch -------------------------------------------------------------------------

    def _objective(self, rollouts: Sequence[Rollout], context: TeacherContext) -> DistillOutput:
        policy = self.policy
        completions = [r.completion.token_ids for r in rollouts]
        student = collate(
            [r.prompt.student_ids for r in rollouts],
            completions,
            pad_id=policy.pad_id,
            packed=self.config.trainer.packing,
        ).to(policy.device)
        teacher = self._teacher_inputs(rollouts, context)
        student_NH = hidden_states(policy, student)
        sizes = torch.tensor([len(c) for c in completions])
        advantage_N = torch.tensor([r.advantage for r in rollouts]).repeat_interleave(sizes)
        sampler_N = torch.tensor([p for r in rollouts for p in r.completion.logprobs])
        return self.estimator.loss(
            student_NH,
            policy.head_VH,
            student.targets_N,
            teacher,
            advantage_N=advantage_N.to(policy.device),
            sampler_logp_N=sampler_N.to(policy.device),
            settings=self.loss,
        )

    @torch.no_grad()
    def _teacher_context(self, rollouts: Sequence[Rollout]) -> TeacherContext:
        """What the teacher reads once for all of the step, if it runs in the trainer."""
        if any(r.teacher is not None for r in rollouts):
            return (), None
        policy = self.policy
        prefix = self.prefixes.common([r.prompt.teacher_ids for r in rollouts])
        try:
            with policy.running_as(Role.TEACHER), policy.inference():
                return prefix, self.prefixes.states(prefix, Role.TEACHER)
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                raise _sequence_too_long(len(prefix), str(error)) from error
            raise

    @torch.no_grad()
    def _teacher_inputs(
        self, rollouts: Sequence[Rollout], context: TeacherContext
    ) -> TeacherInputs:
        """The teacher's part of the objective: an engine's scores, or a pass in the trainer."""
        policy = self.policy
        completions = [r.completion for r in rollouts]
        scores = [r.teacher for r in rollouts if r.teacher is not None]
        if scores:
            return self.estimator.engine_scores(scores, completions, policy.device)
        prefix, states = context
        tokens = collate(
            [r.prompt.teacher_ids for r in rollouts],
            [c.token_ids for c in completions],
            pad_id=policy.pad_id,
            prefix=prefix,
        )
        student = policy.causal
        with policy.running_as(Role.TEACHER), policy.inference():
            hidden_NH = hidden_states(policy, tokens, states)
            head_VH = None if policy.causal is student else policy.head_VH
            return {"h_t_NH": hidden_NH, "teacher_weight": head_VH}


def _sequence_too_long(tokens: int, message: str) -> UserError:
    return too_large(
        f"one sequence of {tokens} tokens does not fit in memory: {message}",
        "set trainer.model.ac.freq = 1, shorten the context or "
        "orchestrator.sampling.max_tokens, or train on more GPUs",
    )
