"""Environments: where tasks come from and how completions are scored."""

from minidistill.envs.protocol import Environment, has_rewards, has_task, take_tasks
from minidistill.envs.registry import load_environment
from minidistill.types import Reward, Task

__all__ = [
    "Environment",
    "Reward",
    "Task",
    "has_rewards",
    "has_task",
    "load_environment",
    "take_tasks",
]
