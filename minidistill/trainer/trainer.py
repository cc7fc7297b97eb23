"""One optimizer step from a batch of rollouts: gradients, guards, AdamW, a moving average."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minidistill.config import Config
from minidistill.estimators import Estimator
from minidistill.trainer.distributed.fsdp import full_tensor, is_sharded
from minidistill.trainer.forward import PrefixCache
from minidistill.trainer.gradients import Gradients
from minidistill.trainer.guards import mismatch_limit, refusal
from minidistill.trainer.memory import peak_gib, reset_peak
from minidistill.trainer.metrics import summarize
from minidistill.trainer.optim import Optimizer, learning_rate
from minidistill.trainer.policy import Policy, Weights
from minidistill.types import Advance, Metrics, Rollout, TokenFigures

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StepResult:
    """A step's metrics, and the figures of each rollout in the given order."""

    metrics: Metrics
    tokens: list[TokenFigures]


class Trainer:
    """Trains the policy towards its teacher, which runs in the trainer or was scored by an engine.

    The loss of a step is normalized by the step's completion tokens, so micro-batches, padding,
    packing and the number of ranks do not change it.

    Every rank has one. The driver's calls are commands, which the other ranks run too.
    """

    def __init__(
        self, policy: Policy, config: Config, estimator: Estimator, prefixes: PrefixCache
    ) -> None:
        self.policy, self.config, self.estimator = policy, config, estimator
        self.rank_group = policy.rank_group
        self.gradients = Gradients(policy, config, estimator, prefixes)
        self.optimizer = Optimizer(policy, config)
        self.max_mismatch = mismatch_limit(config, policy.dtype)

    def step(self, rollouts: Sequence[Rollout], step: int, advance: Advance) -> StepResult:
        """One update, the `step`-th counted from 1. `advance` is told of trained tokens.

        Only the driver's result has contents. Raises UserError (exit code 4) if the loss or the
        gradient is not finite, or if the sampler ran other weights; the weights are then unchanged.
        """
        with self.rank_group.run_on_all_ranks(TrainStep(tuple(rollouts), step)):
            return self._step(rollouts, step, advance)

    def _step(self, rollouts: Sequence[Rollout], step: int, advance: Advance) -> StepResult:
        began = time.perf_counter()
        reset_peak(self.policy.device)
        local_figures = self.gradients.compute(rollouts, step, advance)
        self.rank_group.sum_gradients([p for _, p in self.optimizer.named if not is_sharded(p)])
        rate = learning_rate(self.config, step)
        norm = self.optimizer.clip()
        figures = self._gather_figures(local_figures, advance)
        metrics: Metrics = {}
        error = None
        if figures:
            metrics = summarize(rollouts, figures, self.estimator, self.gradients.loss)
            metrics |= {"optim/lr": rate, "optim/grad_norm": norm}
            error = refusal(metrics, step, self.max_mismatch)
        if self.rank_group.broadcast_object(error is not None):
            self.optimizer.zero_grad()
            if error is not None:
                raise error
            return StepResult({}, [])
        with self.policy.lock:
            self.optimizer.step(rate)
            if self.policy.teacher_weights is Weights.EMA:
                self.policy.update_ema(self.config.orchestrator.teacher_model.ema_decay)
        tokens = sum(len(r.completion.token_ids) for r in rollouts)
        return StepResult(metrics | self._performance(tokens, began), figures)

    def _gather_figures(
        self, local_figures: dict[int, TokenFigures], advance: Advance
    ) -> list[TokenFigures]:
        """On the driver the figures of every rollout in order; an empty list elsewhere.

        The driver logs the other ranks' warnings as well.
        """
        share = local_figures, self.rank_group.drain_warnings()
        by_rollout: dict[int, TokenFigures] = {}
        for rank, (figures, warnings) in enumerate(self.rank_group.gather_object(share)):
            by_rollout |= figures
            if rank > 0:
                for warning in warnings:
                    logger.warning(f"rank {rank}: {warning}")
                advance(sum(len(f.loss) for f in figures.values()))
        return [by_rollout[i] for i in sorted(by_rollout)]

    def _performance(self, tokens: int, began: float) -> Metrics:
        """Time and memory of a step that began at `began`; empty but on the driver."""
        peaks = self.rank_group.gather_object(peak_gib(self.policy.device))
        if not peaks:
            return {}
        seconds = time.perf_counter() - began
        return {
            "time/train": seconds,
            "perf/train_tokens_per_second": tokens / seconds,
            "perf/peak_memory_gib/trainer": max(peaks),
        }

    def state(self) -> dict[str, Tensor]:
        """What training changes, as full tensors by name, for a checkpoint."""
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
            for part, target in (("policy/", self.policy), ("optimizer/", self.optimizer)):
                target.load_state(
                    (key.removeprefix(part), self.rank_group.broadcast(tensor, self.policy.device))
                    for key, tensor in state.items()
                    if key.startswith(part)
                )


@dataclass(frozen=True, slots=True)
class TrainStep:
    """Command: take part in a step."""

    rollouts: tuple[Rollout, ...]
    step: int

    def run(self, trainer: Trainer) -> None:
        trainer.step(self.rollouts, self.step, lambda count: None)


@dataclass(frozen=True, slots=True)
class GatherState:
    """Command: take part in gathering what a checkpoint holds."""

    def run(self, trainer: Trainer) -> None:
        trainer.state()


@dataclass(frozen=True, slots=True)
class LoadState:
    """Command: receive a checkpoint's tensors from the driver."""

    shapes: dict[str, Tensor]
    """Tensors without data."""

    def run(self, trainer: Trainer) -> None:
        trainer.load_state(self.shapes)
