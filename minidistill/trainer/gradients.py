"""A rank's share of a step's gradient: micro-batches through teacher, student and objective."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from minidistill.config import Config
from minidistill.estimators import Estimator, TeacherInputs
from minidistill.trainer.batching import collate, share_out, split_by_tokens
from minidistill.trainer.distributed import fsdp as sharding
from minidistill.trainer.forward import KeysValues, PrefixCache, hidden_states
from minidistill.trainer.guards import out_of_memory, too_large
from minidistill.trainer.objective import Figures, loss_settings, per_rollout
from minidistill.trainer.policy import Policy
from minidistill.types import Advance, Role, Rollout
from minidistill_kernels import DistillOutput

Context = tuple[tuple[int, ...], KeysValues | None]
"""What all of a step's teacher prompts begin with, and its keys and values."""


class Shortage(NamedTuple):
    """A micro-batch that did not fit in a rank's memory."""

    words: str
    tokens: int
    """Of the rank's rollouts in this step."""
    longest: int
    single: bool
    """It was one sequence."""


class Gradients:
    """Leaves the gradient of a step's loss in the parameters, summed over micro-batches.

    Where memory runs out the step is begun again with half the micro-batch, which is kept.
    """

    def __init__(
        self,
        policy: Policy,
        config: Config,
        prefixes: PrefixCache,
        estimator: Estimator,
        warn: Callable[[str], None],
    ) -> None:
        self.policy, self.config, self.prefixes = policy, config, prefixes
        self.world, self.estimator, self.warn = policy.world, estimator, warn
        self.budget = config.trainer.micro_batch_tokens
        self.loss = loss_settings(config, estimator)

    def compute(self, rollouts: Sequence[Rollout], step: int, advance: Advance) -> Figures:
        """The figures of this rank's rollouts. `advance` is told of their tokens.

        Raises UserError (exit code 3) where one sequence alone does not fit.
        """
        told = 0
        while True:
            done = 0

            def progress(count: int) -> None:
                nonlocal done, told
                done += count
                if done > told:
                    advance(done - told)
                    told = done

            figures, shortage = self._accumulate(rollouts, step, progress)
            # divided weights take all ranks for every pass: they begin again together
            divided = bool(self.policy.trunks)
            shortages = self.world.share(shortage) if divided else [shortage]
            if not any(shortages):
                return figures
            self._begin_again({rank: s for rank, s in enumerate(shortages) if s})

    def _accumulate(
        self, rollouts: Sequence[Rollout], step: int, advance: Advance
    ) -> tuple[Figures, Shortage | None]:
        """One try. Out of memory, a rank of divided weights goes on with the least there is, for
        the others need it in each pass; alone it stops."""
        lengths = [max(r.student_length, r.teacher_length) for r in rollouts]
        least = [rollouts[lengths.index(min(lengths))]]
        total = sum(len(r.completion.token_ids) for r in rollouts)
        context = self._context(rollouts)
        passes = self._passes(lengths)
        figures: Figures = {}
        words = ""
        for index, rows in enumerate(passes):
            number = index * self.world.size + self.world.rank
            torch.manual_seed(self.config.seed * 1_000_003 + step * 1009 + number)  # dropout alone
            sharding.begin_pass(self.policy)
            if not words:
                batch = [rollouts[i] for i in rows] or least
                found, words = self._attempt(batch, context, 1 / total if rows else 0.0)
                figures.update(zip(rows, found, strict=False))
                advance(sum(len(parts[0]) for parts in found) if rows else 0)
                if words:
                    self._clear()
                    sharding.repeat_pass(self.policy)
            if words and not self.policy.trunks:
                break
            if words and self._attempt(least, context, 0.0)[1]:
                raise _too_long(min(lengths), words)
        self.policy.release()
        if not words:
            return figures, None
        mine = [rows for rows in passes if rows]
        own = [lengths[i] for rows in mine for i in rows] or [min(lengths)]
        single = max(map(len, mine), default=1) == 1
        return {}, Shortage(words, sum(own), max(own), single)

    def _attempt(
        self, batch: Sequence[Rollout], context: Context, weight: float
    ) -> tuple[list[list[Tensor]], str]:
        """A micro-batch's pass, forward and backward: each rollout's figures, or what was said
        where memory ran out. On return nothing holds the graph."""
        try:
            output = self._objective(batch, context)
            (output.loss.sum() * weight).backward()
            return per_rollout(output, [len(r.completion.token_ids) for r in batch]), ""
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            return [], str(error).strip().partition("\n")[0] or "out of memory"

    def _passes(self, lengths: Sequence[int]) -> list[list[int]]:
        """The rollouts of each of this rank's micro-batches; all ranks have as many if all have to
        run each pass."""
        passes = []
        for share in share_out(lengths, self.world.size):
            own = [lengths[i] for i in share]
            groups = split_by_tokens(own, self.budget, self.config.trainer.packing)
            passes.append([[share[i] for i in group] for group in groups])
        if self.policy.trunks:
            most = max(map(len, passes))
            passes = [groups + [[]] * (most - len(groups)) for groups in passes]
        return passes[self.world.rank]

    def _begin_again(self, shortages: dict[int, Shortage]) -> None:
        """Half the micro-batch, by the rank that has the least room for it."""
        self._clear()
        for shortage in shortages.values():
            if shortage.single:
                raise _too_long(shortage.longest, shortage.words)
        # from what there was: a budget above that would have to be halved several times
        rank, worst = min(shortages.items(), key=lambda found: found[1].tokens)
        self.budget = min(self.budget, worst.tokens) // 2
        if self.policy.trunks and self.world.rank:
            return  # the driver says it for all
        where = f" on rank {rank}" if rank else ""
        self.warn(
            f"out of memory{where} ({worst.words}): "
            f"trainer.micro_batch_tokens is {self.budget} from here on"
        )

    def _clear(self) -> None:
        """Give up what there is of the gradient."""
        models = [self.policy.model, *self.policy.trunks]
        for parameter in (p for model in models for p in model.parameters()):
            parameter.grad = None
        if self.policy.device.type == "cuda":
            torch.cuda.empty_cache()

    # -- a micro-batch -------------------------------------------------------------------------

    def _objective(self, rollouts: Sequence[Rollout], context: Context) -> DistillOutput:
        policy = self.policy
        completions = [r.completion.token_ids for r in rollouts]
        student = collate(
            [r.prompt.student_ids for r in rollouts],
            completions,
            pad_id=policy.pad_id,
            packed=self.config.trainer.packing,
        ).to(policy.device)
        teacher = self._teacher(rollouts, completions, context)
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
    def _context(self, rollouts: Sequence[Rollout]) -> Context:
        """What the teacher reads once for all of the step, where it is run here."""
        if any(r.teacher is not None for r in rollouts):
            return (), None
        policy = self.policy
        prefix = self.prefixes.common([r.prompt.teacher_ids for r in rollouts])
        try:
            with policy.running_as(Role.TEACHER), policy.inference():
                return prefix, self.prefixes.states(prefix, Role.TEACHER)
        except (RuntimeError, MemoryError) as error:
            if out_of_memory(error):
                raise _too_long(len(prefix), str(error)) from error
            raise

    @torch.no_grad()
    def _teacher(
        self,
        rollouts: Sequence[Rollout],
        completions: Sequence[tuple[int, ...]],
        context: Context,
    ) -> TeacherInputs:
        """The teacher's part of the objective: what an engine scored, or a pass of its own."""
        policy = self.policy
        scores = [r.teacher for r in rollouts if r.teacher is not None]
        if scores:
            sampled = [r.completion for r in rollouts]
            return self.estimator.engine_scores(scores, sampled, policy.device)
        prefix, states = context
        tokens = collate(
            [r.prompt.teacher_ids for r in rollouts],
            completions,
            pad_id=policy.pad_id,
            prefix=prefix,
        )
        student = policy.causal
        with policy.running_as(Role.TEACHER), policy.inference():
            hidden_NH = hidden_states(policy, tokens, states)
            own = None if policy.causal is student else policy.head_VH
            return {"h_t_NH": hidden_NH, "teacher_weight": own}


def _too_long(tokens: int, words: str) -> Exception:
    return too_large(
        f"one sequence of {tokens} tokens does not fit in memory: {words}",
        "set trainer.model.ac.freq = 1, shorten the context or "
        "orchestrator.sampling.max_tokens, or train on more GPUs",
    )
