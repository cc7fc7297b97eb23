"""A rank of the trainer that fails in its second step, in the way that FAULT says."""

from __future__ import annotations

import os
import sys
from typing import Any

from minidistill.trainer import rank
from minidistill.trainer.trainer import Trainer

real = Trainer._accumulate


def failing(self: Any, rollouts: Any, step: int, *rest: Any) -> Any:
    if step == 2:
        raise {
            "error": ValueError("no such layer"),
            "memory": MemoryError("the machine is full"),
        }[os.environ["FAULT"]]
    return real(self, rollouts, step, *rest)


Trainer._accumulate = failing  # type: ignore[method-assign]
rank.main(sys.argv[1:])
