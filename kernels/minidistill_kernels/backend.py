"""Chooses the implementation of the row kernels, by the device or by MINIDISTILL_KERNELS.

torch      the chunked algorithm in torch, on any device
triton     the Triton kernels, on CUDA tensors
interpret  the Triton kernels under Triton's interpreter, on CPU tensors (for tests; slow)
"""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType

import torch

VARIABLE = "MINIDISTILL_KERNELS"
CHOICES = ("torch", "triton", "interpret")


def _requested() -> str | None:
    name = os.environ.get(VARIABLE, "").strip().lower()
    if name and name not in CHOICES:
        raise ValueError(f"{VARIABLE}={name!r}: expected one of {', '.join(CHOICES)}")
    return name or None


# Triton reads TRITON_INTERPRET whenever it decorates a function, also in its own library. It must
# be set before triton is first imported; importing this package is early enough.
if os.environ.get(VARIABLE, "").strip().lower() == "interpret" and "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"


def backend_for(device: torch.device) -> str:
    """'torch' or 'triton' for tensors on `device`; 'triton' includes interpreted kernels.

    Raises:
        ValueError: MINIDISTILL_KERNELS is unknown or does not fit the device.
    """
    requested = _requested()
    if requested is None:
        return "triton" if device.type == "cuda" else "torch"
    if requested == "torch":
        return "torch"
    if requested == "triton" and device.type != "cuda":
        raise ValueError(
            f"{VARIABLE}=triton needs CUDA tensors, got {device.type}; "
            "use 'interpret' to run the Triton kernels on a CPU"
        )
    if requested == "interpret" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"{VARIABLE}=interpret must be set before triton is imported; start a new process"
        )
    return "triton"


def row_kernels(device: torch.device) -> ModuleType:
    """The module with `stats` and `dlogits` for tensors on `device`, imported on first use."""
    name = "triton_rows" if backend_for(device) == "triton" else "torch_rows"
    return importlib.import_module(f"minidistill_kernels.{name}")
