"""Benchmarks, run as `python -m bench.NAME`: step, peers and growth (a training step: its pieces,
beside TRL's, and by its sizes), kernels, sync, engines, schedule, serving, sokoban, and gpu_check,
which proves the GPU path in minutes (docs/gpu.md)."""
