"""Tests of minidistill_kernels; see test_ops_interpreter.py for the Triton kernels."""

import os

# test_ops_triton.py is run by test_ops_interpreter.py, in a process that interprets the kernels.
INTERPRETED = os.environ.get("MINIDISTILL_KERNELS") == "interpret"
collect_ignore = [] if INTERPRETED else ["test_ops_triton.py"]
