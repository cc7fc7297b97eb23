"""The NVIDIA driver, and whether torch's build, the driver and the GPUs belong together."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from minidistill.doctor.result import Result, failed, passed, skipped
from minidistill.errors import UserError

KERNEL_MODULE = Path("/proc/driver/nvidia/version")
SMI_SECONDS = 30.0
LEAST_FREE = 4.0
"""GiB, on one GPU at least."""
NO_GPU = "there is no NVIDIA GPU: everything runs on the CPU"
REBOOT = "reboot, or reinstall the driver: `nvidia-smi` has to work by itself"


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU, its memory in GiB."""

    name: str
    free: float
    total: float


@dataclass(frozen=True, slots=True)
class Driver:
    """The driver and its GPUs. `cuda` is the newest version of CUDA that it runs."""

    version: str
    cuda: tuple[int, int]
    cards: tuple[Card, ...]


def read_driver() -> Driver | None:
    """What nvidia-smi says; None if there is no GPU. Raises UserError if it does not work."""
    program = shutil.which("nvidia-smi")
    if program is None:
        if not KERNEL_MODULE.exists():
            return None
        raise UserError("the NVIDIA driver is loaded, but there is no nvidia-smi", fix=REBOOT)
    try:
        done = subprocess.run(
            [program, "-q", "-x"], capture_output=True, text=True, timeout=SMI_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"nvidia-smi fails: {error}", fix=REBOOT) from None
    if done.returncode != 0:
        said = (done.stdout + done.stderr).strip().splitlines() or ["it says nothing"]
        what = f"nvidia-smi fails with exit code {done.returncode}: {said[0]}"
        raise UserError(what, fix=REBOOT)
    try:
        return _parse(done.stdout)
    except (ElementTree.ParseError, ValueError) as error:
        raise UserError(f"nvidia-smi cannot be read: {error}", fix=REBOOT) from None


def _parse(text: str) -> Driver | None:
    root = ElementTree.fromstring(text)
    cards = tuple(
        Card(
            gpu.findtext("product_name", "a GPU"),
            _gib(gpu.findtext("fb_memory_usage/free", "")),
            _gib(gpu.findtext("fb_memory_usage/total", "")),
        )
        for gpu in root.iter("gpu")
    )
    if not cards:
        return None
    major, _, minor = root.findtext("cuda_version", "").partition(".")
    return Driver(root.findtext("driver_version", "?"), (int(major), int(minor)), cards)


def _gib(text: str) -> float:
    """`81559 MiB` in GiB."""
    number, _, unit = text.partition(" ")
    if unit != "MiB":
        raise ValueError(f"a memory size is {text!r}")
    return int(number) / 1024


def driver() -> Result:
    """The driver works."""
    found = read_driver()
    if found is None:
        return skipped(NO_GPU)
    names = ", ".join(card.name for card in found.cards)
    cuda = ".".join(map(str, found.cuda))
    return passed(f"{found.version}, for CUDA up to {cuda}: {names}")


def gpu_memory() -> Result:
    """One GPU at least has free memory."""
    found = read_driver()
    if found is None:
        return skipped(NO_GPU)
    text = ", ".join(f"{card.free:.1f} of {card.total:.1f} GiB free" for card in found.cards)
    if not max(card.free for card in found.cards) >= LEAST_FREE:
        return failed(text, "end the programs that `nvidia-smi` lists")
    return passed(text)


def torch_build() -> Result:
    """torch computes, and its build is one for this machine."""
    import torch

    found = read_driver()
    built = torch.version.cuda
    text = f"{torch.__version__}, built for {f'CUDA {built}' if built else 'the CPU'}"
    if not _multiplies("cpu"):
        return failed(f"{text}: a product of matrices is wrong", "reinstall torch")
    if getattr(torch.version, "hip", None):
        return failed(f"{text} and ROCm, which is not supported", "install another build of torch")
    if found is None:
        return passed(text)
    newest = ".".join(map(str, found.cuda))
    other = (
        f"install a build of torch for CUDA {newest} or older: pip's default is a CUDA build, "
        "unless a setting such as PIP_EXTRA_INDEX_URL names an index of CPU builds"
    )
    if built is None:
        return failed(f"{text}, though there is a {found.cards[0].name}", other)
    # within a major version an older driver runs newer builds
    if int(built.split(".")[0]) > found.cuda[0]:
        fix = f"update the driver to one for CUDA {built}, or {other}"
        return failed(f"{text}, and driver {found.version} is for CUDA up to {newest}", fix)
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return passed(f"{text}; CUDA_VISIBLE_DEVICES hides the GPUs")
    if not torch.cuda.is_available():
        return failed(f"{text}: it finds no GPU, and the driver does", REBOOT)
    for index in range(torch.cuda.device_count()):
        name, capability = (
            torch.cuda.get_device_name(index),
            torch.cuda.get_device_capability(index),
        )
        if not can_run(torch.cuda.get_arch_list(), capability):
            number = ".".join(map(str, capability))
            what = f"{text} has no code for {name} (compute capability {number})"
            return failed(what, "install a build of torch that is for this GPU")
        if not _multiplies(f"cuda:{index}"):
            return failed(f"{text}: a product of matrices on {name} is wrong", REBOOT)
    return passed(text)


def can_run(built_for: list[str], capability: tuple[int, int]) -> bool:
    """Whether code for one of `built_for` (sm_80, sm_90a, compute_90) runs on a GPU.

    A GPU runs code of its own major version up to its minor one, and compiles intermediate code
    (compute_) of any older version. Code with a letter is for one version alone.
    """
    for name in built_for:
        kind, _, number = name.partition("_")
        exact = not number.isdecimal()
        digits = number.rstrip("af")
        if len(digits) < 2 or not digits.isdecimal():
            continue
        version = int(digits[:-1]), int(digits[-1])
        if kind == "compute":
            runs = version <= capability
        elif exact:
            runs = version == capability
        else:
            runs = version[0] == capability[0] and version[1] <= capability[1]
        if runs:
            return True
    return False


def _multiplies(device: str) -> bool:
    import torch

    numbers = torch.arange(64 * 64, dtype=torch.float32).view(64, 64).remainder(7)
    product = (numbers.to(device) @ numbers.to(device)).cpu()
    return bool((product.double() == numbers.double() @ numbers.double()).all())
