"""A command under a limit of this process's memory, in place of a small GPU.

    python -m support.simulated_card PLACE MIB run config.toml …

While PLACE runs ("step", "held-out KL") the process may allocate MIB beyond what it holds.
"""

from __future__ import annotations

import contextlib
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from minidistill import cli
from minidistill.evaluation import kl
from minidistill.trainer.trainer import Trainer

# Of the subprocess: what is freed returns to the limit, and threads take no address space
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "524288",
    "MALLOC_TRIM_THRESHOLD_": "524288",
}


@contextlib.contextmanager
def memory_limit(mib: int) -> Iterator[None]:
    """Let this process allocate at most `mib` MiB of address space more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    held = pages * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + (mib << 20), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def limited(function: Callable[..., Any], mib: int) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with memory_limit(mib):
            return function(*args, **kwargs)

    return call


if __name__ == "__main__":
    place, size, *arguments = sys.argv[1:]
    if place == "step":
        Trainer.take_step = limited(Trainer.take_step, int(size))  # type: ignore[method-assign]
    else:
        assert place == "held-out KL"
        kl.token_kl = limited(kl.token_kl, int(size))
    sys.exit(cli.main(arguments))
