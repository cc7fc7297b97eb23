"""Runs in one process, one after the other, each stopped at a random moment.

    python -m tools.soak.repeated FOLDER COUNT SEED

Prints a line for each run, and one that begins with LEAK if open files or threads add up. What the
first runs open is not counted: libraries keep some files open.
"""

from __future__ import annotations

import contextlib
import gc
import io
import os
import shutil
import signal
import sys
import threading
from pathlib import Path
from random import Random

from minidistill import cli
from tools.soak.commands import SMALL, run_arguments

WARM = 3  # runs whose open files and threads are the measure of the rest


def main() -> int:
    folder, count, seed = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    random = Random(f"{seed}/repeated")
    before: tuple[set[str], int] | None = None
    for index in range(count):
        path = folder / str(index)
        seconds = 0.0 if index < 2 else random.uniform(0.1, 2.0)
        code = _run(path, seconds)
        gc.collect()
        files, threads = _open_files(), threading.active_count()
        print(f"run {index}: exit code {code}, {len(files)} open files, {threads} threads")
        if before is not None:
            if len(files) > len(before[0]):
                print(f"LEAK  run {index} of one process: {sorted(files - before[0])[:5]}")
            if threads > before[1]:
                print(f"LEAK  run {index} of one process: {threads - before[1]} threads")
        if index >= WARM - 1 or before is not None:
            before = files, threads
        shutil.rmtree(path, ignore_errors=True)
    return 0


def _run(path: Path, seconds: float) -> int:
    """Run, and press Ctrl-C after some seconds; 0 lets it end."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return cli.main(run_arguments(path, SMALL, resume=False))
    except KeyboardInterrupt:
        return 130
    finally:
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        signal.setitimer(signal.ITIMER_REAL, 0.0)


def _open_files() -> set[str]:
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found.add(f"{entry.name} → {os.readlink(entry)}")
    return found


if __name__ == "__main__":
    sys.exit(main())
