"""A rank of the trainer other than the driver.

    python -m minidistill.trainer.distributed.worker RANK SIZE DEVICE STORE SOCKET

`Ranks` starts it, or torchrun does (`follow`). It holds the model as the driver does, and calls
what the driver calls until it is dismissed or the driver is gone.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import traceback
from operator import attrgetter
from pathlib import Path

import torch

from minidistill.config import LoadedConfig
from minidistill.errors import EXIT_ENVIRONMENT, EXIT_FAILED, EXIT_OK, UserError
from minidistill.models.hub import load_tokenizer
from minidistill.placement.devices import rank_devices
from minidistill.trainer.build import build_trainer
from minidistill.trainer.distributed.rank_group import World, launched
from minidistill.trainer.guards import out_of_memory
from minidistill.trainer.loading import load_policy


def serve(world: World, device: torch.device) -> None:
    """Do as the driver does until it says that it is over."""
    config, teaching = world.tell(None)
    policy = load_policy(config, load_tokenizer(config), device, teaching)
    trainer = build_trainer(policy, config, teaching.estimator, world.notes.append, world)
    while (command := world.next()) is not None:
        name, arguments = command
        attrgetter(name)(trainer)(*arguments)


def follow(loaded: LoadedConfig) -> int:
    """What `minidistill run` is on the other ranks that torchrun starts. Returns the exit code."""
    found = launched()
    assert found is not None, "not started by torchrun"
    for number in (signal.SIGINT, signal.SIGTERM):  # the driver keeps its step, then dismisses us
        signal.signal(number, signal.SIG_IGN)
    from minidistill.placement.local import plan_here

    devices = rank_devices(loaded, plan_here(loaded.config)[0].partition.trainer)
    device = devices[int(os.environ.get("LOCAL_RANK", found[0])) % len(devices)]
    world = World(*found)
    world.join(device, None)
    return _guarded(world, device)


def _guarded(world: World, device: torch.device) -> int:
    """Serve; an error's last line says what it was, the exit code whether memory ran out."""
    try:
        serve(world, device)
        return EXIT_OK
    except UserError as error:
        for problem in error.problems:
            print(f"error: {problem.what}", file=sys.stderr)
        return error.exit_code
    except Exception as error:
        traceback.print_exc()
        return EXIT_ENVIRONMENT if out_of_memory(error) else EXIT_FAILED


def main(arguments: list[str]) -> None:
    rank, size, device, store, descriptor = arguments
    link = socket.socket(fileno=int(descriptor))
    threading.Thread(target=_end_with_the_driver, args=(link,), daemon=True).start()
    link.send(b"+")  # all is imported: the driver may wait for this rank to join
    world = World(int(rank), int(size))
    world.join(torch.device(device), Path(store))
    code = _guarded(world, torch.device(device))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a process group whose other end is gone may not be waited for


def _end_with_the_driver(link: socket.socket) -> None:
    """The driver never sends anything: what comes is its end, and that of this rank's group."""
    link.recv(1)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1:])
