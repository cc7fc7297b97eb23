"""Tests of minidistill_kernels; see test_ops_interpreter.py for the Triton kernels."""

import os
import sys
from pathlib import Path

# bench/ is no installed package
sys.path.insert(0, str(Path(__file__).parents[2]))

# Run by test_ops_interpreter.py, in a process where the Triton kernels are interpreted.
INTERPRETED = os.environ.get("MINIDISTILL_KERNELS") == "interpret"
collect_ignore = [] if INTERPRETED else ["test_ops_triton.py"]
