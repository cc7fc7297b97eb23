"""`minidistill plan`: print the plan of a configuration on a machine."""

from __future__ import annotations

import json

from rich.console import Console

from minidistill.config import LoadedConfig
from minidistill.errors import EXIT_ENVIRONMENT, EXIT_OK
from minidistill.placement.machine import GIB, Machine
from minidistill.placement.planner import plan_run
from minidistill.placement.render import as_json, show


def run_plan(
    loaded: LoadedConfig,
    *,
    gpus: int | None,
    gpu_memory: float | None,
    gpu_price: float | None,
    as_data: bool,
) -> int:
    """Print the plan, as JSON with `as_data`. Returns exit code 0 if it fits and 3 if it does not.

    `gpus` and `gpu_memory`, in GiB, describe the machine; None is what this one has. `gpu_price` is
    that of a GPU hour, in any currency.
    """
    gpu_bytes = None if gpu_memory is None else int(gpu_memory * GIB)
    machine = Machine.imagined(gpus, gpu_bytes)
    result = plan_run(loaded, machine, shipped=True)
    if as_data:
        print(json.dumps(as_json(result, gpu_price), indent=2))
    else:
        console = Console()
        show(result, console if console.is_terminal else Console(width=160), gpu_price)
    return EXIT_OK if result.fits else EXIT_ENVIRONMENT
