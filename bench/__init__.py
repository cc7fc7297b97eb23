"""Benchmarks, run as `python -m bench.NAME`: step, peers and growth (a training step, beside TRL's
and by its sizes), kernels, sync, engines, schedule, sokoban, and gpu_check, which proves the GPU
path in minutes (docs/gpu.md)."""
