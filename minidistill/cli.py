"""The command line. Heavy imports stand in the functions that need them, so that help is fast."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import math
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

from minidistill import __version__
from minidistill.cli_env import add_env
from minidistill.cli_export import add_export
from minidistill.error_output import print_error, print_to_stderr
from minidistill.errors import (
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_USAGE,
    UserError,
    bounded,
    printable,
)
from minidistill.system.files import drop_output, open_standard_streams
from minidistill.system.foreign import check_interrupted, ctrl_c, is_interrupt, was_interrupted
from minidistill.system.threads import settle_threads

if TYPE_CHECKING:
    from minidistill.config import LoadedConfig

_Commands: TypeAlias = "argparse._SubParsersAction[_Parser]"
_Handler = Callable[[argparse.Namespace, list[str]], int]
"""A command: takes its options and all other arguments in their order, returns the exit code."""

_BENCHMARKS = (
    *("step", "peers", "growth", "kernels", "sync", "engines", "schedule", "serving", "sokoban"),
)

_CONFIGURATION = """\
FILES…         TOML files; a later file beats an earlier one
--key VALUE    any setting by its dotted name, in snake or kebab case; beats the files
`minidistill config FILES…` shows all settings, docs/configuration.md explains them."""


def entry() -> NoReturn:
    """The command `minidistill`: `main`, and the end of the process."""
    code = main()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of the interpreter's end
    background = sys.modules.get("minidistill.reporting.monitors.background")
    if background is not None and background.is_busy():
        # a monitor that hangs, or its package's exit hook, would keep the process for ever
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code. Errors are printed to standard error."""
    args = list(sys.argv[1:] if argv is None else argv)
    open_standard_streams()
    try:
        with ctrl_c():
            return _dispatch(args)
    except SystemExit:  # of a benchmark's parser
        raise
    except BaseException as error:  # also what is no Exception, raised by somebody's code
        if is_interrupt(error) or was_interrupted():
            print_to_stderr("interrupted")
            return EXIT_INTERRUPTED
        # `minidistill config … | head`. A run drops its output itself: another pipe broke there.
        if isinstance(error, BrokenPipeError) and _command(args) != "run":
            drop_output(sys.stdout)
            return EXIT_OK
        if "--traceback" in args:  # not from the parser, which may be what failed
            print_to_stderr(printable(bounded(traceback.format_exc().rstrip(), 50_000)))
        return print_error(error)


def _command(args: list[str]) -> str:
    """The name of the command, empty if there is none."""
    return next((arg for arg in args if arg != "--traceback"), "")


def _dispatch(args: list[str]) -> int:
    parser, commands = _parsers()
    name = _command(args)
    if not name:
        parser.print_help(sys.stderr)
        return EXIT_USAGE
    if name == "help":
        args = ["--help"]
    elif name not in (*commands, "-h", "--help", "--version"):
        # argparse would list all commands. "rl" is what the public trainer calls `run`.
        close = ["run"] if name == "rl" else difflib.get_close_matches(name, commands, 1, 0.4)
        fix = f"did you mean `minidistill {close[0]}`?" if close else "see minidistill --help"
        raise UserError(f"there is no command {name}", fix=fix)
    try:
        options, rest = parser.parse_known_args(args)
    except SystemExit:  # after --help and --version
        return EXIT_OK
    handler: _Handler = options.handler
    return handler(options, rest)


class _Parser(argparse.ArgumentParser):
    """Raises UserError where argparse would print and exit."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **settings,
        )
        self.add_argument("--traceback", action="store_true", help="show where an error was raised")

    def error(self, message: str) -> NoReturn:
        raise UserError(message, fix=f"see {self.prog} --help")

    def add_configuration(self) -> None:
        """Document files and overrides, which `load_config` reads.

        They are not declared: argparse cannot tell the value of an undeclared option from a file.
        What it does not know it leaves in its order.
        """
        self.add_argument_group("configuration", _CONFIGURATION)


def _parsers() -> tuple[_Parser, dict[str, _Parser]]:
    """The parser of the whole command line, and those of its commands."""
    parser = _Parser(
        prog="minidistill",
        usage="minidistill COMMAND …",
        description="Bake a context into a model's weights.",
        epilog="""\
