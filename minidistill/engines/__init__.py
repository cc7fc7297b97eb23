"""Where completions are sampled and scored."""

from minidistill.engines.base import Engine, Request
from minidistill.engines.embedded import EmbeddedEngine
from minidistill.engines.vllm import VllmEngine, start_vllm

__all__ = ["EmbeddedEngine", "Engine", "Request", "VllmEngine", "start_vllm"]
