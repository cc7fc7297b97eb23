"""The command line. Heavy imports stand in the functions that need them, so that help is fast."""

from __future__ import annotations

import contextlib
import difflib
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from minidistill import __version__
from minidistill.cli.bake import add_bake
from minidistill.cli.bench import add_bench
from minidistill.cli.chat import add_chat
from minidistill.cli.completion import add_completion
from minidistill.cli.config import add_config
from minidistill.cli.doctor import add_doctor
from minidistill.cli.env import add_env
from minidistill.cli.eval import add_eval
from minidistill.cli.export import add_export
from minidistill.cli.init import add_init
from minidistill.cli.parser import CommandParser, Handler
from minidistill.cli.plan import add_plan
from minidistill.cli.report import add_report
from minidistill.cli.rollouts import add_rollouts
from minidistill.cli.run import add_run
from minidistill.error_output import print_error, print_to_stderr
from minidistill.errors import (
    EXIT_ENVIRONMENT,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_USAGE,
    UserError,
    bounded,
    printable,
)
from minidistill.system.files import drop_output, open_standard_streams
from minidistill.system.foreign import ctrl_c, is_interrupt, was_interrupted

_LASTING = ("run", "bake")
"""Commands that go on if nobody reads their output."""
_COMMANDS = (
    add_run,
    add_bake,
    add_init,
    add_plan,
    add_config,
    add_env,
    add_report,
    add_export,
    add_bench,
    add_chat,
    add_eval,
    add_rollouts,
    add_doctor,
    add_completion,
)


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
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")  # what an old encoding lacks
        with ctrl_c():
            code = _dispatch(args)
            _flush_output(args)
            return code
    except SystemExit as error:  # of a benchmark's parser
        if isinstance(error.__context__, BrokenPipeError):  # rich's, which has dropped the output
            return EXIT_OK
        raise
    except BaseException as error:  # also what is no Exception, raised by somebody's code
        if is_interrupt(error) or was_interrupted():
            print_to_stderr("interrupted")
            return EXIT_INTERRUPTED
        # `minidistill config … | head`. A run drops its output itself: another pipe broke there.
        if isinstance(error, BrokenPipeError) and _command(args) not in _LASTING:
            drop_output(sys.stdout)
            return EXIT_OK
        if "--traceback" in args:  # not from the parser, which may be what failed
            print_to_stderr(printable(bounded(traceback.format_exc().rstrip(), 50_000)))
        code = print_error(error)
        with contextlib.suppress(UserError, BrokenPipeError):
            _flush_output(args)
        return code


def _flush_output(args: list[str]) -> None:
    """Write what standard output still holds: as the interpreter ends it is too late for an error.

    Raises BrokenPipeError, and UserError for another failure. What a run prints may get lost.
    """
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except ValueError:  # somebody has closed it
        pass
    except OSError as error:
        drop_output(sys.stdout)
        if _command(args) in _LASTING:
            return
        if isinstance(error, BrokenPipeError):
            raise
        what = f"the output cannot be written: {error.strerror or error}"
        fix = "write it to another place"
        raise UserError(what, fix=fix, exit_code=EXIT_ENVIRONMENT) from error


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
        from minidistill.config import shipped

        if name.endswith(".toml") or name in shipped.names():
            fix = f"did you mean `minidistill run {name}`?"
        raise UserError(f"there is no command {name}", fix=fix)
    try:
        options, rest = parser.parse_known_args(args)
    except SystemExit:  # after --help and --version
        return EXIT_OK
    handler: Handler = options.handler
    return handler(options, rest)


def _parsers() -> tuple[CommandParser, dict[str, CommandParser]]:
    """The parser of the whole command line, and those of its commands."""
    parser = CommandParser(
        prog="minidistill",
        usage="minidistill COMMAND …",
        description="Bake a context into a model's weights.",
        epilog="""\
examples:
  minidistill bake --model Qwen/Qwen3-4B-Instruct-2507 --context persona.txt
  minidistill run sokoban --trainer.loss.adv_tau 0 --max-steps 20
  minidistill run --help""",
    )
    parser.add_argument("--version", action="version", version=f"minidistill {__version__}")
    commands = parser.add_subparsers(title="commands", prog="minidistill", metavar="COMMAND")
    for add in _COMMANDS:
        add(commands)
    return parser, commands.choices
