"""The machine that a run is placed on."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib import metadata

from minidistill.placement import vllm_version

GIB = 1 << 30
GPU_BYTES = 80 * GIB  # of an imagined GPU, unless it is said


@dataclass(frozen=True, slots=True)
class Machine:
    """What a run may use, and what `auto` settings mean there."""

    gpus: int
    bytes: int
    """Of each GPU, or of the CPU's memory if there are none."""
    vllm: bool
    """Whether `inference.engine = "auto"` is vLLM."""
    bf16: bool
    """Whether `model.dtype = "auto"` is bfloat16."""
    torchrun_ranks: int = 1
    """Processes that torchrun started on all machines; 1 without it."""
    torchrun_local_ranks: int = 1
    """Those of them on this machine."""
    flash_attn: bool = False
    """Whether the package flash-attn is installed."""

    @property
    def device_type(self) -> str:
        return "cuda" if self.gpus else "cpu"

    @classmethod
    def local(cls) -> Machine:
        """This machine. The same in every process of a run."""
        import torch

        gpus = torch.cuda.device_count()
        ranks, local_ranks = _torchrun()
        return cls(
            gpus=gpus,
            bytes=_local_bytes(gpus),
            vllm=gpus > 0 and vllm_version.is_supported(vllm_version.installed()),
            bf16=gpus > 0 and torch.cuda.is_bf16_supported(),
            torchrun_ranks=ranks,
            torchrun_local_ranks=local_ranks,
            flash_attn=_has_flash_attn(),
        )

    @classmethod
    def imagined(cls, gpus: int | None, bytes: int | None) -> Machine:
        """A machine to plan for. None takes this machine's number.

        GPUs come with vLLM, bfloat16 and flash-attn.
        """
        import torch

        local_gpus = torch.cuda.device_count()
        gpus = local_gpus if gpus is None else gpus
        if bytes is None:
            bytes = GPU_BYTES if gpus and not local_gpus else _local_bytes(gpus)
        ranks, local_ranks = _torchrun()
        return cls(
            gpus=gpus,
            bytes=bytes,
            vllm=gpus > 0,
            bf16=gpus > 0,
            torchrun_ranks=ranks,
            torchrun_local_ranks=local_ranks,
            flash_attn=gpus > 0,
        )


def _torchrun() -> tuple[int, int]:
    """Processes that torchrun started on all machines, and on this one."""
    return int(os.environ.get("WORLD_SIZE") or 1), int(os.environ.get("LOCAL_WORLD_SIZE") or 1)


def _has_flash_attn() -> bool:
    try:
        metadata.version("flash-attn")
    except metadata.PackageNotFoundError:
        return False
    return True


def _local_bytes(gpus: int) -> int:
    """The memory of this machine's smallest GPU, or the CPU's if `gpus` is 0."""
    import torch

    if not gpus:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(
        torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())
    )
