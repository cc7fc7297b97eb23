"""Sokoban: level generator, solver, prompts, and scoring of answers."""

from minidistill.envs.sokoban.env import SokobanEnv, load

__all__ = ["SokobanEnv", "load"]
