"""All experiments."""

from bench.experiments.engines import ENGINES_AGREE
from bench.experiments.organism import ORGANISM
from bench.experiments.smollm2 import SMOLLM2
from bench.experiments.turns import TURNS

EXPERIMENTS = (ORGANISM, TURNS, SMOLLM2, ENGINES_AGREE)
