"""All experiments."""

from bench.experiments.organism import ORGANISM
from bench.experiments.smollm2 import SMOLLM2
from bench.experiments.turns import TURNS

EXPERIMENTS = (ORGANISM, TURNS, SMOLLM2)
