"""What subprocesses of tests are forked with: see `forked.py`."""

from __future__ import annotations

import gc
import importlib.util
import multiprocessing
import os

# as the engine's options set them, before vLLM is imported
os.environ |= {"TORCHDYNAMO_DISABLE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}

import minidistill.cli
import minidistill.driver.session
import minidistill.trainer.build
import minidistill.trainer.loading  # noqa: F401
import support.forked  # noqa: F401

# a whole test run starts several engines; a few tests may start none
if "PYTEST_XDIST_WORKER" in os.environ and importlib.util.find_spec("vllm"):
    import vllm
    import vllm.entrypoints.openai.api_server
    import vllm.v1.engine.llm_engine
    import vllm.v1.worker.cpu_worker  # noqa: F401
    from vllm.model_executor.models import registry
    from vllm.v1.engine import utils

    # vLLM looks at each new model's class in a process of its own, which imports vLLM once more
    registry._run_in_subprocess = lambda inspect: inspect()
    # and so does the engine of a server
    utils.get_mp_context = lambda: multiprocessing.get_context("fork")

# what is imported by now stays: no subprocess need look for garbage in it
gc.collect()
gc.freeze()
