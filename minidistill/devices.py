"""Devices and dtypes of a run, and the settings that it has no use for."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from minidistill.config import Config, LoadedConfig
from minidistill.errors import EXIT_USAGE, UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def count_gpus() -> int:
    """GPUs that this process may use."""
    return torch.cuda.device_count()


def trainer_device(trainer: Sequence[int]) -> torch.device:
    """Where the trainer's first rank works, and with it the embedded engine."""
    return torch.device("cuda", trainer[0]) if trainer else torch.device("cpu")


def check_settings(loaded: LoadedConfig, *, vllm: bool, gpus: int, own_teacher: bool) -> None:
    """Raise UserError for settings of engines that the run does not have: none is ignored."""
    why = "the run samples with the embedded engine, which is the trainer's own model"
    given = "" if vllm else _given(loaded, (*_engine("inference"), *_engine("teacher_inference")))
    if not given and not own_teacher:
        why = "the teacher has no engine of its own"
        given = _given(loaded, _engine("teacher_inference"))
    if not given and gpus == 0:
        why = "there is no GPU"
        given = _given(loaded, tuple(_engine(t)[1] for t in ("inference", "teacher_inference")))
    if given:
        raise UserError(
            f"these settings are for engines that the run does not have: {why}",
            where=given,
            fix="leave these settings out",
            exit_code=EXIT_USAGE,
        )


def _engine(table: str) -> tuple[str, str]:
    return f"{table}.parallel.", f"{table}.gpu_memory_utilization"


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
