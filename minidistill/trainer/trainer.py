"""One optimizer step from a batch of rollouts: teacher pass, student pass, objective, AdamW.

Shapes: `_N` completion tokens of a micro-batch, `_H` hidden.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minidistill.config import Config
from minidistill.engines.base import Advance
from minidistill.errors import EXIT_ENVIRONMENT, EXIT_HEALTH, UserError
from minidistill.roles import Estimator
from minidistill.trainer.batching import collate, split_by_tokens
from minidistill.trainer.forward import PrefixCache, hidden_states
from minidistill.trainer.metrics import summarize
from minidistill.trainer.optim import Optimizer, learning_rate
from minidistill.trainer.policy import EMA, Policy
from minidistill.types import Metrics, Rollout, TeacherScores, TokenStats
from minidistill_kernels import DistillOutput, linear_distill

SAMPLED_KL_CLIP = 5.0  # nats; the default of `loss.kl_clip` with one-sample estimates
# Highest `kl/sampler_mismatch` that numerics explain: some 100 and 20 times what vLLM shows
MISMATCH = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-2}


@dataclass(frozen=True, slots=True)
class StepResult:
    """A step's metrics, and each rollout's per-token figures in the given order."""

    metrics: Metrics
    tokens: list[TokenStats]


class Trainer:
    """Trains the policy against its teacher, run here or scored by an engine.

    The loss of a step is normalised by the step's completion tokens, so micro-batches, padding
    and packing do not change it.
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
        self.estimator, self.warn = estimator, warn
        self.budget = config.trainer.micro_batch_tokens
        self.optimizer = Optimizer(policy, config)
        loss, lora = config.trainer.loss, config.trainer.model.lora
        self.kl_clip: float | None
        if isinstance(loss.kl_clip, float):
            self.kl_clip = loss.kl_clip
        else:
            sampled = loss.kl_clip == "auto" and self.estimator == "sampled"
            self.kl_clip = SAMPLED_KL_CLIP if sampled else None
        self.max_mismatch = math.inf
        if isinstance(loss.max_sampler_mismatch, float):
            self.max_mismatch = loss.max_sampler_mismatch
        elif (
            loss.max_sampler_mismatch == "auto"
            and not (lora and lora.dropout)
            and config.schedule == "sync"
        ):
            self.max_mismatch = MISMATCH[policy.dtype]

    def step(self, rollouts: Sequence[Rollout], step: int, advance: Advance) -> StepResult:
        """One update, the `step`-th counted from 1. `advance` is told of trained tokens.

        Raises UserError (exit code 4) where the loss or the gradient is no number, or where the
        sampler ran other weights; the weights are then as before.
        """
        began = time.perf_counter()
        total = sum(len(r.completion.token_ids) for r in rollouts)
        outputs = self._gradients(rollouts, step, total, advance)
        rate = learning_rate(self.config, step)
        norm = self.optimizer.clip()
        metrics = summarize(rollouts, outputs, self.config.trainer.loss, self.estimator)
        metrics |= {"optim/lr": rate, "optim/grad_norm": norm}
        try:
            self._check(metrics, step)
        except UserError:
            self.optimizer.zero_grad()
            raise
        with self.policy.lock:
            self.optimizer.step(rate)
            if self.policy.teacher == EMA:
                self.policy.update_ema(self.config.orchestrator.teacher_model.ema_decay)
        seconds = time.perf_counter() - began
        metrics |= {"time/train": seconds, "perf/train_tokens_per_second": total / seconds}
        stats = [TokenStats(*(t.tolist() for t in parts[1:4])) for parts in outputs]
        return StepResult(metrics, stats)

    def _gradients(
        self, rollouts: Sequence[Rollout], step: int, total: int, advance: Advance
    ) -> list[list[Tensor]]:
        """The step's gradient, and each rollout's figures.

        Where memory runs out the step is begun again with half the micro-batch, which is kept.
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

    def _accumulate(
        self, rollouts: Sequence[Rollout], step: int, total: int, advance: Advance
    ) -> list[list[Tensor]]:
        prefix = self.prefixes.common([r.prompt.teacher_ids for r in rollouts])
        packing = self.config.trainer.packing
        outputs: dict[int, list[Tensor]] = {}
        for index, rows in enumerate(split_by_tokens(_lengths(rollouts), self.budget, packing)):
            torch.manual_seed(self.config.seed * 1_000_003 + step * 1009 + index)  # dropout alone
            batch = [rollouts[i] for i in rows]
            output = self._objective(batch, prefix, packed=packing)
            (output.loss.sum() / total).backward()
            sizes = [len(r.completion.token_ids) for r in batch]
            outputs.update(zip(rows, per_rollout(output, sizes), strict=True))
            advance(sum(sizes))
        return [outputs[i] for i in range(len(rollouts))]

    def _halve(self, rollouts: Sequence[Rollout], shortage: str) -> None:
        """Half the micro-batch. Raises UserError (exit code 3) where it is one sequence already."""
        self.optimizer.zero_grad()
        lengths, packing = _lengths(rollouts), self.config.trainer.packing
        if max(map(len, split_by_tokens(lengths, self.budget, packing))) == 1:
            raise UserError(
                f"one sequence of {max(lengths)} tokens does not fit in memory: {shortage}",
                where="trainer.micro_batch_tokens",
                fix="set trainer.model.ac.freq = 1, shorten the context or "
                "orchestrator.sampling.max_tokens, or train on more GPUs",
                exit_code=EXIT_ENVIRONMENT,
            )
        # from what there was: a budget above that would have to be halved several times
        self.budget = min(self.budget, sum(lengths)) // 2
        if self.policy.device.type == "cuda":
            torch.cuda.empty_cache()
        self.warn(
            f"out of memory ({shortage}): trainer.micro_batch_tokens is {self.budget} from here on"
        )

    def _check(self, metrics: Metrics, step: int) -> None:
        """Raise UserError (exit code 4) for a step that must not be taken."""
        total, norm = metrics["loss/total"], metrics["optim/grad_norm"]
        if not (math.isfinite(norm) and math.isfinite(total)):
            raise UserError(
                f"step {step}: the loss is {total}, its gradient's norm {norm}",
                where="training",
                fix='lower trainer.optim.lr, or use model.dtype = "float32"; '
                "--resume goes on from the last checkpoint",
                exit_code=EXIT_HEALTH,
            )
        if metrics["kl/sampler_mismatch"] > self.max_mismatch:
            raise UserError(
                f"step {step}: kl/sampler_mismatch is {metrics['kl/sampler_mismatch']:.3g}, above "
                f"{self.max_mismatch:g}: what sampled is not the model that is trained",
                where="trainer.loss.max_sampler_mismatch",
                fix="the engine runs stale weights, or computes them differently: try "
                'inference.engine = "embedded", or raise the limit if the numerics explain it',
                exit_code=EXIT_HEALTH,
            )

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
            return _scored(scores, rollouts, self.estimator, policy.device)
        tokens = collate(
            [r.prompt.teacher_ids for r in rollouts],
            completions,
            pad_id=policy.pad_id,
            prefix=prefix,
        )
        head_VH = policy.head_VH
        with policy.role(policy.teacher), policy.inference():
            states = self.prefixes.states(prefix, policy.teacher)
            own = None if policy.head_VH is head_VH else policy.head_VH
            return {"h_t_NH": hidden_states(policy, tokens, states), "teacher_weight": own}


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on the CPU (where torch says it in words)."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return "DefaultCPUAllocator" in str(error) or "not enough memory" in str(error)


def _lengths(rollouts: Sequence[Rollout]) -> list[int]:
    """Tokens that a rollout takes in the longer of its two passes."""
    return [max(r.student_length, r.teacher_length) for r in rollouts]


def _scored(
    scores: Sequence[TeacherScores],
    rollouts: Sequence[Rollout],
    estimator: Estimator,
    device: torch.device,
) -> dict[str, Any]:
    """An engine's scores as arguments of the objective."""
    logp_N = torch.tensor([p for s in scores for p in s.logprobs], device=device)
    if estimator == "sampled":
        return {"teacher_logp_N": logp_N}
    ids_NK = np.concatenate([r.completion.top_ids for r in rollouts])
    top_NK = np.concatenate([s.top for s in scores])
    return {
        "teacher_logp_N": logp_N,
        "topk_ids_NK": torch.as_tensor(ids_NK, dtype=torch.int64, device=device),
        "teacher_topk_logp_NK": torch.as_tensor(top_NK, dtype=torch.float32, device=device),
    }


def per_rollout(output: DistillOutput, sizes: list[int]) -> list[list[Tensor]]:
    """A micro-batch's figures by rollout, each a list in the order of `DistillOutput`."""
    # an engine tells no entropy
    columns = [torch.full_like(output.logp, math.nan) if t is None else t.detach() for t in output]
    return [list(parts) for parts in zip(*(t.cpu().split(sizes) for t in columns), strict=True)]
