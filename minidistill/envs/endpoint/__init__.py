"""An OpenAI-compatible endpoint of the policy, for programs of this machine."""

from minidistill.envs.endpoint.server import Endpoint

__all__ = ["Endpoint"]
