"""A trainer rank that stops itself, as with SIGSTOP.

The variable STOP names where: `start`, `load`, or `step`, which is its second one.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from minidistill.trainer.distributed import worker
from minidistill.trainer.trainer import Trainer

original_step, original_load = Trainer.take_step, worker.load_policy


def stop_at(point: str) -> None:
    if os.environ["STOP"] == point:
        print(f"stopping at {point}", flush=True)
        os.kill(os.getpid(), signal.SIGSTOP)


def stopping_step(self: Any, command: Any, *rest: Any) -> Any:
    if command.step == 2:
        stop_at("step")
    return original_step(self, command, *rest)


def stopping_load(*args: Any, **options: Any) -> Any:
    stop_at("load")
    return original_load(*args, **options)


Trainer.take_step = stopping_step  # type: ignore[method-assign]
worker.load_policy = stopping_load
stop_at("start")
worker.main(sys.argv[1:])
