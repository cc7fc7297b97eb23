"""The command line: a function a command. Heavy imports stand where they are used."""

from __future__ import annotations

import difflib
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING

from minidistill import __version__
from minidistill.errors import (
    EXIT_ENVIRONMENT,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_USAGE,
    UserError,
    printable,
)

if TYPE_CHECKING:
    from minidistill.config import LoadedConfig

_HELP = """\
minidistill: bake a context into a model's weights

usage: minidistill COMMAND …

  run FILES… [--key VALUE]…     train
  plan FILES… [--key VALUE]…    what would run on which GPU, and whether it fits
  config FILES… [--key VALUE]…  show every setting and where it comes from
  report DIR                    write a run's HTML report again
  bench NAME                    measure on this machine: kernels, sync, engines, schedule

  --help      also after a command
  --version

examples:
  minidistill run configs/sokoban.toml
  minidistill run configs/sokoban.toml --trainer.loss.adv_tau 0 --max-steps 20
"""

_RUN_HELP = """\
usage: minidistill run FILES… [--key VALUE]… [--resume] [--traceback]

Train as the TOML files say, the later beating the earlier and the command line beating all.

  --key VALUE   any setting by its dotted name, in snake or kebab case; see `minidistill config`
  --resume      go on from the run directory's latest checkpoint
  --traceback   show where an error was raised

examples:
  minidistill run configs/sokoban.toml --output-dir runs/first
  minidistill run @ base.toml @ more.toml --inference_gpu_ids 0,1 --trainer_gpu_ids 2 3
  minidistill run configs/sokoban.toml --wandb --no-orchestrator.eval
"""

_PLAN_HELP = """\
usage: minidistill plan FILES… [--gpus N] [--gpu-memory GiB] [--json] [--key VALUE]… [--traceback]

Say what `run` would do on a machine: which GPUs sample, score and train, the memory of each, and
if it does not fit (exit code 3) what to change. Nothing is loaded but configurations.

  --gpus        GPUs of the machine, 0 for a CPU; by default those that are here
  --gpu-memory  GiB of each (of the machine for a CPU); by default what is here, else 80
  --json        as JSON, sizes in bytes
  --traceback   show where an error was raised

examples:
  minidistill plan configs/sokoban-qwen3-4b.toml --gpus 4 --gpu-memory 80
  minidistill plan configs/sokoban-qwen3-4b.toml --gpus 1 --gpu-memory 24 --json
"""

_CONFIG_HELP = """\
usage: minidistill config FILES… [--key VALUE]… [--json] [--traceback]

Show the configuration that `run` would use, and where each setting comes from.

  --json        as JSON: {"config": {…}, "provenance": {"dotted.key": "file:line"}}
  --traceback   show where an error was raised

examples:
  minidistill config configs/sokoban.toml --trainer.optim.lr 1e-3
  minidistill config configs/sokoban.toml --json
"""

_REPORT_HELP = """\
usage: minidistill report DIR [--traceback]

Write the HTML report of the run in DIR again and print its path.

example:
  minidistill report runs/sokoban
"""


