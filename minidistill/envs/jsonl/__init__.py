"""`jsonl`: a file of prompts as an environment, with or without a reward."""

from minidistill.envs.jsonl.env import JsonlEnv, load
from minidistill.envs.jsonl.lines import Line

__all__ = ["JsonlEnv", "Line", "load"]
