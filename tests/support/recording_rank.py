"""A trainer rank that records when it frees its cached memory, in the file RECORD.

It takes its time first, so that a driver that does not wait for it is noticed.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from minidistill.trainer.distributed import worker
from minidistill.trainer.policy import FreeCachedMemory, Policy


def record(event: str) -> None:
    with Path(os.environ["RECORD"]).open("a") as file:
        file.write(f"{event}\n")


def recorded(self: FreeCachedMemory, trainer: Any) -> None:
    policy: Policy = trainer.policy
    time.sleep(0.3)
    record(f"rank {policy.rank_group.rank} frees its cache")
    policy.free_cached_memory()


if __name__ == "__main__":
    FreeCachedMemory.run = recorded  # type: ignore[method-assign]
    worker.main(sys.argv[1:])
