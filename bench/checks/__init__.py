"""The checks of `bench.gpu_check`, a file for each kind."""
