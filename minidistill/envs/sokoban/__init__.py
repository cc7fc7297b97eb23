"""Sokoban: level generator, solver, prompts, and scoring of answers."""

from minidistill.envs.sokoban.env import SokobanEnv
from minidistill.envs.sokoban.load import load

__all__ = ["SokobanEnv", "load"]
