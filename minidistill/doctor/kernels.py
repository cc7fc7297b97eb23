"""Triton: a kernel of this project compiles, and computes what it should."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from minidistill.doctor.result import Result, failed, passed

KERNEL = "score_kernel[h_ptr:bf16"
FIX = "reinstall triton in the version that torch requires, and make its cache folder writable "
FIX += "(TRITON_CACHE_DIR)"
ROWS, VOCABULARY = 4, 300
ERROR = 1e-5
"""Nats, of fp32 log-probs."""


def compiled() -> Result:
    """A kernel compiles for this GPU and computes there; without one it compiles for an sm_90."""
    import torch

    # compiled again: a cache would hide a compiler that does not work
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        import triton

        if torch.cuda.is_available():
            name = torch.cuda.get_device_name()
            return _judge(f"{triton.__version__}, compiled for {name}", _error("cuda"))
        from minidistill_kernels import aot

        chosen = next(c for c in aot.configurations() if c.name.startswith(KERNEL))
        made = aot.compile_one(chosen, 90)
        assert any(Path(folder).iterdir()), "nothing was compiled"
    return passed(f"{triton.__version__}, compiled for sm_90 ({made['registers']} registers)")


def interpreted() -> Result:
    """The kernels run without a compiler, as in tests. Its process has TRITON_INTERPRET=1."""
    import triton

    return _judge(f"{triton.__version__}, without compiling", _error("cpu"))


def _judge(text: str, error: float) -> Result:
    if not error <= ERROR:
        return failed(f"{text}: log-probs are wrong by {error:.2g} nats", FIX)
    return passed(f"{text}: log-probs within {error:.1g} nats")


def _error(device: str) -> float:
    """The largest error of the kernels' log-probs, in nats, against float64."""
    import torch

    from minidistill_kernels import selective_logprob

    torch.manual_seed(0)
    logits = torch.randn(ROWS, VOCABULARY)
    ids = torch.arange(ROWS) * 7
    logprobs = selective_logprob(logits.to(device), ids.to(device))[0].cpu().double()
    expected = logits.double().log_softmax(-1).gather(1, ids[:, None])[:, 0]
    return float((logprobs - expected).abs().max())
