"""The passes of a micro-batch: the teacher's, the student's, and the loss of its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from minidistill.estimators import Estimator, LossSettings, TeacherInputs
from minidistill.trainer.batching import collate
from minidistill.trainer.forward import KeysValues, PrefixCache, hidden_states
from minidistill.trainer.guards import is_out_of_memory
from minidistill.trainer.micro_batches import sequence_too_long
from minidistill.trainer.policy import Policy
from minidistill.types import Role, Rollout
from minidistill_kernels import DistillOutput

TeacherContext = tuple[tuple[int, ...], KeysValues | None]
"""The ids that all of a step's teacher prompts begin with, and their keys and values."""


@dataclass(frozen=True, slots=True)
class Passes:
    """Runs micro-batches through both models."""

    policy: Policy
    estimator: Estimator
    loss: LossSettings
    prefixes: PrefixCache

    def objective(self, rollouts: Sequence[Rollout], context: TeacherContext) -> DistillOutput:
        """The loss of each completion token of a micro-batch, and the figures behind it."""
        policy = self.policy
        completions = [r.completion.token_ids for r in rollouts]
        student = collate(
            [r.prompt.student_ids for r in rollouts],
            completions,
            pad_id=policy.pad_id,
            packed=policy.attention.packed,
        ).to(policy.device)
        teacher = self._teacher_inputs(rollouts, context)
        student_NH = hidden_states(policy, student)
        sizes = torch.tensor([len(c) for c in completions])
        advantage_N = torch.tensor([r.advantage for r in rollouts]).repeat_interleave(sizes)
        sampler_N = torch.tensor([p for r in rollouts for p in r.completion.logprobs])
        return self.estimator.loss_function(self.loss)(
            student_NH,
            policy.head_VH,
            student.targets_N,
            **teacher,
            advantage_N=advantage_N.to(policy.device),
            sampler_logp_N=sampler_N.to(policy.device),
        )

    @torch.no_grad()
    def teacher_context(self, prefix: tuple[int, ...]) -> TeacherContext:
        """Read the prefix that the teacher has in common for the whole step; () if there is none.

        Raises UserError (exit code 3) if it does not fit in memory.
        """
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
        prefix, states = context
        tokens = collate(
            [r.prompt.teacher_ids for r in rollouts],
            [c.token_ids for c in completions],
            pad_id=policy.pad_id,
            packed=policy.attention.unpadded,
            prefix=prefix,
        )
        student = policy.causal
        with policy.running_as(Role.TEACHER), policy.inference():
            hidden_NH = hidden_states(policy, tokens, states)
            head_VH = None if policy.causal is student else policy.head_VH
            return {"h_t_NH": hidden_NH, "teacher_weight": head_VH}