examples:
  minidistill run configs/sokoban.toml
  minidistill run configs/sokoban.toml --trainer.loss.adv_tau 0 --max-steps 20
  minidistill run --help""",
    )
    parser.add_argument("--version", action="version", version=f"minidistill {__version__}")
    commands = parser.add_subparsers(title="commands", prog="minidistill", metavar="COMMAND")
    for add in (_add_run, _add_plan, _add_config, add_env, _add_report, add_export, _add_bench):
        add(commands)
    return parser, commands.choices


def _add_run(commands: _Commands) -> None:
    parser = commands.add_parser(
        "run",
        help="train",
        usage="minidistill run FILES… [--key VALUE]… [--resume] [--traceback]",
        description="Train with the configuration in the files and on the command line.",
        epilog="""\
examples:
  minidistill run configs/sokoban.toml --output-dir runs/first
  minidistill run @ base.toml @ more.toml --inference_gpu_ids 0,1 --trainer_gpu_ids 2 3
  minidistill run configs/sokoban.toml --wandb --no-orchestrator.eval""",
    )
    parser.set_defaults(handler=_run)
    parser.add_configuration()
    parser.add_argument(
        "--resume", action="store_true", help="continue from the run directory's latest checkpoint"
    )


def _run(options: argparse.Namespace, rest: list[str]) -> int:
    loaded = _load("run", rest, resume=options.resume)
    settle_threads()  # before torch loads OpenMP
    if sys.stderr.isatty():  # the first thing to see, seconds before the next
        print_to_stderr("loading torch and transformers")
    # Interpreted kernels have to be asked for before transformers imports triton.
    import minidistill_kernels  # noqa: F401
    from minidistill.trainer.distributed.rank_group import launched_by_torchrun

    rank, _ = launched_by_torchrun() or (0, 1)
    if rank > 0:
        from minidistill.trainer.distributed.worker import follow

        return follow(loaded)  # torchrun: rank 0 is the driver, the other ranks only train
    from minidistill.run.loop import run

    check_interrupted()  # while packages were imported
    try:
        return run(loaded, resume=options.resume)
    except SystemExit as error:  # of an environment's code: never a success
        raise RuntimeError(f"something called sys.exit({error.code!r})") from error


def _add_plan(commands: _Commands) -> None:
    parser = commands.add_parser(
        "plan",
        help="show what would run on which GPU, and whether it fits",
        usage="minidistill plan FILES… [--gpus N] [--gpu-memory GiB] [--json] [--key VALUE]… "
        "[--traceback]",
        description="""\
Show what `run` would do on a machine: which GPUs sample, score and train, and the memory
of each. If it does not fit (exit code 3), show which settings to change. No weights are loaded.""",
        epilog="""\
examples:
  minidistill plan configs/sokoban-qwen3-4b.toml --gpus 4 --gpu-memory 80
  minidistill plan configs/sokoban-qwen3-4b.toml --gpus 1 --gpu-memory 24 --json""",
    )
    parser.set_defaults(handler=_plan)
    parser.add_configuration()
    parser.add_argument(
        "--gpus",
        type=_gpu_count,
        metavar="N",
        help="GPUs of the machine, 0 for a CPU; by default those of this one",
    )
    parser.add_argument(
        "--gpu-memory",
        type=_gib,
        metavar="GiB",
        help="memory of each GPU, or of the machine for a CPU; by default this machine's, "
        "or 80 if it has no GPU",
    )
    parser.add_argument(
        "--gpu_memory", type=_gib, default=argparse.SUPPRESS, help=argparse.SUPPRESS
    )
    parser.add_argument("--json", action="store_true", help="print JSON, with sizes in bytes")


def _plan(options: argparse.Namespace, rest: list[str]) -> int:
    loaded = _load("plan", rest)
    from minidistill.placement.command import run_plan

    return run_plan(loaded, gpus=options.gpus, gpu_memory=options.gpu_memory, as_data=options.json)


def _gpu_count(text: str) -> int:
    try:
        count = int(text)
    except ValueError:
        count = -1
    if count < 0:
        raise UserError(
            f"--gpus {text!r} cannot be used",
            where="--gpus",
            fix="give a whole number of GPUs, 0 for a CPU",
        )
    return count


def _gib(text: str) -> float:
    try:
        size = float(text)
    except ValueError:
        size = 0.0
    if not math.isfinite(size) or size <= 0:
        raise UserError(
            f"--gpu-memory {text!r} cannot be used", where="--gpu-memory", fix="give GiB above 0"
        )
    return size


def _add_config(commands: _Commands) -> None:
    parser = commands.add_parser(
        "config",
        help="show every setting and where it comes from",
        usage="minidistill config FILES… [--key VALUE]… [--json] [--traceback]",
        description="Show the configuration that `run` would use, and where each setting is from.",
        epilog="""\
