"""A process that makes temporary files and shared memory, says so, and waits to be killed.

`python -m support.dying` holds a scratch folder. As an engine's process (`main`) it answers that it
has started.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

from minidistill.system.scratch import ScratchFolder

KEPT: list[SharedMemory] = []


def leave(name: str | None = None) -> str:
    """Make a segment of shared memory, which stays. Returns its name."""
    memory = SharedMemory(name=name, create=True, size=4096)
    resource_tracker.unregister(f"/{memory.name}", "shared_memory")
    KEPT.append(memory)
    return memory.name


if __name__ == "__main__" and len(sys.argv) == 1:
    folder = ScratchFolder()
    name = leave()
    leave(f"other_{os.getpid()}")
    semaphore = multiprocessing.get_context("spawn").Semaphore()
    semaphore_name = semaphore._semlock.name  # type: ignore[attr-defined]
    resource_tracker.unregister(semaphore_name, "semaphore")
    folder.remember_segments(os.getpgrp())
    print(folder.path, name, f"sem.{semaphore_name[1:]}", flush=True)
    time.sleep(600)
elif __name__ == "__main__":
    calls = Connection(int(sys.argv[1]))
    calls.recv()
    Path(tempfile.mkdtemp(), "file").write_text("left")
    calls.send(("done", leave()))
    calls.recv()
