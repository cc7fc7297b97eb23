"""Environments: where tasks come from and how completions are scored."""

from minidistill.envs.protocol import Environment, has_rewards, has_task
from minidistill.envs.registry import load_environment

__all__ = ["Environment", "has_rewards", "has_task", "load_environment"]
