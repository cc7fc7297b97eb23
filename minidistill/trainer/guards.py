"""Checks of a step before it is applied, and of errors for OOM."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch

from minidistill.config import Config
from minidistill.errors import EXIT_ENVIRONMENT, EXIT_HEALTH, UserError
from minidistill.types import Metrics

# Highest `kl/sampler_mismatch` that rounding explains: about 100 and 20 times vLLM's
MISMATCH = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-2}

# In lower case: CUDA and NCCL, CUDA's allocator, cuBLAS, cuDNN, torch on a CPU, C++, the kernel
_OUT_OF_MEMORY = (
    "out of memory",
    "cudaerrormemoryallocation",
    "failed to cuda calloc",
    "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed",
    "device_allocation_failed",
    "defaultcpuallocator",
    "not enough memory",
    "std::bad_alloc",
    "cannot allocate memory",
)


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
    """The error (exit code 4) if the step must not be applied, else None. NaN is never fine."""

    def error(what: str, where: str, fix: str) -> UserError:
        return UserError(f"step {step}: {what}", where=where, fix=fix, exit_code=EXIT_HEALTH)

    total, norm = metrics["loss/total"], metrics["optim/grad_norm"]
    lower_rate = (
        'lower trainer.optim.lr, or use model.dtype = "float32"; '
        "--resume continues from the last checkpoint"
    )
    if not (math.isfinite(norm) and math.isfinite(total)):
        return error(f"the loss is {total}, its gradient's norm {norm}", "training", lower_rate)
    for name in ("teacher_kl", "entropy/student"):
        if not math.isfinite(metrics[name]):
            return error(f"{name} is {metrics[name]}", "training", lower_rate)
    # absent if the teacher samples in an engine that also scores: there is nothing to compare
    mismatch = metrics.get("kl/sampler_mismatch", 0.0)
    if not mismatch <= max_mismatch:
        return error(
            f"kl/sampler_mismatch is {mismatch:.3g}, above "
            f"{max_mismatch:g}: the sampler's model is not the trainer's",
            "trainer.loss.max_sampler_mismatch",
            "the engine runs stale weights, or computes them differently: try "
            'inference.engine = "embedded", or raise the limit if the numerics explain it',
        )
    if not metrics.get("ratio/masked_frac", 0.0) < 1:
        return error(
            "every token was masked, so there is nothing to train on: each one's ratio of trainer "
            "and sampler probability is out of bounds",
            "trainer.loss.token_mask_low, trainer.loss.token_mask_high",
            "the engine runs stale weights, or computes them differently: try "
            'inference.engine = "embedded", or wider bounds if the numerics explain it',
        )
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed. Except for torch's on a GPU, only the message says so."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return not isinstance(error, UserError) and says_out_of_memory(str(error))


def says_out_of_memory(message: str) -> bool:
    """Whether an error's message says that an allocation failed."""
    message = message.lower()
    # cuBLAS needs a workspace for a handle, and reports its lack as a failed initialization
    no_handle = "cublas_status_not_initialized" in message and "cublascreate" in message
    # all that oneDNN says if it has no memory for a product's code
    no_code = message.partition("\n")[0].strip() == "could not create a primitive"
    return no_handle or no_code or any(phrase in message for phrase in _OUT_OF_MEMORY)


def first_line(error: BaseException | str) -> str:
    """The first line of an error's message."""
    return str(error).strip().partition("\n")[0] or "out of memory"


@contextlib.contextmanager
def explain_out_of_memory(doing: str, *, where: str, fix: str) -> Iterator[None]:
    """Raise OOM as a UserError (exit code 3). Also a decorator. See `out_of_memory_error`."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory_error(doing, first_line(error), where=where, fix=fix) from error


def out_of_memory_error(doing: str, message: str, *, where: str, fix: str) -> UserError:
    """The error (exit code 3) of a run that ends because memory ran out.

    `doing` says what needed the memory, after "while"; `message` is the allocator's.
    """
    return UserError(
        f"out of memory while {doing}: {message}",
        where=where,
        fix=f"{fix}. `minidistill plan` shows what needs memory",
        exit_code=EXIT_ENVIRONMENT,
    )
