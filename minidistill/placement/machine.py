"""The machine that a run is placed on."""

from __future__ import annotations

import os
from dataclasses import dataclass

from minidistill.placement import vllm_version

GIB = 1 << 30
GPU_BYTES = 80 * GIB  # of a GPU that is not here to be asked


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

    @property
    def device_type(self) -> str:
        return "cuda" if self.gpus else "cpu"

    @classmethod
    def local(cls) -> Machine:
        """This machine. The same in every process of a run."""
        import torch

        gpus = torch.cuda.device_count()
        return cls(
            gpus=gpus,
            bytes=_local_bytes(gpus),
            vllm=gpus > 0 and vllm_version.is_supported(vllm_version.installed()),
            bf16=gpus > 0 and torch.cuda.is_bf16_supported(),
            torchrun_ranks=int(os.environ.get("WORLD_SIZE") or 1),
            torchrun_local_ranks=int(os.environ.get("LOCAL_WORLD_SIZE") or 1),
        )

    @classmethod
    def imagined(cls, gpus: int | None, bytes: int | None) -> Machine:
        """A machine to plan for, with vLLM and bfloat16 on its GPUs. None is what is here."""
        import torch

        here = torch.cuda.device_count()
        count = here if gpus is None else gpus
        if bytes is None:
            bytes = _local_bytes(min(count, here)) if here or not count else GPU_BYTES
        local = cls.local()
        return cls(
            gpus=count,
            bytes=bytes,
            vllm=count > 0,
            bf16=count > 0,
            torchrun_ranks=local.torchrun_ranks,
            torchrun_local_ranks=local.torchrun_local_ranks,
        )


def _local_bytes(gpus: int) -> int:
    """The smallest GPU's memory, or the CPU's."""
    import torch

    if not gpus:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(
        torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())
    )
