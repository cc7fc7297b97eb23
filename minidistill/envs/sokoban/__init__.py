"""Sokoban: generator, solver, parser and rewards."""

from minidistill.envs.sokoban.env import SokobanEnv, load

__all__ = ["SokobanEnv", "load"]
