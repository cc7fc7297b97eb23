"""The checks, in the order in which they are made.

To add one, write a function that returns a `Result`, and add a line here. It is named as a string,
because only the process that makes a check imports what the check needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

REINSTALL = "reinstall the packages (`make setup` in a checkout, or pip install minidistill in a "
REINSTALL += "new environment)"
COMPILED = {"MINIDISTILL_KERNELS": "", "TRITON_INTERPRET": "0"}


@dataclass(frozen=True, slots=True)
class Check:
    """A check, and what is said if its process crashes or does not end."""

    name: str
    function: str
    """`module:function`, without arguments."""
    seconds: float = 30.0
    """After so long it has failed."""
    fix: str = REINSTALL
    runs: bool = False
    """It trains: `--quick` leaves it out."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables of its process."""


CHECKS = (
    Check("python", "minidistill.doctor.packages:python"),
    Check("packages", "minidistill.doctor.packages:packages"),
    Check("locale", "minidistill.doctor.machine:locale"),
    Check("memory", "minidistill.doctor.machine:memory"),
    Check(
        "disk",
        "minidistill.doctor.disk:disk",
        fix="a file system does not answer: look at `df` and the mounts of the folders",
    ),
    Check("shared memory", "minidistill.doctor.disk:shared_memory", fix="mount /dev/shm"),
    Check(
        "driver",
        "minidistill.doctor.gpus:driver",
        seconds=60,
        fix="the NVIDIA driver hangs: reboot, and look at `dmesg`",
    ),
    Check("torch", "minidistill.doctor.gpus:torch_build", seconds=180),
    Check("GPU memory", "minidistill.doctor.gpus:gpu_memory", seconds=60),
    Check("triton", "minidistill.doctor.kernels:compiled", seconds=300, environment=COMPILED),
    Check(
        "interpreter",
        "minidistill.doctor.kernels:interpreted",
        seconds=180,
        environment={"MINIDISTILL_KERNELS": "interpret", "TRITON_INTERPRET": "1"},
    ),
    Check(
        "IPC",
        "minidistill.doctor.ipc:round_trip",
        seconds=180,
        fix="in a container, start it with --ipc=host",
    ),
    Check("vLLM", "minidistill.doctor.vllm:vllm", seconds=300),
    Check("hub", "minidistill.doctor.machine:hub"),
    Check(
        "run, embedded",
        "minidistill.doctor.runs:embedded",
        seconds=300,
        runs=True,
        fix='`minidistill run` with inference.engine = "embedded" shows more',
    ),
    Check(
        "run, vLLM",
        "minidistill.doctor.runs:vllm",
        seconds=600,
        runs=True,
        fix='use inference.engine = "embedded", or see what vLLM says in a run\'s logs/run.log',
    ),
)
