"""Checks of a step before it is applied, and of errors for OOM."""

from __future__ import annotations

import math

import torch

from minidistill.config import Config
from minidistill.errors import EXIT_HEALTH, UserError
from minidistill.types import Metrics

# Highest `kl/sampler_mismatch` that rounding explains: about 100 and 20 times vLLM's
MISMATCH = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-2}


def mismatch_limit(config: Config, dtype: torch.dtype) -> float:
    """The highest `kl/sampler_mismatch` that a step may have; infinite for no limit.

    `auto` is no limit with dropout, or with rollouts one update old, which explain any mismatch.
    """
    limit, lora = config.trainer.loss.max_sampler_mismatch, config.trainer.model.lora
    if isinstance(limit, float):
        return limit
    explained = (lora and lora.dropout > 0) or config.schedule == "async"
    return math.inf if limit == "off" or explained else MISMATCH[dtype]


def refusal(metrics: Metrics, step: int, max_mismatch: float) -> UserError | None:
    """The error (exit code 4) if the step must not be applied, else None."""
    total, norm = metrics["loss/total"], metrics["optim/grad_norm"]
    if not (math.isfinite(norm) and math.isfinite(total)):
        return UserError(
            f"step {step}: the loss is {total}, its gradient's norm {norm}",
            where="training",
            fix='lower trainer.optim.lr, or use model.dtype = "float32"; '
            "--resume continues from the last checkpoint",
            exit_code=EXIT_HEALTH,
        )
    if metrics["kl/sampler_mismatch"] > max_mismatch:
        return UserError(
            f"step {step}: kl/sampler_mismatch is {metrics['kl/sampler_mismatch']:.3g}, above "
            f"{max_mismatch:g}: the sampler's model is not the one that is trained",
            where="trainer.loss.max_sampler_mismatch",
            fix="the engine runs stale weights, or computes them differently: try "
            'inference.engine = "embedded", or raise the limit if the numerics explain it',
            exit_code=EXIT_HEALTH,
        )
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed. On a CPU only torch's message says so."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return "DefaultCPUAllocator" in str(error) or "not enough memory" in str(error)
