"""`minidistill plan`: options, what machine is planned for, and the exit code."""

from __future__ import annotations

import json
import math

from rich.console import Console

from minidistill.config import load_config
from minidistill.errors import EXIT_ENVIRONMENT, EXIT_OK, UserError
from minidistill.placement.machine import GIB, Machine
from minidistill.placement.planner import plan_run
from minidistill.placement.render import as_json, show


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
    gpu_bytes = None if memory is None else int(memory * GIB)
    machine = Machine.imagined(None if count is None else int(count), gpu_bytes)
    result = plan_run(loaded, machine, shipped=True)
    if as_data:
        print(json.dumps(as_json(result), indent=2))
    else:
        console = Console()
        show(result, console if console.is_terminal else Console(width=160))
    return EXIT_OK if result.fits else EXIT_ENVIRONMENT


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
