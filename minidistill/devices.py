"""Which device and dtype a run uses, and what it cannot use."""

from __future__ import annotations

import os

import torch

from minidistill.config import Config, LoadedConfig
from minidistill.errors import EXIT_ENVIRONMENT, EXIT_USAGE, UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GPU_LISTS = ("inference_gpu_ids", "teacher_gpu_ids", "trainer_gpu_ids")
ENGINE_KEYS = ("teacher_inference.", "inference.parallel.", "inference.gpu_memory_utilization")


def rank_devices(loaded: LoadedConfig) -> list[torch.device]:
    """The device of each of the trainer's ranks on this machine, the driver's first. Each holds
    trainer and teacher, the first the embedded engine's student as well.

    Raises UserError for GPU ids that the machine does not have (exit code 3), for settings of
    engines that the run does not have, and for ranks that cannot be (exit code 2).
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
    if len(shared) > 1 and shared != set(config.trainer_gpu_ids or ()):
        who = "the teacher and the trainer" if apart else "the engine, the teacher and the trainer"
        raise UserError(
            f"GPUs {', '.join(map(str, sorted(shared)))} are asked for; {who} share one",
            where=_given(loaded, GPU_LISTS),
            fix="name one GPU, or the same ones in each list",
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
        return [torch.device("cpu")] * _ranks(loaded, [])
    ids = config.trainer_gpu_ids or sorted(shared) or [*range(_started("LOCAL_WORLD_SIZE"))]
    return [torch.device("cuda", id) for id in ids][: _ranks(loaded, ids)]


def _started(name: str) -> int:
    """Processes that torchrun started, as it says in the environment; 1 without it."""
    return int(os.environ.get(name) or 1)


def _ranks(loaded: LoadedConfig, ids: list[int]) -> int:
    """The number of ranks on GPUs `ids`, or on the CPU. Raises UserError where it cannot be."""
    config, asked = loaded.config, loaded.config.trainer.world_size
    everywhere, here = _started("WORLD_SIZE"), _started("LOCAL_WORLD_SIZE")
    count = everywhere if everywhere > 1 else len(ids) or asked or 1
    who = f"torchrun starts {everywhere} processes" if everywhere > 1 else f"{len(ids)} GPUs train"
    if asked not in (None, count):
        raise UserError(
            f"trainer.world_size = {asked}, but {who}",
            where=_given(loaded, ("trainer.world_size", "trainer_gpu_ids")),
            fix="leave trainer.world_size out, or name as many GPUs in trainer_gpu_ids",
        )
    if everywhere > 1 and ids and len(ids) != here:
        raise UserError(
            f"torchrun starts {here} processes on this machine, and {len(ids)} GPUs train",
            where=_given(loaded, GPU_LISTS),
            fix=f"start one for each GPU: --nproc-per-node {len(ids)}",
        )
    if config.orchestrator.batch_size % count:
        raise UserError(
            f"the trainer's {count} ranks do not divide orchestrator.batch_size = "
            f"{config.orchestrator.batch_size}",
            where="trainer.world_size, orchestrator.batch_size",
            fix=f"take fewer ranks, or a batch_size that {count} divides",
        )
    return count


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
