"""Tests of minidistill_kernels. test_ops_interpreter.py repeats them on the Triton kernels."""

import os

# test_ops_interpreter.py runs test_ops_triton.py in a process that interprets the kernels
INTERPRETED = os.environ.get("MINIDISTILL_KERNELS") == "interpret"
collect_ignore = [] if INTERPRETED else ["test_ops_triton.py"]
