"""The machine that a run is placed on."""

from __future__ import annotations

import os
from collections.abc import Iterable
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
    bitsandbytes: bool = False
    """Whether the package bitsandbytes is installed."""
    torchvision: bool = True
    """Whether the package torchvision is installed."""
    each: tuple[int, ...] = ()
    """Bytes of each GPU, if they differ."""
    card: str = ""
    """The name of the GPUs; empty if it is not known."""

    def smallest(self, gpus: Iterable[int]) -> int:
        """Bytes of the smallest of these GPUs, or of the CPU's memory if there are none.

        A run is planned for GPUs of one size, so a smaller one among those that it uses counts.
        """
        return min((self.each[gpu] for gpu in gpus if gpu < len(self.each)), default=self.bytes)

    @property
    def device_type(self) -> str:
        return "cuda" if self.gpus else "cpu"

    @classmethod
    def local(cls) -> Machine:
        """This machine. The same in every process of a run."""
        import torch

        gpus = torch.cuda.device_count()
        ranks, local_ranks = _torchrun()
        each = _gpu_bytes()
        return cls(
            gpus=gpus,
            bytes=max(each) if each else _cpu_bytes(),
            vllm=gpus > 0 and vllm_version.is_supported(vllm_version.installed()),
            bf16=gpus > 0 and torch.cuda.is_bf16_supported(),
            torchrun_ranks=ranks,
            torchrun_local_ranks=local_ranks,
            each=each,
            card=str(getattr(torch.cuda.get_device_properties(0), "name", "")) if gpus else "",
            flash_attn=_is_installed("flash-attn"),
            bitsandbytes=_is_installed("bitsandbytes"),
            torchvision=_is_installed("torchvision"),
        )

    @classmethod
    def imagined(cls, gpus: int | None, bytes: int | None) -> Machine:
        """A machine to plan for. None takes this machine's number.

        GPUs come with vLLM, bfloat16, flash-attn and bitsandbytes.
        """
        import torch

        if gpus is None and bytes is None:
            return cls.local()
        local_gpus = torch.cuda.device_count()
        gpus = local_gpus if gpus is None else gpus
        if bytes is None:
            bytes = min(_gpu_bytes(), default=GPU_BYTES) if gpus else _cpu_bytes()
        ranks, local_ranks = _torchrun()
        return cls(
            gpus=gpus,
            bytes=bytes,
            vllm=gpus > 0,
            bf16=gpus > 0,
            torchrun_ranks=ranks,
            torchrun_local_ranks=local_ranks,
            flash_attn=gpus > 0,
            bitsandbytes=gpus > 0,
        )


def _torchrun() -> tuple[int, int]:
    """Processes that torchrun started on all machines, and on this one."""
    return int(os.environ.get("WORLD_SIZE") or 1), int(os.environ.get("LOCAL_WORLD_SIZE") or 1)


def _is_installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def _gpu_bytes() -> tuple[int, ...]:
    """The total memory of each of this machine's GPUs."""
    import torch

    count = torch.cuda.device_count()
    return tuple(torch.cuda.get_device_properties(i).total_memory for i in range(count))


def _cpu_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
