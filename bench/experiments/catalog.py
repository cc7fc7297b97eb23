"""All experiments."""

from bench.experiments.organism import ORGANISM
from bench.experiments.turns import TURNS

EXPERIMENTS = (ORGANISM, TURNS)