examples:
  minidistill config configs/sokoban.toml --trainer.optim.lr 1e-3
  minidistill config configs/sokoban.toml --json""",
    )
    parser.set_defaults(handler=_config)
    parser.add_configuration()
    parser.add_argument(
        "--json",
        action="store_true",
        help='print {"config": {…}, "provenance": {"dotted.key": "file:line"}}',
    )


def _config(options: argparse.Namespace, rest: list[str]) -> int:
    loaded = _load("config", rest)
    from minidistill.config.command import show_config

    show_config(loaded, as_data=options.json)
    return EXIT_OK


def _add_report(commands: _Commands) -> None:
    parser = commands.add_parser(
        "report",
        help="write a run's HTML report again",
        usage="minidistill report DIR [--traceback]",
        description="Write the HTML report of the run in DIR again and print its path.",
        epilog="example:\n  minidistill report runs/sokoban",
    )
    parser.set_defaults(handler=_report)
    parser.add_argument("directory", nargs="?", metavar="DIR", help="directory of a run")


def _report(options: argparse.Namespace, rest: list[str]) -> int:
    if options.directory is None or rest:
        raise UserError("report takes one run directory", fix="minidistill report runs/NAME")
    from pathlib import Path

    directory = Path(options.directory)
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory", fix="give the directory of a run")
    from minidistill.reporting.html import write_report

    print(printable(str(write_report(directory))))
    return EXIT_OK


def _add_bench(commands: _Commands) -> None:
    parser = commands.add_parser(
        "bench",
        help="measure kernels, sync, engines, schedule, serving, sokoban",
        usage="minidistill bench NAME [options]",
        description="""\
Measure on this machine. The same as `python -m bench.NAME` in a checkout, whose --help has the
options.""",
        epilog="""\
examples:
  minidistill bench kernels
  minidistill bench engines --model smollm2""",
    )
    parser.set_defaults(handler=_bench)
    parser.add_argument(
        "benchmark",
        nargs="?",
        metavar="NAME",
        help="kernels (and other implementations of them), sync (weights in memory and through a "
        "file), engines (vLLM and embedded), schedule (async and sync), serving (an adapter and "
        "the context that it replaces) or sokoban (making levels)",
    )


def _bench(options: argparse.Namespace, rest: list[str]) -> int:
    if options.benchmark not in _BENCHMARKS:
        names = ", ".join(_BENCHMARKS)
        raise UserError(f"bench takes one of {names}", fix="minidistill bench kernels")
    from minidistill.system.local_modules import find_in_current_directory

    # benchmarks are part of a checkout, not of the package
    find_in_current_directory("bench")
    module = f"bench.{options.benchmark}"
    try:
        benchmark = import_module(module)
    except ModuleNotFoundError as error:
        if error.name not in ("bench", module):
            raise
        raise UserError(
            "there are no benchmarks in this directory",
            where=os.getcwd(),
            fix="run this in a checkout of the project",
        ) from None
    return int(benchmark.main(rest))


def _load(command: str, args: list[str], *, resume: bool = False) -> LoadedConfig:
    if not args:
        fix = f"minidistill {command} configs/sokoban.toml"
        raise UserError("no configuration file is given", fix=fix)
    from minidistill.config import load_config

    return load_config(args, resume=resume)
