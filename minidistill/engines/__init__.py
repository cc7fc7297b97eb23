"""Where completions are sampled and scored."""

from minidistill.engines.base import Engine, Request
from minidistill.engines.embedded import EmbeddedEngine

__all__ = ["EmbeddedEngine", "Engine", "Request"]
