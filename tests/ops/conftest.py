"""Tests of minidistill_kernels; see test_ops_interpreter.py for the Triton kernels."""

import os
import sys
from pathlib import Path

from hypothesis import HealthCheck, settings

# bench/ is no installed package
sys.path.insert(0, str(Path(__file__).parents[2]))

INTERPRETED = os.environ.get("MINIDISTILL_KERNELS") == "interpret"
settings.register_profile(
    "ops",
    deadline=None,
    derandomize=True,
    max_examples=12 if INTERPRETED else 60,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("ops")
