"""A rank of the trainer other than the driver.

    python -m minidistill.trainer.distributed.worker RANK SIZE DEVICE STORE SECONDS SOCKET

`RankLauncher` starts it, or torchrun does (`follow`). It loads the same model as the driver and
runs the driver's commands until it is dismissed. It is killed if the driver ends before.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from minidistill import logs
from minidistill.config import LoadedConfig
from minidistill.errors import EXIT_ENVIRONMENT, EXIT_FAILED, EXIT_OK, UserError
from minidistill.models.hub import load_tokenizer
from minidistill.placement.machine import Machine
from minidistill.placement.planner import plan_run
from minidistill.trainer.build import build_trainer
from minidistill.trainer.distributed.rank_group import (
    LOADED,
    PROGRESS,
    STARTED,
    RankGroup,
    launched_by_torchrun,
)
from minidistill.trainer.guards import first_line, is_out_of_memory
from minidistill.trainer.loading import load_policy


def serve(group: RankGroup, device: torch.device, loaded: Callable[[], None]) -> None:
    """Run the driver's commands until it sends no more. `loaded` is called when they can come."""
    config, placement = group.broadcast_object(None)
    with logs.to_list() as warnings:
        group.drain_warnings = warnings.drain
        policy = load_policy(config, load_tokenizer(config), placement, device)
        loaded()
        trainer = build_trainer(policy, config, placement, group)
        while (command := group.next_command()) is not None:
            command.run(trainer)


def follow(loaded: LoadedConfig) -> int:
    """Run as one of the other ranks that torchrun starts. Returns the exit code."""
    rank_and_size = launched_by_torchrun()
    assert rank_and_size is not None, "not started by torchrun"
    devices = plan_run(loaded, Machine.local()).placement.devices
    device = devices[int(os.environ.get("LOCAL_RANK", rank_and_size[0])) % len(devices)]
    group = RankGroup(*rank_and_size)
    group.join(device, None, loaded.config.silence.step)
    # the driver finishes its step and then dismisses the other ranks
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    return _exit_code(group, device, lambda: None)


def _exit_code(group: RankGroup, device: torch.device, loaded: Callable[[], None]) -> int:
    """Serve, and return the exit code. The last line of the output describes the error."""
    try:
        serve(group, device, loaded)
        return EXIT_OK
    except UserError as error:
        for problem in error.problems:
            print(f"error: {problem.what}", file=sys.stderr)
        return error.exit_code
    except Exception as error:
        traceback.print_exc()
        if not is_out_of_memory(error):
            return EXIT_FAILED
        # again, because only the last line is reported, and CUDA's messages have several
        print(f"{type(error).__name__}: {first_line(error)}", file=sys.stderr)
        return EXIT_ENVIRONMENT


def main(arguments: list[str]) -> None:
    rank, size, device, store, seconds, descriptor = arguments
    link = socket.socket(fileno=int(descriptor))

    def send(sign: bytes) -> None:
        with contextlib.suppress(OSError):  # full: the driver has not read earlier ones
            link.send(sign, socket.MSG_DONTWAIT)

    send(STARTED)
    group = RankGroup(int(rank), int(size))
    group.progress = partial(send, PROGRESS)
    group.join(torch.device(device), Path(store), float(seconds))
    code = _exit_code(group, torch.device(device), partial(send, LOADED))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # destroying the process group may hang if other ranks are gone


if __name__ == "__main__":
    main(sys.argv[1:])
