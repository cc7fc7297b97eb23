"""A rank of the trainer that fails in its second step, in the way that FAULT says."""

from __future__ import annotations

import os
import sys
from typing import Any

import minidistill_kernels
from minidistill.trainer.distributed import worker
from minidistill.trainer.trainer import Trainer

step, distill = Trainer._step, minidistill_kernels.linear_distill
current_step = 0


def counting(self: Any, rollouts: Any, number: int, *rest: Any) -> Any:
    global current_step
    current_step = number
    return step(self, rollouts, number, *rest)


def failing(*arguments: Any, **named: Any) -> Any:
    if current_step == 2:
        raise {
            "error": ValueError("no such layer"),
            "memory": MemoryError("the machine is full"),
        }[os.environ["FAULT"]]
    return distill(*arguments, **named)


Trainer._step = counting  # type: ignore[method-assign]
minidistill_kernels.linear_distill = failing
worker.main(sys.argv[1:])
