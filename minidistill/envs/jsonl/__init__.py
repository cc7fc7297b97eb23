"""`dataset`, or `jsonl`: rows of a file or a data set as an environment."""

from minidistill.envs.jsonl.env import JsonlEnv, load
from minidistill.envs.jsonl.lines import Line

__all__ = ["JsonlEnv", "Line", "load"]
