"""The plan's memory estimate next to a measured step."""

from __future__ import annotations

import resource

import torch

from minidistill.placement.devices import OTHER_RANKS
from minidistill.placement.estimate import Plan
from minidistill.placement.machine import GIB

UNMEASURED = ("trainer: CUDA context", OTHER_RANKS)


def planned_and_measured(plan: Plan, device: torch.device) -> str:
    """A sentence about the trainer's planned and measured memory.

    Measured is torch's peak allocation on a GPU, and on a CPU the process's peak, which includes
    libraries.
    """
    phases = next(d.phases for d in plan.devices if d.id == device.index)
    parts = phases.get("training", {})
    trainer = {name: size for name, size in parts.items() if name.startswith("trainer: ")}
    total = sum(size for name, size in trainer.items() if name not in UNMEASURED)
    planned = f"memory: the trainer was planned at {total / GIB:.2f} GiB at most"
    if device.type == "cuda":
        measured = torch.cuda.max_memory_allocated(device) / GIB
        return f"{planned}, after a step its peak is {measured:.2f} GiB"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
    return f"{planned}; after a step this process's peak is {peak:.2f} GiB, libraries included"
