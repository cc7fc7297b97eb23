"""A process that makes temporary files and shared memory, says so, and waits to be killed.

`python -m support.dying` holds a scratch folder. As an engine's process (`main`) it answers that it
has started.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

from minidistill.scratch import ScratchFolder


def leave() -> str:
    """Make a segment of shared memory and a temporary file. Returns the segment's name."""
    memory = SharedMemory(create=True, size=4096)
    resource_tracker.unregister(memory._name, "shared_memory")  # type: ignore[attr-defined]
    KEPT.append(memory)
    Path(tempfile.mkdtemp(), "file").write_text("left")
    return memory.name


KEPT: list[object] = []

if __name__ == "__main__" and len(sys.argv) == 1:
    folder = ScratchFolder()
    name = leave()
    folder.remember_segments(os.getpgrp())
    print(folder.path, name, flush=True)
    time.sleep(600)
elif __name__ == "__main__":
    calls = Connection(int(sys.argv[1]))
    calls.recv()
    calls.send(("done", leave()))
    calls.recv()
