"""The command `minidistill config`."""

from __future__ import annotations

import argparse

from minidistill.cli.parser import Commands, load_configuration
from minidistill.errors import EXIT_OK


def add_config(commands: Commands) -> None:
    parser = commands.add_parser(
        "config",
        help="show every setting and where it comes from",
        usage="minidistill config FILES… [--key VALUE]… [--json] [--traceback]",
        description="Show the settings that `run` would use, and where each comes from.",
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
    loaded = load_configuration("config", rest)
    from minidistill.config.command import show_config

    show_config(loaded, as_data=options.json)
    return EXIT_OK
