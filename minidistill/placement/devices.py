"""Devices and dtypes of a run, and the settings that it has no use for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from minidistill.config import Config, LoadedConfig
from minidistill.errors import EXIT_USAGE, UserError
from minidistill.placement.gpus import check_ranks

if TYPE_CHECKING:
    from minidistill.placement.planner import Plan

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def rank_devices(loaded: LoadedConfig, trainer: Sequence[int]) -> list[torch.device]:
    """The device of each of the trainer's ranks on this machine, the driver's first. Each holds
    trainer and teacher, the first the embedded engine's student as well.

    `trainer` are its GPUs, none on a CPU. Raises UserError for ranks that cannot be.
    """
    if not trainer:
        return [torch.device("cpu")] * _ranks(loaded, [])
    return [torch.device("cuda", id) for id in trainer][: _ranks(loaded, trainer)]


def check_settings(loaded: LoadedConfig, plan: Plan) -> None:
    """Raise UserError for settings of engines that the run does not have: none is ignored."""
    why = "the run samples with the embedded engine, which is the trainer's own model"
    tables = "inference", "teacher_inference"
    given = "" if plan.vllm else _given(loaded, sum(map(_engine, tables), ()))
    if not given and not plan.partition.own_teacher(plan.teaching):
        why = "the teacher has no engine of its own"
        given = _given(loaded, _engine("teacher_inference"))
    if not given and not plan.partition.trainer:
        why = "there is no GPU"
        given = _given(loaded, tuple(_engine(table)[1] for table in tables))
    if given:
        raise UserError(
            f"these settings are for engines that the run does not have: {why}",
            where=given,
            fix="leave these settings out",
            exit_code=EXIT_USAGE,
        )


def _engine(table: str) -> tuple[str, str]:
    return f"{table}.parallel.", f"{table}.gpu_memory_utilization"


def _started(name: str) -> int:
    """Processes that torchrun started, as it says in the environment; 1 without it."""
    return int(os.environ.get(name) or 1)


def _ranks(loaded: LoadedConfig, ids: Sequence[int]) -> int:
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
            where=_given(loaded, ("trainer_gpu_ids",)),
            fix=f"start one for each GPU: --nproc-per-node {len(ids)}",
        )
    check_ranks(config, count, "ranks", "trainer.world_size")
    return count


def shards_weights(config: Config, ranks: int) -> bool:
    """Whether the trainer's ranks shard the weights instead of holding all of them on each."""
    shard = config.trainer.shard
    return ranks > 1 and (config.trainer.model.lora is False if shard == "auto" else shard)


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
