"""One optimizer step from a batch of rollouts: gradients, health, AdamW, a moving average."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minidistill.config import Config
from minidistill.estimators import Estimator
from minidistill.trainer.distributed.fsdp import is_divided, whole
from minidistill.trainer.forward import PrefixCache
from minidistill.trainer.gradients import Gradients
from minidistill.trainer.guards import mismatch_limit, refusal
from minidistill.trainer.metrics import summarize
from minidistill.trainer.objective import Figures
from minidistill.trainer.optim import Optimizer, learning_rate
from minidistill.trainer.policy import Policy, Weights
from minidistill.types import Advance, Metrics, Rollout, TokenStats


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
        self.policy, self.config, self.world = policy, config, policy.world
        self.estimator, self.warn = estimator, warn
        self.gradients = Gradients(policy, config, prefixes, estimator, warn)
        self.optimizer = Optimizer(policy, config)
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
        figures = self.gradients.compute(rollouts, step, advance)
        self.world.sum_gradients([p for _, p in self.optimizer.named if not is_divided(p)])
        rate = learning_rate(self.config, step)
        norm = self.optimizer.clip()
        outputs = self._all_figures(figures, advance)
        metrics: Metrics = {}
        refused = None
        if outputs:
            metrics = summarize(rollouts, outputs, self.estimator, self.gradients.loss)
            metrics |= {"optim/lr": rate, "optim/grad_norm": norm}
            refused = refusal(metrics, step, self.max_mismatch)
        if self.world.tell(refused is not None):
            self.optimizer.zero_grad()
            if refused is not None:
                raise refused
            return StepResult({}, [])
        with self.policy.lock:
            self.optimizer.step(rate)
            if self.policy.teacher_weights is Weights.EMA:
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
            for part, target in (("policy/", self.policy), ("optimizer/", self.optimizer)):
                target.load_state(
                    (key.removeprefix(part), self.world.spread(tensor, self.policy.device))
                    for key, tensor in state.items()
                    if key.startswith(part)
                )


def _silent(count: int) -> None:
    """Progress of ranks that nobody looks at."""
