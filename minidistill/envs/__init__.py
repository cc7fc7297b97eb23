"""Environments: where tasks come from and how completions are scored."""

from minidistill.envs.multi_turn import Policy
from minidistill.envs.protocol import Environment, has_rewards, has_task, take_tasks
from minidistill.envs.registry import load_environment
from minidistill.types import Message, Reward, Task, Turn

__all__ = [
    "Environment",
    "Message",
    "Policy",
    "Reward",
    "Task",
    "Turn",
    "has_rewards",
    "has_task",
    "load_environment",
    "take_tasks",
]
