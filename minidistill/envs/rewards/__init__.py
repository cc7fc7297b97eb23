"""Rewards that need no code: a name and its arguments in the configuration."""

from minidistill.envs.rewards.build import RewardFunction, build

__all__ = ["RewardFunction", "build"]
