"""A trainer rank that fails in its second step. The variable FAULT selects the error."""

from __future__ import annotations

import os
import sys
from typing import Any

import minidistill_kernels
from minidistill.trainer.distributed import worker
from minidistill.trainer.trainer import Trainer

original_step, original_distill = Trainer.take_step, minidistill_kernels.linear_distill
current_step = 0


def counting_step(self: Any, command: Any, *rest: Any) -> Any:
    global current_step
    current_step = command.step
    return original_step(self, command, *rest)


def failing_distill(*args: Any, **kwargs: Any) -> Any:
    if current_step == 2:
        raise {
            "error": ValueError("no such layer"),
            "memory": MemoryError("the machine is full"),
        }[os.environ["FAULT"]]
    return original_distill(*args, **kwargs)


Trainer.take_step = counting_step  # type: ignore[method-assign]
minidistill_kernels.linear_distill = failing_distill
worker.main(sys.argv[1:])
