"""One optimizer step from a batch of rollouts: teacher pass, student pass, objective, AdamW.

Shapes: `_N` completion tokens of a micro-batch, `_H` hidden.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minidistill.config import Config
from minidistill.engines.base import Advance
from minidistill.roles import Estimator
from minidistill.trainer.batching import collate, share_out, split_by_tokens
from minidistill.trainer.figures import Figures, engine_scores, per_rollout
from minidistill.trainer.forward import PrefixCache, hidden_states
from minidistill.trainer.health import mismatch_limit, out_of_memory, refusal, too_large
from minidistill.trainer.metrics import summarize
from minidistill.trainer.optim import Optimizer, learning_rate
from minidistill.trainer.policy import EMA, Policy
from minidistill.trainer.sharding import is_divided, whole
from minidistill.types import Metrics, Rollout, TokenStats
from minidistill_kernels import DistillOutput, linear_distill

SAMPLED_KL_CLIP = 5.0  # nats; the default of `loss.kl_clip` with one-sample estimates


@dataclass(frozen=True, slots=True)
class StepResult:
    """A step's metrics, and each rollout's per-token figures in the given order."""

    metrics: Metrics
    tokens: list[TokenStats]


class Trainer:
    """Trains the policy against its teacher, run here or scored by an engine.

    The loss of a step is normalised by the step's completion tokens, so micro-batches, padding,
    packing and the number of ranks do not change it.

    Every rank has one. What the driver calls here, the others do with it: see `World`.
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
        self.world = policy.world
        self.estimator, self.warn = estimator, warn
        self.budget = config.trainer.micro_batch_tokens
        self.optimizer = Optimizer(policy, config)
        loss = config.trainer.loss
        self.kl_clip: float | None
        if isinstance(loss.kl_clip, float):
            self.kl_clip = loss.kl_clip
        else:
            sampled = loss.kl_clip == "auto" and self.estimator == "sampled"
            self.kl_clip = SAMPLED_KL_CLIP if sampled else None
        self.max_mismatch = mismatch_limit(config, policy.dtype)

    def step(self, rollouts: Sequence[Rollout], step: int, advance: Advance) -> StepResult:
        """One update, the `step`-th counted from 1. `advance` is told of trained tokens.

        Only the driver's result has anything in it. Raises UserError (exit code 4) where the loss
        or the gradient is no number, or where the sampler ran other weights; the weights are then
        as before.
        """
        with self.world.together("step", rollouts, step, _silent):
            return self._step(rollouts, step, advance)

    def _step(self, rollouts: Sequence[Rollout], step: int, advance: Advance) -> StepResult:
        began = time.perf_counter()
        total = sum(len(r.completion.token_ids) for r in rollouts)
        figures = self._gradients(rollouts, step, total, advance)
        self.world.sum_gradients([p for _, p in self.optimizer.named if not is_divided(p)])
        rate = learning_rate(self.config, step)
        norm = self.optimizer.clip()
        outputs = self._all_figures(figures, advance)
        metrics: Metrics = {}
        refused = None
        if outputs:
            metrics = summarize(rollouts, outputs, self.config.trainer.loss, self.estimator)
            metrics |= {"optim/lr": rate, "optim/grad_norm": norm}
            refused = refusal(metrics, step, self.max_mismatch)
        if self.world.tell(refused is not None):
            self.optimizer.zero_grad()
            if refused is not None:
                raise refused
            return StepResult({}, [])
        with self.policy.lock:
            self.optimizer.step(rate)
            if self.policy.teacher == EMA:
                self.policy.update_ema(self.config.orchestrator.teacher_model.ema_decay)
        seconds = time.perf_counter() - began
        metrics |= {"time/train": seconds, "perf/train_tokens_per_second": total / seconds}
        stats = [TokenStats(*(t.tolist() for t in parts[1:4])) for parts in outputs]
        return StepResult(metrics, stats)

    def _all_figures(self, own: Figures, advance: Advance) -> list[list[Tensor]]:
        """On the driver every rollout's figures, in the order of rollouts; elsewhere nothing."""
        found: Figures = {}
        for rank, (figures, notes) in enumerate(self.world.gather((own, self.world.notes))):
            found |= figures
            for note in notes if rank else ():
                self.warn(f"rank {rank}: {note}")
            if rank:
                advance(sum(len(parts[0]) for parts in figures.values()))
        self.world.notes.clear()
        return [found[i] for i in sorted(found)]

    def _gradients(
        self, rollouts: Sequence[Rollout], step: int, total: int, advance: Advance
    ) -> Figures:
        """The gradient of this rank's share of the step, and the figures of these rollouts.

        Where memory runs out the share is begun again with half the micro-batch, which is kept.
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

            try:
                return self._accumulate(rollouts, step, total, progress)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                shortage = str(error).strip().splitlines()[0] if str(error) else "out of memory"
            # here, where the error and with it the graph that it holds is gone
            self._halve(rollouts, shortage)

    def _passes(self, rollouts: Sequence[Rollout]) -> list[list[int]]:
        """The rollouts of each of this rank's micro-batches; all ranks have as many if all have to
        run each pass."""
        lengths = _lengths(rollouts)
        passes = []
        for share in share_out(lengths, self.world.size):
            own = [lengths[i] for i in share]
            groups = split_by_tokens(own, self.budget, self.config.trainer.packing)
            passes.append([[share[i] for i in group] for group in groups])
        if self.policy.trunks:
            most = max(map(len, passes))
            passes = [groups + [[]] * (most - len(groups)) for groups in passes]
        return passes[self.world.rank]

    def _accumulate(
        self, rollouts: Sequence[Rollout], step: int, total: int, advance: Advance
    ) -> Figures:
        prefix = self.prefixes.common([r.prompt.teacher_ids for r in rollouts])
        shortest = min(range(len(rollouts)), key=_lengths(rollouts).__getitem__)
        figures: Figures = {}
        for index, rows in enumerate(self._passes(rollouts)):
            number = index * self.world.size + self.world.rank
            torch.manual_seed(self.config.seed * 1_000_003 + step * 1009 + number)  # dropout alone
            batch = [rollouts[i] for i in rows or [shortest]]
            output = self._objective(batch, prefix, packed=self.config.trainer.packing)
            loss = output.loss.sum() / total
            (loss if rows else 0 * loss).backward()
            if rows:
                sizes = [len(r.completion.token_ids) for r in batch]
                figures.update(zip(rows, per_rollout(output, sizes), strict=True))
                advance(sum(sizes))
        self.policy.release()
        return figures

    def _halve(self, rollouts: Sequence[Rollout], shortage: str) -> None:
        """Half the micro-batch. Raises UserError (exit code 3) where it is one sequence already,
        or where the other ranks are in the middle of the same pass."""
        self.optimizer.zero_grad()
        passes = self._passes(rollouts)
        lengths = [_lengths(rollouts)[i] for rows in passes for i in rows]
        if self.policy.trunks:
            raise too_large(
                f"a micro-batch does not fit in memory: {shortage}",
                f"set it below {self.budget}, or trainer.model.ac.freq = 1",
            )
        if max(map(len, passes)) == 1:
            raise too_large(
                f"one sequence of {max(lengths)} tokens does not fit in memory: {shortage}",
                "set trainer.model.ac.freq = 1, shorten the context or "
                "orchestrator.sampling.max_tokens, or train on more GPUs",
            )
        # from what there was: a budget above that would have to be halved several times
        self.budget = min(self.budget, sum(lengths)) // 2
        if self.policy.device.type == "cuda":
            torch.cuda.empty_cache()
        self.warn(
            f"out of memory ({shortage}): trainer.micro_batch_tokens is {self.budget} from here on"
        )

    def state(self) -> dict[str, Tensor]:
        """What training changes, as whole tensors by name, for a checkpoint."""
        tensors = {f"optimizer/{k}": v for k, v in self.optimizer.state().items()}
        tensors |= {f"policy/{k}": v for k, v in self.policy.state().items()}
        if not self.policy.trunks:
            return tensors
        with self.world.together("state"):
            found = ((k, whole(v)) for k, v in tensors.items())
            return {k: v.cpu() for k, v in found if self.world.rank == 0}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave, with any number of ranks. Elsewhere than on the driver the
        tensors say what it is going to send."""
        promised = {k: torch.empty_like(v, device="meta") for k, v in state.items()}
        with self.world.together("load_state", promised):
            for key, tensor in state.items():
                part, _, name = key.partition("/")
                target = self.policy if part == "policy" else self.optimizer
                target.load_state({name: self.world.spread(tensor, self.policy.device)})

    def _objective(
        self, rollouts: Sequence[Rollout], prefix: tuple[int, ...], packed: bool
    ) -> DistillOutput:
        policy, loss = self.policy, self.config.trainer.loss
        completions = [r.completion.token_ids for r in rollouts]
        student = collate(
            [r.prompt.student_ids for r in rollouts],
            completions,
            pad_id=policy.pad_id,
            packed=packed,
        ).to(policy.device)
        teacher = self._teacher(rollouts, completions, prefix)
        student_NH = hidden_states(policy, student)
        sizes = torch.tensor([len(c) for c in completions])
        advantage_N = torch.tensor([r.advantage for r in rollouts]).repeat_interleave(sizes)
        sampler_N = torch.tensor([p for r in rollouts for p in r.completion.logprobs])
        return linear_distill(
            student_NH,
            policy.head_VH,
            student.targets_N,
            **teacher,
            advantage_N=advantage_N.to(policy.device),
            sampler_logp_N=sampler_N.to(policy.device),
            estimator=self.estimator,
            top_k=min(loss.top_k, len(policy.head_VH)),
            adv_tau=loss.adv_tau,
            teacher_tau=loss.teacher_tau,
            student_tau=loss.student_tau,
            temperature=self.config.orchestrator.sampling.temperature,
            ratio_clip_high=loss.ratio_clip_high,
            token_mask_low=loss.token_mask_low,
            token_mask_high=loss.token_mask_high,
            kl_clip=self.kl_clip,
        )

    @torch.no_grad()
    def _teacher(
        self,
        rollouts: Sequence[Rollout],
        completions: Sequence[tuple[int, ...]],
        prefix: tuple[int, ...],
    ) -> dict[str, Any]:
        """The teacher's part of the objective: what an engine scored, or a pass of its own."""
        policy = self.policy
        scores = [r.teacher for r in rollouts if r.teacher is not None]
        if scores:
            return engine_scores(scores, rollouts, self.estimator, policy.device)
        tokens = collate(
            [r.prompt.teacher_ids for r in rollouts],
            completions,
            pad_id=policy.pad_id,
            prefix=prefix,
        )
        student = policy.causal
        with policy.role(policy.teacher), policy.inference():
            states = self.prefixes.states(prefix, policy.teacher)
            hidden_NH = hidden_states(policy, tokens, states)
            own = None if policy.causal is student else policy.head_VH
            return {"h_t_NH": hidden_NH, "teacher_weight": own}


def _silent(count: int) -> None:
    """Progress of ranks that nobody looks at."""


def _lengths(rollouts: Sequence[Rollout]) -> list[int]:
    """Tokens that a rollout takes in the longer of its two passes."""
    return [max(r.student_length, r.teacher_length) for r in rollouts]
