"""Benchmarks, run as `python -m bench.NAME`: kernels, sync, engines, schedule, serving, sokoban,
and gpu_check, which proves the GPU path in minutes (docs/gpu.md)."""
