"""What a step costs in memory, and how much of its passes is padding."""

from __future__ import annotations

import resource
import sys

import torch

from minidistill.placement.machine import GIB
from minidistill.trainer.batching import Tokens
from minidistill.trainer.distributed.rank_group import RankGroup
from minidistill.types import Metrics


class StepCost:
    """The cost of the current step on one rank."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._positions = self._padding = 0

    def start(self) -> None:
        """Start measuring a step. On a CPU the peak memory is the process's and is not reset."""
        self._positions = self._padding = 0
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def count(self, tokens: Tokens) -> None:
        """Count a pass."""
        self._positions += tokens.ids_BL.numel()
        if tokens.mask_BL is not None:
            length = tokens.ids_BL.shape[1]
            self._padding += int((tokens.mask_BL[:, -length:] == 0).sum())

    def metrics(self, rank_group: RankGroup) -> Metrics:
        """The highest peak of any rank, and the share of padding on all; empty on other ranks."""
        own = peak_gib(self.device), self._positions, self._padding
        ranks = rank_group.gather_object(own)
        if not ranks:
            return {}
        return {
            "perf/peak_memory_gib/trainer": max(peak for peak, _, _ in ranks),
            "perf/padding_frac": sum(n for *_, n in ranks) / max(1, sum(n for _, n, _ in ranks)),
        }


def peak_gib(device: torch.device) -> float:
    """Peak memory: allocated by torch on a GPU, resident in the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    unit = 1 if sys.platform == "darwin" else 1024  # of `ru_maxrss`, in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
