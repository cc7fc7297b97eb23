"""Environments: where tasks come from and how completions are scored."""

from minidistill.envs.base import Environment, has_rewards, load_environment

__all__ = ["Environment", "has_rewards", "load_environment"]
