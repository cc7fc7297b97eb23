"""A step's metrics, from the objective's per-token figures.

Shapes: `_N` completion tokens of the whole step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from minidistill.estimators import Estimator, LossSettings
from minidistill.trainer.objective import concatenated
from minidistill.types import Metrics, Role, Rollout, TokenFigures
from minidistill_kernels import DistillOutput

NO_ADVANTAGE = 1e-8  # of equal rewards: their mean is rounded
POSITION_EDGES = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)


def summarize(
    rollouts: Sequence[Rollout],
    figures: Sequence[TokenFigures],
    estimator: Estimator,
    settings: LossSettings,
    sampler: Role,
) -> Metrics:
    """Means over the step's completion tokens, in float64, under the documented names.

    `figures` has those of each rollout, which the `sampler` sampled. If the teacher runs in the
    trainer, `teacher_kl` is the full KL, even with `sampled`. If an engine scored the teacher, it
    is an estimate (see `TokenFigures.kl`), and there is no `entropy/teacher`.
    """
    out = concatenated(figures)
    sizes = torch.tensor([len(f.logp) for f in figures])
    advantage_N = torch.tensor([r.advantage for r in rollouts]).double().repeat_interleave(sizes)
    policy, kl = estimator.split(out, advantage_N, settings)
    metrics: Metrics = {
        "teacher_kl": float(out.kl.mean()),
        "loss/total": float(out.loss.mean()),
        "loss/policy": policy,
        "loss/kl": kl,
        "entropy/student": float(out.entropy.mean()),
        "kl/p99": float(out.kl.quantile(0.99)) if out.kl.numel() < 1 << 24 else float(out.kl.max()),
        "kl/clipped_frac": float(out.kl_clipped.double().mean()),
    }
    if not estimator.imitates:
        terms_N = settings.teacher_tau * out.teacher_logp - settings.student_tau * out.logp
        combined_N = settings.adv_tau * advantage_N + terms_N
        metrics["combined_advantage"] = float(combined_N.mean())
        metrics |= _ratio(out)
    metrics |= _mismatch(out, rollouts, sampler)
    if out.teacher_entropy is not None:
        metrics["entropy/teacher"] = float(out.teacher_entropy.mean())
    if settings.adv_tau > 0:
        metrics |= _advantages(rollouts)
    return metrics | _by_position(out.kl, sizes) | _lengths(rollouts) | _rewards(rollouts)


def by_group(
    kind: str,
    groups: Sequence[str],
    rollouts: Sequence[Rollout],
    figures: Sequence[TokenFigures],
) -> Metrics:
    """Figures `KIND/GROUP/…` of each group; `groups` has that of each rollout."""
    metrics: Metrics = {}
    for group in sorted(set(groups)):
        rows = [i for i, other in enumerate(groups) if other == group]
        part = [rollouts[i] for i in rows]
        kl = torch.cat([figures[i].kl.double() for i in rows])
        own = {"rollouts": float(len(rows)), "teacher_kl": float(kl.mean())}
        own |= _lengths(part) | _rewards(part)
        metrics |= {f"{kind}/{group}/{name}": value for name, value in own.items()}
    return metrics


def _ratio(out: DistillOutput) -> Metrics:
    """π / μ: how many are truncated, and what share of the samples it is worth."""
    mass = float(out.ratio.mean())
    return {
        "ratio/clipped_frac": float(out.ratio_clipped.double().mean()),
        "ratio/ess": mass**2 / float((out.ratio**2).mean()),
    }


def _mismatch(out: DistillOutput, rollouts: Sequence[Rollout], sampler: Role) -> Metrics:
    """How far the sampler's log-probs are from the trainer's, of the same weights.

    For samples of the teacher also an estimate of KL(q‖π), and no mask. Their mismatch is unknown
    if an engine scored the teacher: its scores are the sampler's log-probs.
    """
    if sampler is Role.STUDENT:
        return {
            "kl/sampler_mismatch": float((out.ratio - 1 - out.ratio.log()).mean()),
            "ratio/masked_frac": float(out.masked.double().mean()),
        }
    sampled_N = torch.tensor([p for r in rollouts for p in r.completion.logprobs]).double()
    metrics = {"kl/forward": float((sampled_N - out.logp).mean())}
    if out.teacher_entropy is not None:
        log_ratio_N = out.teacher_logp - sampled_N
        mismatch = (log_ratio_N.exp() - 1 - log_ratio_N).mean()
        metrics["kl/sampler_mismatch"] = float(mismatch)
    return metrics


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
