"""Which device and dtype a run uses, and what it cannot use."""

from __future__ import annotations

import torch

from minidistill.config import Config, LoadedConfig
from minidistill.errors import EXIT_ENVIRONMENT, EXIT_USAGE, UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GPU_LISTS = ("inference_gpu_ids", "teacher_gpu_ids", "trainer_gpu_ids")
ENGINE_KEYS = ("teacher_inference.", "inference.parallel.", "inference.gpu_memory_utilization")


def pick_device(loaded: LoadedConfig) -> torch.device:
    """The one device that holds trainer and teacher, and the embedded engine's student.

    Raises UserError for GPU ids that the machine does not have (exit code 3), and for settings of
    engines that the run does not have (exit code 2).
    """
    config = loaded.config
    asked = {id for name in GPU_LISTS for id in getattr(config, name) or ()}
    count = torch.cuda.device_count()
    missing = ", ".join(str(id) for id in sorted(asked) if id >= count)
    if missing:
        raise UserError(
            f"GPU {missing} is asked for, this machine has {count}",
            where=_given(loaded, GPU_LISTS),
            fix="leave the ids out to run on what is here"
            if count == 0
            else f"use 0 to {count - 1}",
            exit_code=EXIT_ENVIRONMENT,
        )
    apart = count > 0 and config.inference.engine != "embedded"  # vLLM has GPUs of its own
    shared = {id for name in GPU_LISTS[apart:] for id in getattr(config, name) or ()}
    if len(shared) > 1:
        who = "the teacher and the trainer" if apart else "the engine, the teacher and the trainer"
        raise UserError(
            f"GPUs {', '.join(map(str, sorted(shared)))} are asked for; {who} share one",
            where=_given(loaded, GPU_LISTS),
            fix="name one GPU",
            exit_code=EXIT_USAGE,
        )
    if given := _given(loaded, ENGINE_KEYS[:1] if apart else ENGINE_KEYS):
        raise UserError(
            "these settings are for engines that the run does not have: the teacher is scored in "
            "the trainer, and an engine on a CPU or in the trainer has no replicas",
            where=given,
            fix="leave these settings out",
            exit_code=EXIT_USAGE,
        )
    if count == 0:
        return torch.device("cpu")
    return torch.device("cuda", next(iter(shared), 0))


def _given(loaded: LoadedConfig, prefixes: tuple[str, ...]) -> str:
    """Where settings under these keys were written, "" if none was."""
    found = {
        f"{key} ({origin})"
        for key, origin in loaded.provenance.items()
        if origin != "default" and key.startswith(prefixes)
    }
    return "; ".join(sorted(found))


def pick_dtype(config: Config, device: torch.device) -> torch.dtype:
    """The base weights' dtype: as configured; `auto` is bf16 where a GPU has it, else fp32."""
    if config.model.dtype != "auto":
        return DTYPES[config.model.dtype]
    if device.type == "cuda" and torch.cuda.is_bf16_supported():
        return torch.bfloat16
    return torch.float32
