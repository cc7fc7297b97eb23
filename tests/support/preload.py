"""What subprocesses of tests are forked with: see `forked.py`."""

from __future__ import annotations

import importlib.util
import os

# as the engine's options set them, before vLLM is imported
os.environ |= {"TORCHDYNAMO_DISABLE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}

import minidistill.trainer.build
import minidistill.trainer.loading  # noqa: F401

# a whole test run starts several engines; a few tests may start none
if "PYTEST_XDIST_WORKER" in os.environ and importlib.util.find_spec("vllm"):
    import vllm
    import vllm.v1.engine.llm_engine
    import vllm.v1.worker.cpu_worker  # noqa: F401
