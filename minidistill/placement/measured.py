"""The plan's estimate beside what a step really took."""

from __future__ import annotations

import resource

import torch

from minidistill.placement.estimate import OTHER_RANKS, Plan
from minidistill.placement.machine import GIB

NOT_HERE = ("trainer: CUDA context", OTHER_RANKS)


def planned_and_measured(plan: Plan, device: torch.device) -> str:
    """A line for people. On a GPU what torch allocated there at most; on a CPU the process's peak,
    which counts libraries too."""
    phases = next(d.phases for d in plan.devices if d.id == device.index)
    parts = phases.get("training", {})
    own = (v for k, v in parts.items() if k.startswith("trainer: ") and k not in NOT_HERE)
    planned = f"memory: the trainer was planned at {sum(own) / GIB:.2f} GiB at most"
    if device.type == "cuda":
        measured = torch.cuda.max_memory_allocated(device) / GIB
        return f"{planned}, after a step its peak is {measured:.2f} GiB"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
    return f"{planned}; after a step this process's peak is {peak:.2f} GiB, libraries included"
