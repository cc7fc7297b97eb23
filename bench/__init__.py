"""Benchmarks, run as `python -m bench.NAME`: kernels, sync, engines, schedule."""
