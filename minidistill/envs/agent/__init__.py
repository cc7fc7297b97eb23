"""The environment `agent`: the user's own program, which asks the student over an API."""

from minidistill.envs.agent.load import load

__all__ = ["load"]
