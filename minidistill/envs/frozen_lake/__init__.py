"""Frozen Lake: cross the ice to the goal without falling into a hole, over several turns."""

from minidistill.envs.frozen_lake.env import FrozenLake, load

__all__ = ["FrozenLake", "load"]
