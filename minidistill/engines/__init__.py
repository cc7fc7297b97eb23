"""Where completions are sampled and scored."""

from minidistill.engines.base import Engine, Request
from minidistill.engines.embedded import EmbeddedEngine
from minidistill.engines.start import Started, start_engines
from minidistill.engines.vllm import VllmEngine

__all__ = ["EmbeddedEngine", "Engine", "Request", "Started", "VllmEngine", "start_engines"]
