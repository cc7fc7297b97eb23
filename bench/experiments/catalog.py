"""All experiments."""

from bench.experiments.organism import ORGANISM

EXPERIMENTS = (ORGANISM,)
