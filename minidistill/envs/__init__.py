"""Environments: where tasks come from and how completions are scored."""

from minidistill.envs.base import Environment, load_environment

__all__ = ["Environment", "load_environment"]
