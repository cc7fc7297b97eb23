"""A rank of the trainer that fails in its second step, in the way that FAULT says."""

from __future__ import annotations

import os
import sys
from typing import Any

from minidistill.trainer.distributed import worker as rank
from minidistill.trainer.gradients import Gradients

compute, objective = Gradients.compute, Gradients._objective
at = 0


def counting(self: Any, rollouts: Any, step: int, *rest: Any) -> Any:
    global at
    at = step
    return compute(self, rollouts, step, *rest)


def failing(self: Any, *arguments: Any) -> Any:
    if at == 2:
        raise {
            "error": ValueError("no such layer"),
            "memory": MemoryError("the machine is full"),
        }[os.environ["FAULT"]]
    return objective(self, *arguments)


Gradients.compute, Gradients._objective = counting, failing  # type: ignore[method-assign]
rank.main(sys.argv[1:])
