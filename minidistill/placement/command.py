"""`minidistill plan`: options, what machine is planned for, and the exit code."""

from __future__ import annotations

import json
import math
import os

from rich.console import Console

from minidistill.config import load_config
from minidistill.errors import EXIT_ENVIRONMENT, EXIT_OK, UserError
from minidistill.models.hub import load_model_config
from minidistill.placement.devices import check_settings, rank_devices
from minidistill.placement.planner import GIB, plan
from minidistill.placement.render import as_json, show

GPU_MEMORY = 80.0  # GiB, where there is no GPU to ask


def run_plan(args: list[str]) -> int:
    """Print the plan that `args` ask for: exit code 0 where it fits, 3 where it does not."""
    args = list(args)
    as_data = "--json" in args
    args = [arg for arg in args if arg != "--json"]
    count, memory = _number(args, "--gpus", int), _number(args, "--gpu-memory", float)
    if not args:
        raise UserError(
            "no configuration file is given", fix="minidistill plan configs/sokoban.toml"
        )
    loaded = load_config(args)
    config = loaded.config
    gpus, size = machine(count, memory)
    other = config.separate_teacher
    found = plan(
        config,
        load_model_config(config, shipped=True),
        gpus,
        size,
        teacher_config=load_model_config(config, other, shipped=True) if other else None,
    )
    # what a run there would refuse
    check_settings(loaded, found)
    rank_devices(loaded, found.partition.trainer)
    if as_data:
        print(json.dumps(as_json(found), indent=2))
    else:
        console = Console()
        show(found, console if console.is_terminal else Console(width=160))
    return EXIT_OK if found.fits else EXIT_ENVIRONMENT


def machine(gpus: float | None, memory: float | None) -> tuple[int, int]:
    """GPUs and bytes of each (of the CPU's memory for none): as asked, else what is here."""
    import torch

    here = torch.cuda.device_count()
    count = here if gpus is None else int(gpus)
    if memory is not None:
        return count, int(memory * GIB)
    if count == 0:
        return 0, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if here:
        return count, min(torch.cuda.get_device_properties(i).total_memory for i in range(here))
    return count, int(GPU_MEMORY * GIB)


def _number(args: list[str], flag: str, kind: type[int] | type[float]) -> float | None:
    """The number after `flag` (or `flag=`), both of which are removed from `args`."""
    for index, arg in enumerate(args):
        name, equals, text = arg.partition("=")
        if name.replace("_", "-") != flag:
            continue
        if not equals:
            text = args[index + 1] if index + 1 < len(args) else ""
        del args[index : index + (1 if equals else 2)]
        try:
            value = kind(text)
        except ValueError:
            value = -1
        if not math.isfinite(value) or value < 0 or (value == 0 and kind is float):
            what = "a whole number of GPUs, 0 for a CPU" if kind is int else "GiB above 0"
            raise UserError(f"{flag} {text!r} cannot be used", where=flag, fix=f"give {what}")
        return value
    return None