_BENCHMARKS = ("kernels", "sync", "engines", "schedule")
_BENCH_HELP = """\
usage: minidistill bench kernels|sync|engines|schedule [options]

Measure on this machine: the kernels next to their peers, a weight sync in memory next to one
through a file, vLLM next to the embedded engine, sampling one step ahead next to taking turns. The
same as `python -m bench.NAME` in a checkout, whose `--help` has the options.

examples:
  minidistill bench kernels
  minidistill bench engines --model smollm2
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; errors go to standard error."""
    args = list(sys.argv[1:] if argv is None else argv)
    show_traceback = _take(args, "--traceback")
    try:
        return _dispatch(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # `minidistill config … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except Exception as error:
        if show_traceback:
            traceback.print_exc()
        return _report_error(error)


def _dispatch(args: list[str]) -> int:
    if not args:
        print(_HELP, end="", file=sys.stderr)
        return EXIT_USAGE
    name, rest = args[0], args[1:]
    if name in ("--help", "-h", "help"):
        print(_HELP, end="")
        return EXIT_OK
    if name == "--version":
        print(f"minidistill {__version__}")
        return EXIT_OK
    if name not in _COMMANDS:
        # "rl" is what the public trainer calls the same thing.
        near = ["run"] if name == "rl" else difflib.get_close_matches(name, _COMMANDS, 1, 0.4)
        fix = f"did you mean `minidistill {near[0]}`?" if near else "see minidistill --help"
        raise UserError(f"there is no command {name}", fix=fix)
    command, usage = _COMMANDS[name]
    if "--help" in rest or "-h" in rest:
        print(usage, end="")
        return EXIT_OK
    return command(rest)


def _run(args: list[str]) -> int:
    resume = _take(args, "--resume")
    loaded = _load("run", args)
    # Read once, when torch loads OpenMP: idle threads that spin make a busy machine many times
    # slower (docs/decisions/0005).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    if os.environ.get("WORLD_SIZE", "1") != "1" and os.environ.get("RANK", "0") != "0":
        from minidistill.trainer.distributed.worker import follow

        return follow(loaded)  # torchrun: rank 0 is the run, the others train with it
    from minidistill.run.loop import run

    return run(loaded, resume=resume)


def _plan(args: list[str]) -> int:
    from minidistill.placement.command import run_plan

    return run_plan(args)


def _config(args: list[str]) -> int:
    as_json = _take(args, "--json")
    loaded = _load("config", args)
    if as_json:
        print(json.dumps({"config": loaded.resolved(), "provenance": loaded.provenance}, indent=2))
    else:
        _show(_settings(loaded))
    sys.stdout.flush()
    return EXIT_OK


def _report(args: list[str]) -> int:
    if len(args) != 1 or args[0].startswith("-"):
        raise UserError("report takes one run directory", fix="minidistill report runs/NAME")
    from pathlib import Path

    directory = Path(args[0])
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory", fix="give the directory of a run")
    from minidistill.reporting.html import write_report

    print(printable(str(write_report(directory))))
    return EXIT_OK


def _bench(args: list[str]) -> int:
    if not args or args[0] not in _BENCHMARKS:
        names = ", ".join(_BENCHMARKS)
        raise UserError(f"bench takes what to measure: {names}", fix="minidistill bench kernels")
    sys.path.insert(0, os.getcwd())  # benchmarks are part of a checkout, not of the package
    module = f"bench.{args[0]}"
    try:
        measure = import_module(module)
    except ModuleNotFoundError as error:
        if error.name not in ("bench", module):
            raise
        raise UserError(
            "the benchmarks are not here", os.getcwd(), "run this in a checkout of the project"
        ) from None
    return int(measure.main(args[1:]))


def _load(command: str, args: list[str]) -> LoadedConfig:
    if not args:
        fix = f"minidistill {command} configs/sokoban.toml"
        raise UserError("no configuration file is given", fix=fix)
    from minidistill.config import load_config

    return load_config(args)


def _settings(loaded: LoadedConfig) -> list[tuple[str, str, str]]:
    """Key, value and origin of each setting, ready to print."""
    from minidistill.config.errors import shown
    from minidistill.config.layers import leaves
    from minidistill.config.toml import dotted

    rows = []
    for path, value in leaves(loaded.resolved()):
        key = dotted(path)
        text = "-" if value is None else shown(value)
        rows.append((printable(key), text, printable(loaded.provenance[key])))
    return rows


def _show(rows: list[tuple[str, str, str]]) -> None:
    if not sys.stdout.isatty():
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        for key, value, origin in rows:
            print(f"{key:<{widths[0]}}  {value:<{widths[1]}}  {origin}")
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("setting", "value", "from", box=None, pad_edge=False, header_style="bold")
    for key, value, origin in rows:
        style = "dim" if origin == "default" else ""
        table.add_row(Text(key, style), Text(value, style), Text(origin, style))
    Console().print(table)


def _report_error(error: Exception) -> int:
    package = error.name or "" if isinstance(error, ModuleNotFoundError) else ""
    if package and not package.startswith("minidistill"):
        error = UserError(
            f"the package {package} is missing", "", f"pip install {package}", EXIT_ENVIRONMENT
        )
    if isinstance(error, UserError):
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        hidden = getattr(error, "hidden", 0)
        if hidden:
            print(f"(and {hidden} more)", file=sys.stderr)
        return error.exit_code
    first, *_ = str(error).strip().splitlines() or [""]
    what = UserError(
        f"{type(error).__name__}: {first}", fix="--traceback shows where it was raised"
    )
    print(f"error: {what}", file=sys.stderr)
    return EXIT_ENVIRONMENT if isinstance(error, MemoryError) else EXIT_FAILED


def _take(args: list[str], flag: str) -> bool:
    """Whether `flag` is among `args`, from which it is removed."""
    found = flag in args
    args[:] = [arg for arg in args if arg != flag]
    return found


_COMMANDS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "run": (_run, _RUN_HELP),
    "plan": (_plan, _PLAN_HELP),
    "config": (_config, _CONFIG_HELP),
    "report": (_report, _REPORT_HELP),
    "bench": (_bench, _BENCH_HELP),
}
