"""A step's metrics, from the objective's per-token figures.

Shapes: `_N` completion tokens of the whole step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from minidistill.estimators import Estimator, LossSettings
from minidistill.trainer.objective import concatenated
from minidistill.types import Metrics, Rollout, TokenFigures

NO_ADVANTAGE = 1e-8  # of equal rewards: their mean is rounded
POSITION_EDGES = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)


def summarize(
    rollouts: Sequence[Rollout],
    figures: Sequence[TokenFigures],
    estimator: Estimator,
    settings: LossSettings,
) -> Metrics:
    """Means over the step's completion tokens, in float64, under the documented names.

    `figures` has those of each rollout. If the teacher runs in the trainer, `teacher_kl` is the
    full KL, even with `sampled`. If an engine scored the teacher, it is the mean of
    log π(y) - log q(y), and there is no `entropy/teacher`.
    """
    out = concatenated(figures)
    sizes = torch.tensor([len(f.logp) for f in figures])
    advantage_N = torch.tensor([r.advantage for r in rollouts]).double().repeat_interleave(sizes)
    terms_N = settings.teacher_tau * out.teacher_logp - settings.student_tau * out.logp
    policy, kl = estimator.split(out, advantage_N, settings)
    mass = float(out.ratio.mean())
    metrics: Metrics = {
        "teacher_kl": float(out.kl.mean()),
        "combined_advantage": float((settings.adv_tau * advantage_N + terms_N).mean()),
        "loss/total": float(out.loss.mean()),
        "loss/policy": policy,
        "loss/kl": kl,
        "entropy/student": float(out.entropy.mean()),
        "kl/sampler_mismatch": float((out.ratio - 1 - out.ratio.log()).mean()),
        "kl/p99": float(out.kl.quantile(0.99)) if out.kl.numel() < 1 << 24 else float(out.kl.max()),
        "kl/clipped_frac": float(out.kl_clipped.double().mean()),
        "ratio/clipped_frac": float(out.ratio_clipped.double().mean()),
        "ratio/masked_frac": float(out.masked.double().mean()),
        "ratio/ess": mass**2 / float((out.ratio**2).mean()),
    }
    if out.teacher_entropy is not None:
        metrics["entropy/teacher"] = float(out.teacher_entropy.mean())
    if settings.adv_tau > 0:
        metrics |= _advantages(rollouts)
    return metrics | _by_position(out.kl, sizes) | _lengths(rollouts) | _rewards(rollouts)


def _by_position(kl_N: Tensor, sizes: Tensor) -> Metrics:
    """Mean KL by position in the completion."""
    position_N = torch.cat([torch.arange(size) for size in sizes.tolist()])
    edges = torch.tensor(POSITION_EDGES)
    bucket_N = torch.bucketize(position_N, edges, right=True) - 1
    metrics = {}
    for bucket in bucket_N.unique().tolist():
        low = POSITION_EDGES[bucket]
        high = POSITION_EDGES[bucket + 1] - 1 if bucket + 1 < len(POSITION_EDGES) else None
        name = f"{low}" if high == low else f"{low}-{high if high is not None else ''}"
        metrics[f"kl/by_position/{name}"] = float(kl_N[bucket_N == bucket].mean())
    return metrics


def _lengths(rollouts: Sequence[Rollout]) -> Metrics:
    count = len(rollouts)
    return {
        "completions/length_mean": sum(len(r.completion.token_ids) for r in rollouts) / count,
        "completions/truncated_frac": sum(r.completion.truncated for r in rollouts) / count,
    }


def _advantages(rollouts: Sequence[Rollout]) -> Metrics:
    """The share of rollouts with nothing to learn from in their reward; empty without rewards."""
    if all(r.reward is None for r in rollouts):
        return {}
    zeros = sum(abs(r.advantage) <= NO_ADVANTAGE for r in rollouts)
    return {"advantage/zero_frac": zeros / len(rollouts)}


def _rewards(rollouts: Sequence[Rollout]) -> Metrics:
    """Means of the reward and of its metrics; empty if rewards are not computed."""
    rewards = [r.reward for r in rollouts if r.reward is not None and r.part == 0]
    if not rewards:
        return {}
    metrics = {"reward/mean": sum(r.value for r in rewards) / len(rewards)}
    for name in sorted({name for r in rewards for name in r.metrics}):
        values = [r.metrics[name] for r in rewards if name in r.metrics]
        metrics[f"reward/{name}"] = sum(values) / len(values)
    return metrics
